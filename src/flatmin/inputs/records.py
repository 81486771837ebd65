"""Reads the records that prepare wrote: each role's index, and from it where every encoded image lies."""

from __future__ import annotations

import csv
import os
import sys
import zlib
from array import array
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flatmin import images
from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.common.params import ROLES
from flatmin.images import BrokenImageError, Fit, Stored

ROLE, INDEX = "role.json", "index.csv"
_NUMBERS = ("label", "offset", "bytes", "crc32", "orientation", "height", "width")  # integer columns of the index


class StoredImage(NamedTuple):
    """Where a record's encoded image lies and what it is: all that another process needs to read it.

    Attributes:
        shard: the file's path.
        name: the example's, for messages.
        offset, bytes: of the encoded image within the file.
        crc32: `zlib.crc32` of these bytes.
        orientation: EXIF's, 1 to 8.
        height, width: in pixels, of the upright picture.
    """

    shard: str
    name: str
    offset: int
    bytes: int
    crc32: int
    orientation: int
    height: int
    width: int

    def read(self) -> Image.Image:
        """Read and decode the image: RGB, upright.

        Raises:
            InputError: the bytes are not those that prepare wrote.
        """
        file = os.open(self.shard, os.O_RDONLY)
        try:
            encoded = os.pread(file, self.bytes, self.offset)
        finally:
            os.close(file)
        received = "other bytes"
        if zlib.crc32(encoded) == self.crc32:
            try:
                return images.read(encoded, self.orientation, self.height * self.width)
            except BrokenImageError as error:
                received = str(error)
        raise InputError(
            f"{self.shard}: expected {self.name!r} as prepare wrote it (`dvc repro --force prepare` writes it again), "
            f"received {received}"
        )


class Records:
    """A folder of records, as `flatmin.data.writer` writes it. Only the roles that are asked for are opened.

    Attributes:
        folder: its path.

    Raises:
        InputError: by all but the constructor: the role is missing, or a file of it does not have the size with which
            it was written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._opened: dict[str, _Role] = {}

    @property
    def roles(self) -> list[str]:
        """The roles that have examples, train first."""
        return [role for role in ROLES if (self.folder / role / ROLE).is_file()]

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels."""
        names: list[str] = self._role("train").info["class_names"]
        return names

    def fit(self, role: str) -> Fit:
        """Return how the role's pictures meet the network's square."""
        fit: Fit = self._role(role).info["fit"]
        return fit

    def stored_size(self, role: str) -> Stored:
        """Return how large the role's pictures are stored."""
        return Stored(**self._role(role).info["stored"])

    def digest(self, role: str) -> str:
        """Return a SHA-256, in hexadecimal, over all of the role."""
        return str(self._role(role).info["digest"])

    def count(self, role: str) -> int:
        """Return the number of examples."""
        return int(self._role(role).info["count"])

    def mean_pixels(self, role: str) -> float:
        """Return the mean of height times width."""
        return float(self._role(role).info["mean_pixels"])

    def labels(self, role: str) -> np.ndarray:
        """Return the labels in the records' order: int32 [count], -1 where unknown, read-only."""
        return self._role(role).index.labels

    def training_labels(self) -> np.ndarray:
        """Return train's labels, int32 [count], plus the number of classes where the label is a wrong one on purpose.

        So a batch says which of its labels `label_noise` or `shuffle_labels` changed.
        """
        index = self._role("train").index
        return index.labels + np.int32(len(self.class_names)) * (index.labels != index.true_labels)

    def names(self, role: str) -> list[str]:
        """Return the examples' names in the records' order."""
        return self._role(role).index.names

    def groups(self, role: str) -> list[str] | None:
        """Return the examples' groups in the records' order; None where they are not known."""
        return self._role(role).index.groups

    def stored(self, role: str, positions: Iterable[int]) -> list[StoredImage]:
        """Return where the images at these positions lie."""
        opened = self._role(role)
        index = opened.index
        rows = np.fromiter(positions, np.int64)
        return [
            StoredImage(str(opened.folder / index.shards[row]), index.names[row], *numbers)
            for row, numbers in zip(rows.tolist(), index.numbers[rows].tolist(), strict=True)
        ]

    def _role(self, role: str) -> _Role:
        if role not in self._opened:
            if self.roles and role not in self.roles:
                raise InputError(f"{self.folder}: expected the role {role}, received {', '.join(self.roles)}")
            self._opened[role] = _Role(self.folder / role)
        return self._opened[role]


class _Index(NamedTuple):
    """The index of a role. numbers: int64 [count, 6], a StoredImage's from `offset` on."""

    names: list[str]
    groups: list[str] | None
    shards: list[str]
    labels: np.ndarray
    true_labels: np.ndarray
    numbers: np.ndarray


class _Role:
    """The folder of one role. info: its `role.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info: dict[str, Any] = files.read_json(folder / ROLE)
        for key in ("class_names", "fit", "stored", "count", "mean_pixels", "files", "digest"):
            if key not in self.info:
                raise InputError(f"{folder / ROLE}: {key}: expected as prepare writes it, found none")
        for name, file in self.info["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != file["bytes"]:
                raise InputError(
                    f"{path}: expected {file['bytes']} bytes, received {'none' if size is None else size};"
                    " `dvc repro prepare` writes it again"
                )

    @cached_property
    def index(self) -> _Index:
        """Read the index, once. Rows are read one by one, since a dict of each row takes many times its memory."""
        names: list[str] = []
        groups: list[str] = []
        shards: list[str] = []
        numbers, true_labels = array("q"), array("q")
        if files.sha256(self.folder / INDEX) != self.info["files"][INDEX]["sha256"]:
            raise InputError(
                f"{self.folder / INDEX}: expected it as prepare wrote it, received other bytes;"
                " `dvc repro --force prepare` writes it again"
            )
        with (self.folder / INDEX).open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                names.append(row["name"])
                if "group" in row:
                    groups.append(sys.intern(row["group"]))
                shards.append(sys.intern(row["shard"]))
                numbers.extend(int(row[column]) for column in _NUMBERS)
                true_labels.append(int(row.get("true_label", row["label"])))
        table = np.array(numbers, np.int64).reshape(-1, len(_NUMBERS))
        labels = table[:, 0].astype(np.int32)
        labels.flags.writeable = False
        return _Index(names, groups or None, shards, labels, np.array(true_labels, np.int32), table[:, 1:])
