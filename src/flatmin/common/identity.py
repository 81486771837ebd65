"""The identity of results: a version that is raised on purpose, and the source that was accepted for it.

Cache keys hold RESULTS_VERSION instead of the source's bytes, so that a rename orphans nothing. Source that differs
from what `accepted.json` lists adds its digest, so that an unfinished edit never meets a cache of other code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flatmin.common import console, files
from flatmin.common.errors import InputError

# Raise it when numbers change on purpose, and at no other time; then run `make golden` and `dvc repro`.
RESULTS_VERSION = 3

PACKAGE = Path(__file__).parents[1]
# Tracked by git. A package that is installed outside its checkout has none: then no source counts as accepted.
ACCEPTED = PACKAGE.parents[1] / "accepted.json"


def rooms() -> list[str]:
    """The names of the folders and modules at the top of the package, but `__init__.py`, which holds no code."""
    names = (path.name for path in PACKAGE.iterdir() if not path.name.startswith(("_", ".")))
    return sorted(name for name in names if source_files(PACKAGE / name))


def source_files(path: Path) -> list[Path]:
    """The Python files in a folder and below, sorted, or the file itself. Hidden files are editors', not source."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*.py") if not file.name.startswith("."))
    return [path] if path.suffix == ".py" and path.is_file() else []


def source_digest(room: str) -> str:
    """SHA-256 over the names and contents of a room's files, as this process first read them.

    Args:
        room: such as `inputs` or `runtime.py`.

    Raises:
        ValueError: the package has no such room. A key over nothing would match every version of the code.
    """
    path = PACKAGE / room
    if path not in _first_read:
        _first_read[path] = _digest(path)
    return _first_read[path]


_first_read: dict[Path, str] = {}


def _digest(room: Path) -> str:
    paths = source_files(room)
    if not paths:
        raise ValueError(f"{room}: expected a folder or module with Python source, found none")
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(room.parent).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def check_source_unchanged() -> None:
    """Check that every room whose digest this process took still has it: what was computed since is that source's.

    Raises:
        InputError: one of them was edited meanwhile.
    """
    for path, digest in _first_read.items():
        if not source_files(path) or _digest(path) != digest:
            raise InputError(f"{path}: edited while its code ran; run it again")


def source_identity(rooms: Iterable[str]) -> dict[str, Any]:
    """The source's part of a cache key: RESULTS_VERSION, and the digests of those rooms that are not accepted.

    Raises:
        InputError: accepted.json is damaged.
        ValueError: the package has no such room.
    """
    version, accepted = read_accepted()
    digests = {room: source_digest(room) for room in rooms}
    if version == RESULTS_VERSION:
        digests = {room: digest for room, digest in digests.items() if accepted.get(room) != digest}
    return {"results_version": RESULTS_VERSION, "unaccepted": digests}


def read_accepted() -> tuple[int | None, dict[str, str]]:
    """The RESULTS_VERSION for which source was last accepted, and each room's digest then; None if none ever was.

    Raises:
        InputError: the file is damaged, as by a merge.
    """
    if not ACCEPTED.exists():
        return None, {}
    values = files.read_json(ACCEPTED)
    version, source = values.get("results_version"), values.get("source")
    if not isinstance(version, int) or not isinstance(source, dict):
        raise InputError(f"{ACCEPTED}: expected results_version and source, as `make golden` writes them")
    return version, source


def write_accepted() -> None:
    """List the source as it stands as accepted: its numbers are those of RESULTS_VERSION, as a test has just shown."""
    source = {room: source_digest(room) for room in rooms()}
    files.write_json(ACCEPTED, {"results_version": RESULTS_VERSION, "source": source})
    console.log(f"{ACCEPTED.name}: the source as it stands is accepted, for RESULTS_VERSION {RESULTS_VERSION}")
