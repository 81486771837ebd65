"""Writes a data set as sharded TFRecords for each role, described by `dataset.json`.

A folder of records holds `{role}-00000-of-00003.tfrecord`, `{role}.csv` (names and labels in the records' order) and
`dataset.json`. Equal sources, settings and seeds give equal bytes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.common.params import ROLES, Data
from flatmin.data import images, sources, splits
from flatmin.data.images import BrokenImageError, Picture
from flatmin.data.sources.base import UNKNOWN, Example, Source

# A shard is full when it reaches either limit.
SHARD_EXAMPLES = 4096
SHARD_BYTES = 2**27

MAX_LISTED_DUPLICATES = 20


def write(data: Data, folder: Path | str) -> dict[str, Any]:
    """Read the source image by image and write its records to `folder`, which appears complete or not at all.

    Args:
        data: The `data` section.
        folder: Replaced if it exists.

    Returns:
        The metrics (counts, duplicates, the digest): numbers and short strings in nested dicts.

    Raises:
        InputError: The source does not fit the settings. The message names the key.
    """
    source = sources.open_source(data)
    class_names = _class_names(data, source)
    expressions = {role: text for role in ROLES if (text := getattr(data.splits, role)) is not None}
    sizes = splits.count_examples(source, expressions)
    broken: list[str] = []
    roles = splits.assign_roles(source, data, class_names, broken)
    drawn_labels = splits.draw_labels(source, data, class_names, roles)
    with files.atomic_write(folder) as temporary:
        temporary.mkdir()
        writer = RecordsWriter(temporary)
        examples = _examples_with_roles(source, expressions, roles, drawn_labels)
        for role, example in console.progress(examples, "prepare", sum(sizes.values()), "image"):
            if role is None:
                continue
            try:
                picture = images.read_picture(example.image, data.image_size)
            except BrokenImageError as error:
                broken.append(f"{example.name} ({error})")
            else:
                writer.add(role, example, picture)
        splits.refuse_broken(broken, data.skip_broken)
        writer.close()
        _check(writer, data, class_names)
        info = _describe(writer, data, source, class_names, broken)
        files.write_json(temporary / "dataset.json", info)
    return _metrics(info)


def _class_names(data: Data, source: Source) -> list[str]:
    if len(source.class_names) < 2:
        raise InputError(f"data.name: expected at least two classes, received {len(source.class_names)}")
    if data.class_names is None:
        return source.class_names
    if len(data.class_names) != len(source.class_names):
        raise InputError(
            f"data.class_names: expected {len(source.class_names)} names, received {len(data.class_names)}"
        )
    return data.class_names


def _examples_with_roles(
    source: Source, expressions: Mapping[str, str], roles: np.ndarray | None, drawn_labels: Mapping[int, int]
) -> Iterator[tuple[str | None, Example]]:
    """Yield every example with its role, which is None if it is left out.

    Training examples in `drawn_labels` get that label, and where there are any, all of train keep the true one too. The
    label of predict is removed.
    """
    for role, expression in expressions.items():
        examples = source.examples(expression)
        if role == "train" and roles is not None:
            for index, (code, example) in enumerate(zip(roles.tolist(), examples, strict=True)):
                if drawn_labels and code == splits.TRAIN:
                    example = example._replace(label=drawn_labels.get(index, example.label), true_label=example.label)
                yield None if code == splits.LEFT_OUT else ROLES[code], example
        else:
            for example in examples:
                yield role, example._replace(label=UNKNOWN) if role == "predict" else example


class RecordsWriter:
    """Writes the records of all roles. Memory holds only names, labels, sizes and digests.

    Attributes:
        roles: The writer of each role that has examples; after `close`, in the order of `ROLES`.
        files: After `close`, the size in bytes and the SHA-256 of each file by its name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.roles: dict[str, ShardWriter] = {}
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, role: str, example: Example, picture: Picture) -> None:
        if role not in self.roles:
            self.roles[role] = ShardWriter(self._folder, role)
        self.roles[role].add(example, picture)

    def close(self) -> None:
        self.roles = {role: self.roles[role] for role in ROLES if role in self.roles}
        for writer in self.roles.values():
            for path in writer.close():
                self.files[path.name] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}

    def duplicates(self) -> dict[str, list[tuple[str, str]]]:
        """Find the pictures that two roles share.

        Returns:
            For each pair of roles, such as `train_test`, the two names of each of test's pictures that is in train.
        """
        duplicates: dict[str, list[tuple[str, str]]] = {}
        for first, second in itertools.combinations(self.roles, 2):
            # Reversed, so that of equal pictures in the first role the first is named.
            names = dict(zip(reversed(self.roles[first].digests), reversed(self.roles[first].names), strict=True))
            pictures = zip(self.roles[second].digests, self.roles[second].names, strict=True)
            duplicates[f"{first}_{second}"] = [(names[digest], name) for digest, name in pictures if digest in names]
        return duplicates


