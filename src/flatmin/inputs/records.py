"""Reads the records that prepare wrote."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.common.params import ROLES

HANDED_OVER = 32


class Records:
    """A folder that `write` made.

    info: `dataset.json`, parsed. class_names: in the order of the labels. roles: train first.
    digest: SHA-256, in hexadecimal, over all that is stored.

    Raises:
        InputError: a file is missing or has another size than it was written with.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self.info = files.read_json(self._folder / "dataset.json")
        for key in ("class_names", "roles", "digest", "files"):
            if key not in self.info:
                raise InputError(f"{self._folder / 'dataset.json'}: {key}: expected as prepare writes it, found none")
        self.class_names: list[str] = self.info["class_names"]
        self.roles: list[str] = [role for role in ROLES if role in self.info["roles"]]
        self.digest: str = self.info["digest"]
        for name, file in self.info["files"].items():
            path = self._folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                raise InputError(
                    f"{path}: expected {file['bytes']} bytes, received {'none' if size is None else size};"
                    " `dvc repro prepare` writes it anew"
                )
        self._index: dict[str, tuple[list[str], np.ndarray]] = {}

    def count(self, role: str) -> int:
        """How many examples there are."""
        return int(self._role(role)["count"])

    def mean_pixels(self, role: str) -> float:
        """Height times width, on average."""
        return float(self._role(role)["mean_pixels"])

    def labels(self, role: str) -> np.ndarray:
        """int32 [count]: the labels in the records' order, -1 where unknown. Not to be written to."""
        return self._indexed(role)[1]

    def names(self, role: str) -> list[str]:
        """The examples' names in the records' order."""
        return self._indexed(role)[0]

    def images(self, role: str, wanted: Callable[[Any], Any] | None = None) -> tf.data.Dataset:
        """(uint8 [height, width, 3], scalar int32), always in the same order; sizes may differ.

        wanted: of an example's position, whether it is; by default all are.
        """
        stored = self._stored(role)
        if wanted is not None:
            numbered = stored.enumerate().filter(lambda position, _: wanted(position))
            stored = numbered.map(lambda _, record: record)
        return stored.map(lambda record: _decode(*_parse(record)), tf.data.AUTOTUNE, deterministic=True)

    def arrays(self, role: str, wanted: Callable[[Any], Any] | None = None) -> Iterator[np.ndarray]:
        """The images alone, in NumPy: handed over many at a time, which takes half as long as one by one."""
        images = self.images(role, wanted)
        sides = [self._role(role)[side] for side in ("height", "width")]
        if all(side["min"] == side["max"] for side in sides):
            for batch in images.map(lambda image, _: image).batch(HANDED_OVER).as_numpy_iterator():
                yield from batch
            return
        flat = images.map(lambda image, _: (tf.reshape(image, (-1,)), tf.shape(image)))
        for pixels, shapes in flat.ragged_batch(HANDED_OVER).as_numpy_iterator():
            for image, shape in zip(pixels, shapes, strict=True):
                yield image.reshape(shape)

    def _stored(self, role: str) -> tf.data.Dataset:
        """Scalar strings: a role's records as they are in the files."""
        self._role(role)
        shards = sorted(name for name in self.info["files"] if name.startswith(f"{role}-"))
        return not_tuned(tf.data.TFRecordDataset([str(self._folder / name) for name in shards]))

    def _role(self, role: str) -> Mapping[str, Any]:
        if role not in self.info["roles"]:
            raise InputError(f"{self._folder}: expected the role {role}, received {', '.join(self.roles)}")
        return self.info["roles"][role]

    def _indexed(self, role: str) -> tuple[list[str], np.ndarray]:
        self._role(role)
        if role not in self._index:
            with (self._folder / f"{role}.csv").open(newline="", encoding="utf-8") as file:
                rows: Iterable[list[str]] = list(csv.reader(file))[1:]
            labels = np.array([int(label) for _, label in rows], np.int32)
            labels.flags.writeable = False
            self._index[role] = [name for name, _ in rows], labels
        return self._index[role]


def not_tuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Without tf.data's tuning of itself: its thread can take five seconds to see that an iterator is gone.

    Whoever iterates waits for it then, at the end of an epoch or of a view.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    features = {"image": tf.io.FixedLenFeature((), tf.string), "label": tf.io.FixedLenFeature((), tf.int64)}
    parsed = tf.io.parse_single_example(record, features)
    return parsed["image"], tf.cast(parsed["label"], tf.int32)


def _decode(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    pixels = tf.io.decode_image(image, channels=3, expand_animations=False)
    return tf.ensure_shape(pixels, (None, None, 3)), label
