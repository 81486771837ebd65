"""Reads the records that prepare wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.common.params import ROLES

READ_BATCH = 32  # images that `Records.arrays` converts to NumPy at once


class Records:
    """A folder of records, as `flatmin.data.writer` writes it.

    Attributes:
        info: `dataset.json`, parsed.
        class_names: In the order of the labels.
        roles: The roles that have examples, train first.
        digest: SHA-256, in hexadecimal, over all files.

    Raises:
        InputError: A file is missing, or does not have the size with which it was written.
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
                    " `dvc repro prepare` writes it again"
                )
        self._indices: dict[str, tuple[list[str], np.ndarray, np.ndarray]] = {}

    def count(self, role: str) -> int:
        """Return the number of examples."""
        return int(self._role(role)["count"])

    def mean_pixels(self, role: str) -> float:
        """Return the mean of height times width."""
        return float(self._role(role)["mean_pixels"])

    def labels(self, role: str) -> np.ndarray:
        """Return the labels in the records' order: int32 [count], -1 where unknown, read-only."""
        return self._index(role)[1]

    def training_labels(self) -> np.ndarray:
        """Return train's labels, int32 [count], plus the number of classes where the label is a wrong one on purpose.

        So a batch says which of its labels `label_noise` or `shuffle_labels` changed.
        """
        labels, true = self._index("train")[1:]
        return labels + np.int32(len(self.class_names)) * (labels != true)

    def names(self, role: str) -> list[str]:
        """Return the examples' names in the records' order."""
        return self._index(role)[0]

    def images(self, role: str, keep: Callable[[Any], Any] | None = None) -> tf.data.Dataset:
        """Stream the decoded images and labels in the records' order.

        Args:
            keep: Tells from an example's position (scalar int64 tensor) whether to keep it. By default all are kept.

        Returns:
            (uint8 [height, width, 3], scalar int32) of each example. The sizes may differ.
        """
        stored = self._stored(role)
        if keep is not None:
            numbered = stored.enumerate().filter(lambda position, _: keep(position))
            stored = numbered.map(lambda _, record: record)
        return stored.map(lambda record: _decode(*_parse(record)), tf.data.AUTOTUNE, deterministic=True)

    def arrays(self, role: str, keep: Callable[[Any], Any] | None = None) -> Iterator[np.ndarray]:
        """Stream the images of `images(role, keep)` as NumPy arrays.

        They are converted in batches, which takes half as long as one by one.
        """
        images = self.images(role, keep).map(lambda image, _: image)
        sides = [self._role(role)[side] for side in ("height", "width")]
        if all(side["min"] == side["max"] for side in sides):
            for batch in images.batch(READ_BATCH).as_numpy_iterator():
                yield from batch
            return
        flattened = images.map(lambda image: (tf.reshape(image, (-1,)), tf.shape(image)))
        for pixels, shapes in flattened.ragged_batch(READ_BATCH).as_numpy_iterator():
            for image, shape in zip(pixels, shapes, strict=True):
                yield image.reshape(shape)

    def _stored(self, role: str) -> tf.data.Dataset:
        """Stream a role's serialized records: scalar strings."""
        self._role(role)
        shards = sorted(name for name in self.info["files"] if name.startswith(f"{role}-"))
        return without_autotune(tf.data.TFRecordDataset([str(self._folder / name) for name in shards]))

    def _role(self, role: str) -> Mapping[str, Any]:
        if role not in self.info["roles"]:
            raise InputError(f"{self._folder}: expected the role {role}, received {', '.join(self.roles)}")
        return self.info["roles"][role]

    def _index(self, role: str) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Return a role's names, labels and true labels, read once from its CSV file."""
        self._role(role)
        if role not in self._indices:
            rows = files.read_csv(self._folder / f"{role}.csv")
            labels = np.array([int(row["label"]) for row in rows], np.int32)
            labels.flags.writeable = False
            true = np.array([int(row.get("true_label", row["label"])) for row in rows], np.int32)
            self._indices[role] = [row["name"] for row in rows], labels, true
        return self._indices[role]


def without_autotune(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Disable tf.data's autotuning.

    Its thread can take up to five seconds to notice that an iterator was closed, and blocks the end of an epoch or
    of a view for that long.
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
