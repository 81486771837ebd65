"""A cache of folders on disk that can be computed again: found by a key, verified by checksums, pruned to a limit.

`$FLATMIN_CACHE_LIMIT` is the number of bytes that cached activations may take in all. Conversions for LiteRT, which are
as large as weights, are never pruned. Neither variable changes a result.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flatmin.common import identity
from flatmin.common.errors import InputError
from flatmin.common.files import atomic_write, sha256, write_json

LIMIT = 50 * 10**9  # bytes
LONGEST_PAUSE = 60  # seconds
CHECKSUMS = "checksums.json"
LIBRARIES = ("tensorflow", "keras", "numpy", "imgaug", "opencv-python-headless", "pillow", "ai-edge-litert")

# The parts of the package whose source decides what an entry holds: what the code that makes it imports.
ENGINE_ROOMS = ("common", "features", "models", "runtime.py")
ACTIVATION_ROOMS = (*ENGINE_ROOMS, "images.py", "inputs")
TRAINING_ROOMS = (*ACTIVATION_ROOMS, "training")


def folder() -> Path:
    """The cache's folder: `$FLATMIN_CACHE`, else `${XDG_CACHE_HOME:-~/.cache}/flatmin`. It changes no result."""
    given = os.environ.get("FLATMIN_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatmin"


def key(depends_on: Mapping[str, Any], *, files: Iterable[Path] = (), rooms: Iterable[str]) -> str:
    """The key of an entry: 24 hexadecimal digits that differ wherever the entry may.

    RESULTS_VERSION and the versions of the libraries are always part of it.

    Args:
        depends_on: whatever else the entry depends on, as JSON can hold it.
        files: files whose names and contents the entry depends on.
        rooms: parts of the package that compute the entry; the source of those that are not accepted is part of it.

    Raises:
        ValueError: the package has no such part.
    """
    content = [depends_on, _versions(), identity.source_identity(rooms)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for path in files:
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()[:24]


@cache
def _versions() -> dict[str, str]:
    return {library: version(library) for library in LIBRARIES}


class Entry:
    """A folder of the cache, which nobody prunes while this process holds it. `open_entry` makes it complete.

    Raises:
        InputError: the cache's folder can't be written to.
    """

    def __init__(self, kind: str, digest: str) -> None:
        self.folder = folder() / kind / digest
        self._lock = _lock_file(self.folder)

    def hold(self, make: Callable[[Path], None]) -> None:
        """Lock the entry against pruning once it is there and intact; make it if it is not."""
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        pause = 0.1
        while not _intact(self.folder):
            try:  # without waiting: the process that made the entry may hold its shared lock for hours
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process makes it; the attempt has released our shared lock all the same
                time.sleep(pause)
                # Longer each time: two processes that verify a large broken entry in turns would block each other.
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if not _intact(self.folder):
                    self._fill(make)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        os.utime(self.folder)  # it is now the most recently used

    def _fill(self, make: Callable[[Path], None]) -> None:
        _remove(self.folder)
        with atomic_write(self.folder) as temporary:
            temporary.mkdir()
            make(temporary)
            identity.check_source_unchanged()  # else the entry might not be what its key says
            write_json(temporary / CHECKSUMS, {path.name: sha256(path) for path in sorted(temporary.iterdir())})

    def close(self) -> None:
        """Release the entry, so that others may prune it."""
        os.close(self._lock)


def open_entry(kind: str, digest: str, make: Callable[[Path], None]) -> Entry:
    """Open an entry that is there and intact, or make it, which may take minutes.

    Two processes that ask for the same entry at the same time make it once.

    Args:
        kind: the folder of the cache that holds all entries of this kind.
        digest: the entry's key.
        make: fills the empty folder that it is given, which then becomes the entry.

    Raises:
        InputError: the cache's folder can't be written to, or the source was edited while `make` ran.
    """
    entry = Entry(kind, digest)
    try:
        entry.hold(make)
    except BaseException:
        entry.close()
        raise
    return entry


def exists(kind: str, digest: str) -> bool:
    """Whether there is such an entry. It may be broken, which opening it shows."""
    return (folder() / kind / digest / CHECKSUMS).is_file()


def _lock_file(entry: Path) -> int:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        return os.open(entry.with_name(f"{entry.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(
            f"$FLATMIN_CACHE: expected a folder to write to, received {entry.parent}: {error.strerror}"
        ) from None


def _intact(entry: Path) -> bool:
    """Whether every file is there, with the checksum that it had when it was written."""
    try:
        checksums = json.loads((entry / CHECKSUMS).read_text(encoding="utf-8"))
        return bool(checksums) and all(sha256(entry / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _remove(entry: Path) -> None:
    """Remove an entry, and what a killed process left of it half-written."""
    for path in (entry, *entry.parent.glob(f".{entry.name}.*.part")):
        shutil.rmtree(path, ignore_errors=True)


def make_room(kind: str, needed: int) -> None:
    """Remove the least recently used entries of `kind`, but none in use, until `needed` more bytes fit.

    Raises:
        InputError: they can't fit, within the limit or on the disk.
    """
    root = folder() / kind
    root.mkdir(parents=True, exist_ok=True)
    limit = _limit()
    in_use = 0
    if needed <= min(limit, _used(root) + _free(root)):  # otherwise removing would be in vain
        _remove_oldest(root, limit, needed)
        in_use = _used(root)
    if in_use + needed > limit:
        raise InputError(
            f"$FLATMIN_CACHE_LIMIT: expected at least {in_use + needed} bytes ({needed} for this, {in_use} in use), "
            f"received {limit}"
        )
    if needed > _free(root):
        raise InputError(f"$FLATMIN_CACHE: expected {needed} bytes free in {root}, received {_free(root)}")


def _remove_oldest(root: Path, limit: int, needed: int) -> None:
    for lock in sorted(root.glob("*.lock"), key=_last_use):
        if _used(root) + needed <= limit and needed <= _free(root):
            return
        _remove_unused(lock)


def _limit() -> int:
    given = os.environ.get("FLATMIN_CACHE_LIMIT")
    if given is None:
        return LIMIT
    if not given.isdecimal():
        raise InputError(f"$FLATMIN_CACHE_LIMIT: expected a number of bytes, received {given[:50]!r}")
    return int(given)


def _last_use(lock: Path) -> float:
    with suppress(FileNotFoundError):
        return lock.with_suffix("").stat().st_mtime
    return 0.0


def _used(root: Path) -> int:
    """The bytes that the entries under `root` take."""
    size = 0
    for entry in root.iterdir():
        # Not found: another process removes or renames it meanwhile. Not a directory: a lock.
        with suppress(FileNotFoundError, NotADirectoryError):
            size += sum(path.stat().st_size for path in entry.iterdir())
    return size


def _free(root: Path) -> int:
    return shutil.disk_usage(root).free


def _remove_unused(lock: Path) -> None:
    with lock.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _remove(lock.with_suffix(""))
