"""The data set as the stages read it: sharded TFRecords for each role, described by `dataset.json`.

A folder of records holds `{role}-00000-of-00003.tfrecord`, `{role}.csv` (names and labels in the same order)
and `dataset.json`. Equal sources, settings and seeds give equal bytes.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin.common import reporting
from flatmin.common.params import Data
from flatmin.common.reporting import InputError
from flatmin.data import datasets
from flatmin.data.datasets import UNKNOWN, BrokenImageError, Example, Picture, Source

ROLES = ("train", "val", "test", "predict")
TRAIN, VAL = 0, 1
LEFT_OUT = -1

# A shard is full at so many examples or bytes, whichever comes first.
SHARD = 4096
SHARD_BYTES = 2**27

HANDED_OVER = 32
NAMED_DUPLICATES = 20
NAMED_BROKEN = 3


def write(data: Data, seed: int, folder: Path | str) -> dict[str, Any]:
    """Read the source, image by image, and write its records to `folder`, which appears whole or not at all.

    Args:
        data: the `data` section.
        seed: non-negative; it carves val out of train, picks `train_per_class` and draws `label_noise`.
        folder: is replaced if it is there.

    Returns:
        The metrics: counts, duplicates, the digest; numbers and short strings in nested dicts.

    Raises:
        InputError: the source is not as the settings expect it; the message names the key.
    """
    source = datasets.open_source(data, seed)
    class_names = _class_names(data, source)
    expressions = {role: text for role in ROLES if (text := getattr(data.splits, role)) is not None}
    sizes = _sizes(source, expressions)
    broken: list[str] = []
    roles = _memberships(source, data, seed, class_names, broken)
    wrong = _wrong_labels(source, data, seed, class_names, roles)
    with reporting.whole(folder) as aside:
        aside.mkdir()
        written = _Written(aside, class_names)
        stream = _stream(source, expressions, roles, wrong)
        for role, example in reporting.progress(stream, "prepare", sum(sizes.values()), "image"):
            if role is None:
                continue
            try:
                picture = datasets.read_picture(example.image, data.image_size)
            except BrokenImageError as error:
                broken.append(f"{example.name} ({error})")
            else:
                written.add(role, example, picture)
        _refuse_broken(broken, data.skip_broken)
        written.close()
        _check(written, data, class_names)
        info = _describe(written, data, source, class_names, broken) | {"wrong_labels": len(wrong)}
        reporting.write_json(aside / "dataset.json", info)
    return _summary(info)


def _class_names(data: Data, source: Source) -> list[str]:
    if len(source.class_names) < 2:
        raise InputError(f"data.name: expected two classes or more, received {len(source.class_names)}")
    if data.class_names is None:
        return source.class_names
    if len(data.class_names) != len(source.class_names):
        raise InputError(
            f"data.class_names: expected {len(source.class_names)} names, received {len(data.class_names)}"
        )
    return data.class_names


def _sizes(source: Source, expressions: Mapping[str, str]) -> dict[str, int]:
    """How many examples each role's split has. Nothing may be empty, and no example may be there twice."""
    sizes: dict[str, int] = {}
    seen: list[tuple[str, datasets.Slice]] = []
    for role, expression in expressions.items():
        slices = source.locate(expression, f"data.splits.{role}")
        if not slices:
            raise InputError(f"data.splits.{role}: expected examples, received none of them with {expression!r}")
        for part in slices:
            for other, earlier in seen:
                start, stop = max(part.start, earlier.start), min(part.stop, earlier.stop)
                if part.split == earlier.split and start < stop:
                    raise InputError(
                        f"data.splits.{role}: expected no example twice, received"
                        f" {part.split}[{start}:{stop}], which data.splits.{other} has too"
                    )
            seen.append((role, part))
        sizes[role] = sum(part.stop - part.start for part in slices)
    return sizes


def _memberships(source: Source, data: Data, seed: int, class_names: list[str], broken: list[str]) -> np.ndarray | None:
    """int8 [n]: TRAIN, VAL or LEFT_OUT for each example of train's split; None where all of them are TRAIN.

    Where broken images may be left out, they are found here (`broken` grows): the counts come out as asked.
    """
    if not any((data.val_fraction, data.val_per_class, data.train_per_class, data.label_noise)):
        return None
    labels = source.labels(data.splits.train)
    _refuse_unknown(labels, class_names, "data.splits.train")
    readable = np.ones(len(labels), bool)
    if data.skip_broken:
        examples = source.examples(data.splits.train)
        for index, example in enumerate(reporting.progress(examples, "check", len(labels), "image")):
            try:
                datasets.read_picture(example.image)
            except BrokenImageError as error:
                broken.append(f"{example.name} ({error})")
                readable[index] = False
        _refuse_broken(broken, data.skip_broken)
    return _carve(labels, readable, data, seed, class_names)


