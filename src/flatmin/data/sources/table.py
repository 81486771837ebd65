"""Images listed in a table: a CSV or Parquet file with a path and a class in each row."""

from __future__ import annotations

import csv
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from flatmin.common import console, errors
from flatmin.common.errors import InputError
from flatmin.common.params import Columns, Data, Links
from flatmin.data.sources import listing
from flatmin.data.sources.base import ListedSource

# What programs write for a value that is missing or no number, in lower case. Some of the other ones are class names.
NO_CLASS = frozenset(("nan", "nat", "<na>", "inf", "-inf"))
HARDLY_CLASS = frozenset(("na", "n/a", "null", "none"))
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}  # what else separates columns


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        where: What the user finds it by, such as `line 7`.
        image: The path as it is written.
        label: The class, "" if it is not known.
        split: The split, None if there is no such column.
        group: The group of `data.group`, None without it.
    """

    where: str
    image: str
    label: str
    split: str | None
    group: str | None


class TableSource(ListedSource):
    """A CSV file (UTF-8, commas, a header) or a Parquet file, with paths relative to it.

    Without a column of splits, rows with a label are `train`, and those without one `predict`. Other columns are
    ignored. A missing file is a broken image. The version is a digest of the rows and the files' sizes.
    """

    def __init__(self, data: Data) -> None:
        table = Path(data.name).expanduser()
        if not table.is_file():
            raise InputError(f"data.name: expected a CSV or Parquet file, received {data.name!r}")
        self._root = table.parent.resolve()  # the table itself may be a link, such as DVC's
        items: dict[str, list[tuple[str, str]]] = {}
        lines: dict[str, str] = {}
        groups: dict[str, str] = {}
        digest = hashlib.sha256()
        for row in _read_rows(table, data.columns, data.group):
            name = _checked_path(row, self._root, data.links)
            file = _real_file(os.path.join(self._root, name))
            if file in lines:
                raise InputError(
                    f"{table}: expected each image once, received {name!r} in {lines[file]} and {row.where}"
                )
            lines[file] = row.where
            split = row.split if row.split is not None else "train" if row.label else "predict"
            if not split:
                raise InputError(f"{table}: {row.where}: expected a split, received none for {name!r}")
            items.setdefault(split, []).append((name, row.label))
            if row.group is not None:
                if not row.group:
                    raise InputError(f"data.group: {row.where}: expected a group, received none for {name!r}")
                groups[name] = row.group
            size = listing.size(self._root / name)
            digest.update(f"{name}\0{row.label}\0{split}\0{size}\n".encode())
        if not items:
            raise InputError(f"{table}: expected at least one row, received none")
        super().__init__(data, digest.hexdigest()[:16], items, groups)
        if odd := [name for name in self.class_names if name.casefold() in HARDLY_CLASS]:
            console.log(f"prepare: {odd[0]!r} is a class; a row whose class is not known has an empty label")

    def _read(self, name: str) -> bytes:
        return listing.read_file(self._root / name)


def _checked_path(row: Row, root: Path, links: Links) -> str:
    """Return the row's path without `.` and `..`, or an absolute one.

    Raises:
        InputError: It is no path, or one that `data.links` does not allow.
    """
    if not row.image or "\0" in row.image or "://" in row.image:
        raise InputError(f"data.columns.image: {row.where}: expected the path of a file, received {row.image!r}")
    name = os.path.normpath(row.image)
    path = f"{root}/{name}"
    if "\\" in name and not os.path.exists(path):
        raise InputError(f"data.columns.image: {row.where}: expected forward slashes, received {row.image!r}")
    if links == "follow":
        return name
    if name.startswith(("/", "../")):
        raise InputError(
            f"data.links: {row.where}: expected paths below the table's folder with {links}, received {row.image!r};"
            " `follow` reads it"
        )
    linked = os.path.islink(path) or _real_folder(os.path.dirname(path)) != os.path.dirname(path)
    if linked and (links == "refuse" or not listing.is_near(os.path.realpath(path), str(root))):
        listing.refuse_link(f"{row.where}: {row.image}", links, os.path.realpath(path), str(root))
    return name


@cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _real_file(path: str) -> str:
    """Return the path by which a file that rows name in several ways is known; of DVC's links, their own."""
    own = f"{_real_folder(os.path.dirname(path))}/{os.path.basename(path)}"
    return listing.real_file(own) if os.path.islink(own) else own


