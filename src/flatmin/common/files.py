"""Files that appear complete or not at all, JSON, CSV, and digests."""

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
    """Yield a temporary path for a file or folder, which replaces `path` if the block ends without an error.

    Also removes temporary files left behind by killed processes.

    Raises:
        OSError: as of a full disk, with the name of a file also where the system gives none.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    for existing in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        process = existing.name.split(".")[-2]
        if existing == temporary or not Path("/proc", process).exists():
            _remove(existing)
    try:
        yield temporary
        if path.is_dir() or temporary.is_dir():  # os.replace replaces a file atomically, but not a folder
            _remove(path)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path | str, values: Mapping[str, Any]) -> None:
    """Write nested values as JSON with sorted keys, so that equal values give equal bytes.

    Raises:
        InputError: A number is not finite, which JSON cannot represent.
    """
    _refuse_non_finite(values, str(path))
    with atomic_write(path) as temporary:
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _refuse_non_finite(values: Mapping[Any, Any], where: str) -> None:
    for key, value in values.items():
        if isinstance(value, list | tuple):
            _refuse_non_finite(dict(enumerate(value)), f"{where}: {key}")
        elif isinstance(value, Mapping):
            _refuse_non_finite(value, f"{where}: {key}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: {key}: expected a finite number, received {value}")


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a file of `write_json`.

    Raises:
        InputError: The file does not exist, or does not contain a JSON object.
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


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts, each with its keys joined by dots: `("sam.rho", 0.1)`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def write_csv(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with a header. Lines end with `\\n` on every platform."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_csv(path: Path | str) -> list[dict[str, str]]:
    """Read the rows of a table of `write_csv`, each by column.

    Raises:
        InputError: The file does not exist.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file that an earlier stage wrote, found none") from None


def digest(arrays: Iterable[Any]) -> str:
    """Return the SHA-256, in hexadecimal, of the bytes of contiguous arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(memoryview(array).cast("B"))
    return sha.hexdigest()
