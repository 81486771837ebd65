"""Writes a data set as records: a folder of sharded TFRecords for each role, and `dataset.json`, which describes all.

A role's folder holds `00000-of-00003.tfrecord`, `role.json` (what a reader needs to know) and `index.csv` (a row for
each example, in order). The index says where in its shard the encoded picture lies, so that a process reads it without
TensorFlow. Of a role without examples there is an index without rows. Nothing in a role's folder depends on other
roles. Equal sources, settings and seeds give equal bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.common.params import ROLES, Data
from flatmin.data import folds, groups, images, sources, splits
from flatmin.data.images import Picture
from flatmin.data.sources.base import UNKNOWN, Example, Source
from flatmin.images import BrokenImageError, Stored

# A shard is full when it reaches either limit.
SHARD_EXAMPLES = 4096
SHARD_BYTES = 2**27

MAX_LISTED = 20  # examples that dataset.json names of a kind
MAX_TOLD = 10  # classes that are printed

RECORD_HEADER, RECORD_FOOTER = 12, 4  # bytes before and after the serialized example in a TFRecord file


def open_source(data: Data) -> Source:
    """Open the source whose slices follow groups and folds, where there are any."""
    source = sources.open_source(data)
    if data.group:
        source = groups.Grouped(source, data.seed)
    if data.folds is not None and data.fold is not None:
        source = folds.Folded(source, data.folds, data.fold, data.seed, bool(data.group))
    return source


def write(data: Data, folder: Path | str, largest: int | None = None) -> dict[str, Any]:
    """Read the source image by image and write its records to `folder`, which appears complete or not at all.

    Args:
        data: The `data` section.
        folder: Replaced if it exists.
        largest: Height and width of the largest network input, to which `image_size: auto` reduces pictures; None: it
            keeps their size.

    Returns:
        The metrics (counts, duplicates, the digest): numbers and short strings in nested dicts.

    Raises:
        InputError: The source does not fit the settings. The message names the key.
    """
    stored = Stored.by_setting(data.image_size, largest)
    console.log(f"prepare: {stored.describe()}")
    source = open_source(data)
    class_names, expressions = source.class_names, source.expressions
    sizes = splits.count_examples(source, expressions)
    listed = Path(folder).with_name("broken.txt")
    broken: list[str] = []
    roles = splits.assign_roles(source, data, class_names, broken, listed)
    if data.group:
        groups.refuse_shared(splits.groups_of_roles(source, roles))
    drawn_labels = splits.draw_labels(source, data, class_names, roles)
    with files.atomic_write(folder) as temporary:
        temporary.mkdir()
        writer = RecordsWriter(temporary, class_names, data.fit, stored)
        examples = _examples_with_roles(source, expressions, roles, drawn_labels)
        for role, example in console.progress(examples, "prepare", sum(sizes.values()), "image"):
            if role is None:
                continue
            try:
                picture = images.read_picture(example.encoded(), stored, data.max_pixels)
            except BrokenImageError as error:
                broken.append(f"{example.name} ({error})")
            else:
                writer.add(role, example, picture)
        splits.refuse_broken(broken, data.skip_broken, listed)
        _check(writer, data, expressions, class_names)
        writer.close()
        info = _describe(writer, data, source, class_names, broken)
        files.write_json(temporary / "dataset.json", info)
    _tell(info)
    return _metrics(info)


def _tell(info: Mapping[str, Any]) -> None:
    """Say what was read otherwise than one might think."""
    names = info["class_names"]
    console.log(f"prepare: classes: {', '.join(names[:MAX_TOLD])}{', ...' if len(names) > MAX_TOLD else ''}")
    if info["groups"]:
        shares = ", ".join(
            f"{role} {count} with {info['roles'][role]['count']} images" for role, count in info["groups"].items()
        )
        console.log(f"prepare: groups: {shares}; no two of train, val and test share one")
    if info["left_out"]:
        console.log(f"prepare: examples that no role takes: {info['left_out']}")
    if info["first_frames"]:
        console.log(f"prepare: files with several frames or pages, of which the first is taken: {info['first_frames']}")
    if info["dark"]["count"]:
        console.log(
            "prepare: images of 12 or 16 bits that are dark, since they use less than a quarter of their range:"
            f" {info['dark']['count']}, such as {info['dark']['names'][0]!r}"
        )


def _examples_with_roles(
    source: Source,
    expressions: Mapping[str, str],
    roles: np.ndarray | None,
    drawn_labels: Mapping[str, Mapping[int, int]],
) -> Iterator[tuple[str | None, Example]]:
    """Yield every example with its role, which is None if it is left out.

    Examples in `drawn_labels` get that label; they, and where there are any all of train, keep the true one too. The
    label of predict is removed.
    """
    for role, expression in expressions.items():
        drawn = drawn_labels.get(role, {})
        for index, example in enumerate(source.examples(expression)):
            code = roles[index] if role == "train" and roles is not None else None
            if index in drawn or (drawn and code == splits.TRAIN):
                example = example._replace(label=drawn.get(index, example.label), true_label=example.label)
            if role == "predict":
                example = example._replace(label=UNKNOWN)
            if code is None:
                yield role, example
            else:
                yield None if code == splits.LEFT_OUT else ROLES[code], example


class RecordsWriter:
    """Writes the records of all roles. Memory holds only the rows of the index, and digests.

    Attributes:
        roles: The writer of each role that has examples; after `close`, in the order of `ROLES`.
        described: After `close`, the `role.json` of each of them.
        first_frames: The number of pictures whose file has more frames or pages.
        dark: The names of pictures whose 12 or 16 bits use less than a quarter of their range.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], fit: str, stored: Stored) -> None:
        self._folder = folder
        self._same_in_all: dict[str, Any] = {"class_names": class_names, "fit": fit, "stored": stored._asdict()}
        self.roles: dict[str, ShardWriter] = {}
        self.described: dict[str, dict[str, Any]] = {}
        self.first_frames = 0
        self.dark: list[str] = []

    def add(self, role: str, example: Example, picture: Picture) -> None:
        if role not in self.roles:
            self.roles[role] = ShardWriter(self._folder / role)
        self.roles[role].add(example, picture)
        self.first_frames += picture.frames
        if picture.dark:
            self.dark.append(example.name)

    def close(self) -> None:
        self.roles = {role: self.roles[role] for role in ROLES if role in self.roles}
        for role in ROLES:
            if role not in self.roles:  # a table without rows, since DVC warns of an empty folder
                files.write_csv(self._folder / role / "index.csv", Row._fields, ())
        for role, writer in self.roles.items():
            written = {
                path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in writer.close()
            }
            digest = _digest({**self._same_in_all, "files": written})
            described = {**self._same_in_all, **writer.describe(self._same_in_all["class_names"])}
            self.described[role] = {**described, "files": written, "digest": digest}
            files.write_json(self._folder / role / "role.json", self.described[role])

    def duplicates(self) -> dict[str, list[tuple[str, str]]]:
        """Find the pictures that two roles share.

        Returns:
            For each pair of roles, such as `train_test`, the two names of each of test's pictures that is in train.
        """
        duplicates: dict[str, list[tuple[str, str]]] = {}
        for first, second in itertools.combinations(self.roles, 2):
            # Reversed, so that of equal pictures in the first role the first is named.
            rows = {role: [row.name for row in self.roles[role].rows] for role in (first, second)}
            names = dict(zip(reversed(self.roles[first].digests), reversed(rows[first]), strict=True))
            pictures = zip(self.roles[second].digests, rows[second], strict=True)
            duplicates[f"{first}_{second}"] = [(names[digest], name) for digest, name in pictures if digest in names]
        return duplicates