def _read_rows(table: Path, columns: Columns, group: str | None) -> Iterator[Row]:
    match table.suffix.lower():
        case ".csv":
            return _read_csv(table, columns, group)
        case ".parquet" | ".pq":
            return _read_parquet(table, columns, group)
        case _:
            raise InputError(f"data.name: expected a table named *.csv or *.parquet, received {table.name!r}")


def _read_csv(table: Path, columns: Columns, group: str | None) -> Iterator[Row]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            chosen = _choose_columns(table, header, columns, group)
            for cells in reader:
                if not cells:
                    continue
                where = f"line {reader.line_num}"
                if len(cells) != len(header):
                    raise InputError(f"{table}: {where}: expected {len(header)} cells, received {len(cells)}")
                yield _row(table, where, [None if index is None else cells[index] for index in chosen])
    except UnicodeDecodeError as error:
        raise InputError(f"{table}: expected text in UTF-8, received byte {error.object[error.start]:#04x}") from None
    except csv.Error as error:
        raise InputError(f"{table}: line {reader.line_num}: expected CSV, received: {error}") from None


def _read_parquet(table: Path, columns: Columns, group: str | None) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # needs a second that other tables need not wait for
    except ImportError as error:
        raise InputError(
            f"data.name: expected pyarrow, which reads Parquet, received: {error}; a CSV file needs none"
        ) from None
    try:
        with parquet.ParquetFile(table) as file:
            header = file.schema_arrow.names
            chosen = _choose_columns(table, header, columns, group)
            names = [header[index] for index in chosen if index is not None]
            number = 0
            for batch in file.iter_batches(columns=names):
                for values in batch.select(names).to_pylist():
                    number += 1
                    # None stands for a missing column, so an empty cell must be something else.
                    cells = [None if index is None else _or_empty(values[header[index]]) for index in chosen]
                    yield _row(table, f"row {number}", cells)
    except (ArrowException, OSError) as error:
        raise InputError(f"{table}: expected Parquet, received: {errors.first_line(str(error))}") from None


def _or_empty(cell: Any) -> Any:
    return "" if cell is None else cell


def _choose_columns(table: Path, header: Sequence[str], columns: Columns, group: str | None) -> list[int | None]:
    """Return the positions of the columns image, label, split and group; None for a split or group that is not there.

    Raises:
        InputError: A column is missing, or there are two of that name.
    """
    if len(header) == 1 and (found := [name for mark, name in SEPARATORS.items() if mark in header[0]]):
        raise InputError(f"{table}: expected columns separated by commas, received {found[0]}")
    if "group" in header and group is None:
        console.log("prepare: the column group is not used: data.group: group keeps each of its groups in one role")
    chosen: list[int | None] = []
    for key, name in columns:
        count = header.count(name or key)
        if count == 1:
            chosen.append(list(header).index(name or key))
        elif count == 0 and key == "split" and name is None:
            chosen.append(None)
        else:
            received = ", ".join(repr(column) for column in header) or "no header"
            raise InputError(f"data.columns.{key}: expected one column {name or key!r} in {table}, received {received}")
    if group is not None and header.count(group) != 1:
        raise InputError(
            f"data.group: expected one column {group!r} in {table}, received {', '.join(map(repr, header))}"
        )
    return [*chosen, None if group is None else list(header).index(group)]


def _row(table: Path, where: str, cells: Sequence[Any]) -> Row:
    """Check the values of image, label, split and group, which Parquet holds in any type.

    A label is its text, without blanks around it and without the fraction of a whole number: of `1.0` it is `1`.
    """
    image, label, split, group = cells
    label, group = _whole(label), _whole(group)
    texts = (("image", image, str), ("label", label, str | int | float), ("split", split, str))
    for key, value, types in (*texts, ("group", group, str | int | float)):
        if not isinstance(value, types | None):
            kind = type(value).__name__
            raise InputError(f"{table}: {where}: expected text in the column of {key}, received a value of type {kind}")
    text = "" if label is None else re.sub(r"^([+-]?[0-9]+)\.0*$", r"\1", str(label).strip())
    if text.casefold() in NO_CLASS:
        raise InputError(
            f"{table}: {where}: expected a label, or an empty one where it is not known, received {text!r}"
        )
    named = None if group is None else str(group).strip()
    return Row(where, image or "", text, split if split is None else split.strip(), named)


def _whole(cell: Any) -> Any:
    """A number as it is meant: Parquet has floats for integers where some are missing, which then are no numbers."""
    if not isinstance(cell, float):
        return cell
    return "" if math.isnan(cell) else int(cell) if cell.is_integer() else cell