def _carve(labels: np.ndarray, readable: np.ndarray, data: Data, seed: int, class_names: list[str]) -> np.ndarray:
    """Each class is shuffled by the seed; its first go to val, the next to train.

    So `train_per_class` changes nothing in val, and a smaller one takes a part of what a larger one takes.
    """
    random = np.random.default_rng([seed, 1])
    roles = np.full(len(labels), LEFT_OUT, np.int8)
    for label, class_name in enumerate(class_names):
        members = random.permutation(np.flatnonzero((labels == label) & readable))
        val = _val_size(len(members), class_name, data)
        train = len(members) - val if data.train_per_class is None else data.train_per_class
        if train > len(members) - val:
            raise InputError(
                f"data.train_per_class: expected at most {len(members) - val}, as class {class_name!r} has,"
                f" received {train}"
            )
        roles[members[:val]] = VAL
        roles[members[val : val + train]] = TRAIN
    return roles


def _val_size(size: int, class_name: str, data: Data) -> int:
    if data.val_per_class is not None:
        key, wanted = "data.val_per_class", data.val_per_class
    elif data.val_fraction is not None:
        key, wanted = "data.val_fraction", max(1, round(data.val_fraction * size))
    else:
        return 0
    if wanted >= size:
        raise InputError(
            f"{key}: expected images of class {class_name!r} left to train on, received {wanted} for val out of {size}"
        )
    return wanted


def _wrong_labels(
    source: Source, data: Data, seed: int, class_names: list[str], roles: np.ndarray | None
) -> dict[int, int]:
    """Index in train's split -> another class, both at random, for `data.label_noise` of the examples to train on."""
    if roles is None or not data.label_noise:
        return {}
    random = np.random.default_rng([seed, 2])
    train = np.flatnonzero(roles == TRAIN)
    chosen = random.choice(train, round(data.label_noise * len(train)), replace=False)
    shifts = random.integers(1, len(class_names), len(chosen))
    labels = (source.labels(data.splits.train)[chosen] + shifts) % len(class_names)
    return dict(zip(chosen.tolist(), labels.tolist(), strict=True))


def _stream(
    source: Source, expressions: Mapping[str, str], roles: np.ndarray | None, wrong: Mapping[int, int]
) -> Iterator[tuple[str | None, Example]]:
    """Every example with its role, None for one that is left out; `wrong` labels those of train."""
    for role, expression in expressions.items():
        examples = source.examples(expression)
        if role == "train" and roles is not None:
            for index, (code, example) in enumerate(zip(roles.tolist(), examples, strict=True)):
                labelled = example._replace(label=wrong[index]) if index in wrong else example
                yield None if code == LEFT_OUT else ROLES[code], labelled
        else:
            for example in examples:
                yield role, example._replace(label=UNKNOWN) if role == "predict" else example


def _refuse_broken(broken: list[str], allowed: int) -> None:
    if len(broken) > allowed:
        named = ", ".join(broken[:NAMED_BROKEN]) + (", ..." if len(broken) > NAMED_BROKEN else "")
        raise InputError(f"data.skip_broken: expected at most {allowed} broken images, received {len(broken)}: {named}")


def _refuse_unknown(labels: np.ndarray, class_names: list[str], key: str) -> None:
    outside = (labels < 0) | (labels >= len(class_names))
    if outside.any():
        raise InputError(
            f"{key}: expected labels from 0 to {len(class_names) - 1}, received {labels[outside][0]}"
            f" in {outside.sum()} of {len(labels)} examples"
        )


class _Written:
    """All of the roles while they are written: what is kept in memory is names, labels and digests."""

    def __init__(self, folder: Path, class_names: list[str]) -> None:
        self._folder = folder
        self._class_names = class_names
        self.roles: dict[str, _Role] = {}
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, role: str, example: Example, picture: Picture) -> None:
        if role not in self.roles:
            self.roles[role] = _Role(self._folder, role)
        self.roles[role].add(example, picture)

    def close(self) -> None:
        self.roles = {role: self.roles[role] for role in ROLES if role in self.roles}
        for writer in self.roles.values():
            for path in writer.close():
                self.files[path.name] = {"bytes": path.stat().st_size, "sha256": reporting.sha256(path)}

    def duplicates(self) -> dict[str, list[tuple[str, str]]]:
        """For pairs of roles, as `train_test`: each of test's pictures that train has too, by both names."""
        found: dict[str, list[tuple[str, str]]] = {}
        for first, second in itertools.combinations(self.roles, 2):
            names = dict(zip(reversed(self.roles[first].digests), reversed(self.roles[first].names), strict=True))
            pictures = zip(self.roles[second].digests, self.roles[second].names, strict=True)
            found[f"{first}_{second}"] = [(names[digest], name) for digest, name in pictures if digest in names]
        return found