class ShardWriter:
    """Writes the shards of one role. They are renamed at the end, when their number is known."""

    def __init__(self, folder: Path, role: str) -> None:
        self._folder, self._role = folder, role
        self._writer: Any = None
        self._in_shard = self._bytes = self._shards = 0
        self.names: list[str] = []
        self.labels: list[int] = []
        self.true_labels: list[int] = []  # as many as labels, or none where all labels are the source's
        self.digests: list[bytes] = []
        self.heights: list[int] = []
        self.widths: list[int] = []

    def add(self, example: Example, picture: Picture) -> None:
        if "\r" in example.name:  # which a CSV reader would take for the end of a line
            raise InputError(f"data.name: expected names without carriage returns, received {example.name!r}")
        if self._writer is None or self._in_shard >= SHARD_EXAMPLES or self._bytes >= SHARD_BYTES:
            self._start_shard()
        record = _serialize(picture.encoded, example)
        self._writer.write(record)
        self._in_shard += 1
        self._bytes += len(record)
        self.names.append(example.name)
        self.labels.append(example.label)
        if example.true_label is not None:
            self.true_labels.append(example.true_label)
        self.digests.append(picture.digest)
        self.heights.append(picture.height)
        self.widths.append(picture.width)

    def _start_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = tf.io.TFRecordWriter(str(self._path(self._shards)))
        self._in_shard = self._bytes = 0
        self._shards += 1

    def _path(self, shard: int, suffix: str = "") -> Path:
        return self._folder / f"{self._role}-{shard:05d}{suffix}.tfrecord"

    def close(self) -> Iterator[Path]:
        """Finish the files and yield the path of each."""
        self._writer.close()
        for shard in range(self._shards):
            yield self._path(shard).rename(self._path(shard, f"-of-{self._shards:05d}"))
        path = self._folder / f"{self._role}.csv"
        columns = {"name": self.names, "label": self.labels}
        if self.true_labels:
            columns["true_label"] = self.true_labels
        files.write_csv(path, list(columns), zip(*columns.values(), strict=True))
        yield path

    @property
    def wrong_labels(self) -> int:
        """The number of labels that are not the true ones."""
        return sum(label != true for label, true in zip(self.labels, self.true_labels, strict=False))


def _serialize(image: bytes, example: Example) -> bytes:
    def text(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    def number(value: int) -> tf.train.Feature:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    features = {"image": text(image), "label": number(example.label), "name": text(example.name.encode())}
    if example.true_label is not None:
        features["true_label"] = number(example.true_label)
    serialized = tf.train.Example(features=tf.train.Features(feature=features))
    return bytes(serialized.SerializeToString(deterministic=True))


def _check(writer: RecordsWriter, data: Data, class_names: list[str]) -> None:
    """Check the roles and labels, which are known only after all examples were read.

    Raises:
        InputError: A role has no readable image, a label is unknown where it is needed, or train lacks a class.
    """
    val = "splits.val" if data.splits.val else "val_fraction" if data.val_fraction else "val_per_class"
    keys = {"train": "data.splits.train", "val": f"data.{val}", "test": "data.splits.test"}
    for role, key in {**keys, "predict": "data.splits.predict"}.items():
        if role not in writer.roles and (role != "predict" or data.splits.predict):
            raise InputError(f"{key}: expected readable images, received none")
    labels = {role: np.array(writer.roles[role].labels) for role in keys}
    if (labels["test"] == UNKNOWN).all():
        del labels["test"]  # nothing can be scored on it then, which evaluate reports
    for role, role_labels in labels.items():
        splits.refuse_unknown_labels(role_labels, class_names, keys[role])
    missing = np.setdiff1d(np.arange(len(class_names)), labels["train"])
    if len(missing):
        raise InputError(
            f"data.splits.train: expected images of each class, received none of {class_names[missing[0]]!r}"
            f" ({len(missing)} of {len(class_names)} classes are missing)"
        )


def _describe(
    writer: RecordsWriter, data: Data, source: Source, class_names: list[str], broken: list[str]
) -> dict[str, Any]:
    """Return the contents of dataset.json."""
    return {
        "source": data.source,
        "name": data.name,
        "version": source.version,
        "class_names": class_names,
        "roles": {role: _describe_role(writer.roles[role], class_names) for role in writer.roles},
        "duplicates": {
            pair: {"count": len(names), "names": [list(two) for two in names[:MAX_LISTED_DUPLICATES]]}
            for pair, names in writer.duplicates().items()
        },
        "broken": broken,
        "files": writer.files,
        "digest": _digest(writer.files),
        "wrong_labels": writer.roles["train"].wrong_labels,
    }


def _describe_role(writer: ShardWriter, class_names: list[str]) -> dict[str, Any]:
    counts = Counter(writer.labels)
    pixels = sum(height * width for height, width in zip(writer.heights, writer.widths, strict=True))
    return {
        "count": len(writer.labels),
        "unlabelled": counts[UNKNOWN],
        "classes": {name: counts[label] for label, name in enumerate(class_names)},
        "height": {"min": min(writer.heights), "max": max(writer.heights)},
        "width": {"min": min(writer.widths), "max": max(writer.widths)},
        "mean_pixels": pixels / len(writer.labels),
    }


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _metrics(info: Mapping[str, Any]) -> dict[str, Any]:
    """Select from dataset.json what is worth comparing between runs, which excludes the counts of each class."""

    def role_metrics(role: Mapping[str, Any]) -> dict[str, int]:
        if role["unlabelled"]:
            return {"count": role["count"]}
        sizes = role["classes"].values()
        return {"count": role["count"], "smallest_class": min(sizes), "largest_class": max(sizes)}

    return {
        **{key: info[key] for key in ("source", "name", "version", "digest")},
        "classes": len(info["class_names"]),
        "broken": len(info["broken"]),
        "wrong_labels": info["wrong_labels"],
        "duplicates": {pair: described["count"] for pair, described in info["duplicates"].items()},
        "roles": {role: role_metrics(described) for role, described in info["roles"].items()},
    }