class Row(NamedTuple):
    """A row of `index.csv`.

    Attributes:
        name, label: The example's.
        true_label: The source's label. The column is there if wrong labels were drawn.
        group: The example's. The column is there with `data.group`.
        shard: The name of the file; its number until all are written.
        offset, bytes: Where in the file the encoded picture lies.
        crc32: zlib's, of these bytes.
        orientation: EXIF's, 1 to 8, with which they are decoded.
        height, width: In pixels, upright.
    """

    name: str
    label: int
    true_label: int | None
    group: str | None
    shard: Any
    offset: int
    bytes: int
    crc32: int
    orientation: int
    height: int
    width: int


class ShardWriter:
    """Writes the shards of one role. They are renamed at the end, when their number is known."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._writer: Any = None
        self._in_shard = self._bytes = self._shards = 0
        self.rows: list[Row] = []
        self.digests: list[bytes] = []

    def add(self, example: Example, picture: Picture) -> None:
        if "\r" in example.name:  # which a CSV reader would take for the end of a line
            raise InputError(f"data.name: expected names without carriage returns, received {example.name!r}")
        if self._writer is None or self._in_shard >= SHARD_EXAMPLES or self._bytes >= SHARD_BYTES:
            self._start_shard()
        record = _serialize(picture.encoded, example)
        self._writer.write(record)
        self.rows.append(
            Row(
                example.name,
                example.label,
                example.true_label,
                example.group,
                self._shards - 1,
                self._bytes + RECORD_HEADER + record.index(picture.encoded),
                len(picture.encoded),
                zlib.crc32(picture.encoded),
                picture.orientation,
                picture.height,
                picture.width,
            )
        )
        self.digests.append(picture.digest)
        self._in_shard += 1
        self._bytes += RECORD_HEADER + len(record) + RECORD_FOOTER

    def _start_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = tf.io.TFRecordWriter(str(self._path(self._shards)))
        self._in_shard = self._bytes = 0
        self._shards += 1

    def _path(self, shard: int, suffix: str = "") -> Path:
        return self._folder / f"{shard:05d}{suffix}.tfrecord"

    def close(self) -> Iterator[Path]:
        """Finish the files and yield the path of each."""
        self._writer.close()
        suffix = f"-of-{self._shards:05d}"
        shards = [self._path(shard).rename(self._path(shard, suffix)) for shard in range(self._shards)]
        yield from shards
        path = self._folder / "index.csv"
        optional = {column for column in ("true_label", "group") if getattr(self.rows[0], column) is None}
        columns = [column for column in Row._fields if column not in optional]
        rows = (row._replace(shard=shards[row.shard].name) for row in self.rows)
        files.write_csv(path, columns, ([getattr(row, column) for column in columns] for row in rows))
        yield path

    def describe(self, class_names: Iterable[str]) -> dict[str, Any]:
        """Return counts and sizes."""
        counts = Counter(row.label for row in self.rows)
        heights, widths = [row.height for row in self.rows], [row.width for row in self.rows]
        return {
            "count": len(self.rows),
            "unlabelled": counts[UNKNOWN],
            "classes": {name: counts[label] for label, name in enumerate(class_names)},
            "height": {"min": min(heights), "max": max(heights)},
            "width": {"min": min(widths), "max": max(widths)},
            "mean_pixels": sum(map(operator.mul, heights, widths)) / len(self.rows),
            "wrong_labels": sum(row.true_label not in {None, row.label} for row in self.rows),
        }


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


def _check(writer: RecordsWriter, data: Data, expressions: Mapping[str, str], class_names: list[str]) -> None:
    """Check the roles and labels, which are known only after all examples were read.

    Raises:
        InputError: A role has no readable image, a label is unknown where it is needed, or train lacks a class.
    """
    val = "splits.val" if "val" in expressions else "val_fraction" if data.val_fraction else "val_per_class"
    keys = {"train": "data.splits.train", "val": f"data.{val}", "test": "data.splits.test"}
    for role, key in {**keys, "predict": "data.splits.predict"}.items():
        if role not in writer.roles and (role != "predict" or role in expressions):
            raise InputError(f"{key}: expected readable images, received none")
    labels = {role: np.array([row.label for row in writer.roles[role].rows]) for role in keys}
    if (labels["test"] == UNKNOWN).all():
        del labels["test"]  # nothing can be scored on it then, which evaluate reports
    for role, role_labels in labels.items():
        splits.refuse_unknown_labels(role_labels, class_names, keys[role])
    splits.refuse_missing_classes(labels["train"], class_names)


def _describe(
    writer: RecordsWriter, data: Data, source: Source, class_names: list[str], broken: list[str]
) -> dict[str, Any]:
    """Return the contents of dataset.json."""
    return {
        "source": data.source,
        "name": data.name,
        "version": source.version,
        "class_names": class_names,
        "roles": writer.described,
        "groups": {role: len({row.group for row in each.rows}) for role, each in writer.roles.items()}
        if data.group
        else None,
        "duplicates": {
            pair: {"count": len(names), "names": [list(two) for two in names[:MAX_LISTED]]}
            for pair, names in writer.duplicates().items()
        },
        "broken": broken,
        "ignored": source.ignored,
        "empty": list(source.empty),
        "left_out": sum(split.num_examples for split in source.splits.values())
        - sum(len(each.rows) for each in writer.roles.values())
        - len(broken),
        "first_frames": writer.first_frames,
        "dark": {"count": len(writer.dark), "names": writer.dark[:MAX_LISTED]},
        "digest": _digest({role: described["digest"] for role, described in writer.described.items()}),
    }


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


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
        "groups": info["groups"] or "unknown",
        "broken": len(info["broken"]),
        "ignored": info["ignored"],
        "empty": len(info["empty"]),
        "left_out": info["left_out"],
        "first_frames": info["first_frames"],
        "dark": info["dark"]["count"],
        "wrong_labels": info["roles"]["train"]["wrong_labels"],
        "duplicates": {pair: described["count"] for pair, described in info["duplicates"].items()},
        "roles": {role: role_metrics(described) for role, described in info["roles"].items()},
    }