class _Role:
    """One role's shards, which get their names when their number is known."""

    def __init__(self, folder: Path, role: str) -> None:
        self._folder, self._role = folder, role
        self._writer: Any = None
        self._in_shard = self._bytes = self._shards = 0
        self.names: list[str] = []
        self.labels: list[int] = []
        self.digests: list[bytes] = []
        self.heights: list[int] = []
        self.widths: list[int] = []

    def add(self, example: Example, picture: Picture) -> None:
        if "\r" in example.name:  # which a CSV's reader takes for the end of a line
            raise InputError(f"data.name: expected names without carriage returns, received {example.name!r}")
        if self._writer is None or self._in_shard >= SHARD or self._bytes >= SHARD_BYTES:
            self._next_shard()
        record = _serialize(picture.encoded, example.label, example.name)
        self._writer.write(record)
        self._in_shard += 1
        self._bytes += len(record)
        self.names.append(example.name)
        self.labels.append(example.label)
        self.digests.append(picture.digest)
        self.heights.append(picture.height)
        self.widths.append(picture.width)

    def _next_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = tf.io.TFRecordWriter(str(self._shard(self._shards)))
        self._in_shard = self._bytes = 0
        self._shards += 1

    def _shard(self, index: int, suffix: str = "") -> Path:
        return self._folder / f"{self._role}-{index:05d}{suffix}.tfrecord"

    def close(self) -> Iterator[Path]:
        """End the files and give the path of each."""
        self._writer.close()
        for index in range(self._shards):
            yield self._shard(index).rename(self._shard(index, f"-of-{self._shards:05d}"))
        path = self._folder / f"{self._role}.csv"
        reporting.write_csv(path, ("name", "label"), zip(self.names, self.labels, strict=True))
        yield path


def _serialize(image: bytes, label: int, name: str) -> bytes:
    def text(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    features = {
        "image": text(image),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "name": text(name.encode()),
    }
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return bytes(example.SerializeToString(deterministic=True))


def _check(written: _Written, data: Data, class_names: list[str]) -> None:
    """What is only known once every label has been seen."""
    val = "splits.val" if data.splits.val else "val_fraction" if data.val_fraction else "val_per_class"
    keys = {"train": "data.splits.train", "val": f"data.{val}", "test": "data.splits.test"}
    for role, key in {**keys, "predict": "data.splits.predict"}.items():
        if role not in written.roles and (role != "predict" or data.splits.predict):
            raise InputError(f"{key}: expected images that can be read, received none")
    labels = {role: np.array(written.roles[role].labels) for role in keys}
    if (labels["test"] == UNKNOWN).all():
        del labels["test"]  # then nothing can be scored on it, which evaluate says
    for role, of_role in labels.items():
        _refuse_unknown(of_role, class_names, keys[role])
    missing = np.setdiff1d(np.arange(len(class_names)), labels["train"])
    if len(missing):
        raise InputError(
            f"data.splits.train: expected images of each class, received none of {class_names[missing[0]]!r}"
            f" ({len(missing)} of {len(class_names)} classes are missing)"
        )


def _describe(
    written: _Written, data: Data, source: Source, class_names: list[str], broken: list[str]
) -> dict[str, Any]:
    """What dataset.json holds."""
    return {
        "source": data.source,
        "name": data.name,
        "version": source.version,
        "class_names": class_names,
        "roles": {role: _describe_role(written.roles[role], class_names) for role in written.roles},
        "duplicates": {
            pair: {"count": len(names), "names": [list(two) for two in names[:NAMED_DUPLICATES]]}
            for pair, names in written.duplicates().items()
        },
        "broken": broken,
        "files": written.files,
        "digest": _digest(written.files),
    }


def _describe_role(role: _Role, class_names: list[str]) -> dict[str, Any]:
    counts = Counter(role.labels)
    pixels = sum(height * width for height, width in zip(role.heights, role.widths, strict=True))
    return {
        "count": len(role.labels),
        "unlabelled": counts[UNKNOWN],
        "classes": {name: counts[label] for label, name in enumerate(class_names)},
        "height": {"min": min(role.heights), "max": max(role.heights)},
        "width": {"min": min(role.widths), "max": max(role.widths)},
        "mean_pixels": pixels / len(role.labels),
    }


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _summary(info: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth comparing between runs. Classes are too many to be listed each."""

    def of_role(role: Mapping[str, Any]) -> dict[str, int]:
        sizes = role["classes"].values()
        labelled = {"smallest_class": min(sizes), "largest_class": max(sizes)}
        return {"count": role["count"], **({} if role["unlabelled"] else labelled)}

    return {
        **{key: info[key] for key in ("source", "name", "version", "digest")},
        "classes": len(info["class_names"]),
        "broken": len(info["broken"]),
        "wrong_labels": info["wrong_labels"],
        "duplicates": {pair: found["count"] for pair, found in info["duplicates"].items()},
        "roles": {role: of_role(described) for role, described in info["roles"].items()},
    }


class Records:
    """A folder that `write` made.

    info: `dataset.json`, parsed. class_names: in the order of the labels. roles: train first.
    digest: SHA-256, in hexadecimal, over all that is stored.

    Raises:
        InputError: a file is missing or has another size than it was written with.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)
        self.info = reporting.read_json(self._folder / "dataset.json")
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
