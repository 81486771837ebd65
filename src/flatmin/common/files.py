"""What the stages tell: errors in one line, files that appear whole, metrics, plots, progress."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flatmin.common.errors import InputError


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a path beside `path` to write a file or folder to; it takes `path`'s place when the block ends well.

    What processes that were killed left there goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if left == aside or not Path("/proc", left.name.split(".")[-2]).exists():
            _remove(left)
    try:
        yield aside
        if path.is_dir() or aside.is_dir():  # else it is replaced at once
            _remove(path)
        os.replace(aside, path)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path | str, values: Mapping[str, Any]) -> None:
    """Write nested `values` with sorted keys, so that equal values give equal bytes.

    Raises:
        InputError: a number is not finite, which JSON can't hold.
    """
    _refuse_non_finite(values, str(path))
    with atomic_write(path) as aside:
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")


def _refuse_non_finite(values: Mapping[Any, Any], where: str) -> None:
    for key, value in values.items():
        if isinstance(value, list | tuple):
            _refuse_non_finite(dict(enumerate(value)), f"{where}: {key}")
        elif isinstance(value, Mapping):
            _refuse_non_finite(value, f"{where}: {key}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: {key}: expected a finite number, received {value}")


def read_json(path: Path | str) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        InputError: there is no such file, or it holds no JSON object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file that an earlier stage wrote, found none") from None
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, received {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, received {type(values).__name__}")
    return values


def write_csv(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with a header; the line ends are `\\n` everywhere."""
    with atomic_write(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def digest(arrays: Iterable[Any]) -> str:
    """SHA-256, in hexadecimal, over the bytes of contiguous arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(memoryview(array).cast("B"))
    return found.hexdigest()
