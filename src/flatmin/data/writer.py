"""The data set as the stages read it: sharded TFRecords for each role, described by `dataset.json`.

A folder of records holds `{role}-00000-of-00003.tfrecord`, `{role}.csv` (names and labels in the same order)
and `dataset.json`. Equal sources, settings and seeds give equal bytes.
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
from flatmin.data.sources import UNKNOWN, Example, Source

# A shard is full at so many examples or bytes, whichever comes first.
SHARD = 4096
SHARD_BYTES = 2**27

NAMED_DUPLICATES = 20


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
    source = sources.open_source(data, seed)
    class_names = _class_names(data, source)
    expressions = {role: text for role in ROLES if (text := getattr(data.splits, role)) is not None}
    sizes = splits.count_examples(source, expressions)
    broken: list[str] = []
    roles = splits.assign_roles(source, data, seed, class_names, broken)
    wrong = splits.draw_label_noise(source, data, seed, class_names, roles)
    with files.atomic_write(folder) as aside:
        aside.mkdir()
        written = _Written(aside, class_names)
        stream = _stream(source, expressions, roles, wrong)
        for role, example in console.progress(stream, "prepare", sum(sizes.values()), "image"):
            if role is None:
                continue
            try:
                picture = images.read_picture(example.image, data.image_size)
            except BrokenImageError as error:
                broken.append(f"{example.name} ({error})")
            else:
                written.add(role, example, picture)
        splits.refuse_broken(broken, data.skip_broken)
        written.close()
        _check(written, data, class_names)
        info = _describe(written, data, source, class_names, broken) | {"wrong_labels": len(wrong)}
        files.write_json(aside / "dataset.json", info)
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


def _stream(
    source: Source, expressions: Mapping[str, str], roles: np.ndarray | None, wrong: Mapping[int, int]
) -> Iterator[tuple[str | None, Example]]:
    """Every example with its role, None for one that is left out; `wrong` labels those of train."""
    for role, expression in expressions.items():
        examples = source.examples(expression)
        if role == "train" and roles is not None:
            for index, (code, example) in enumerate(zip(roles.tolist(), examples, strict=True)):
                labelled = example._replace(label=wrong[index]) if index in wrong else example
                yield None if code == splits.LEFT_OUT else ROLES[code], labelled
        else:
            for example in examples:
                yield role, example._replace(label=UNKNOWN) if role == "predict" else example


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
                self.files[path.name] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}

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
        files.write_csv(path, ("name", "label"), zip(self.names, self.labels, strict=True))
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
        splits.refuse_unknown_labels(of_role, class_names, keys[role])
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
