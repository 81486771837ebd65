"""Folders under `$FLATMIN_CACHE` that can be made again: found by what they depend on, checked, pruned to a limit.

`$FLATMIN_CACHE_LIMIT` is how many bytes views may take in all; conversions for LiteRT, as large as weights, are kept.
Neither variable changes a result.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flatmin.common import files
from flatmin.common.errors import InputError

LIMIT = 50 * 10**9
LONGEST_PAUSE = 60  # seconds
CHECKSUMS = "checksums.json"
LIBRARIES = ("tensorflow", "keras", "numpy", "imgaug", "opencv-python-headless", "pillow", "ai-edge-litert")


def folder() -> Path:
    """`$FLATMIN_CACHE`, else `${XDG_CACHE_HOME:-~/.cache}/flatmin`: what makes a rerun quick and changes no result."""
    given = os.environ.get("FLATMIN_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatmin"


def key(depends_on: Mapping[str, Any], files: Iterable[Path] = (), modules: Iterable[str] = ("*",)) -> str:
    """24 hexadecimal digits that differ where a result may.

    Args:
        depends_on: what JSON can hold.
        files: whose bytes count.
        modules: names or patterns of this package's modules whose code counts. The libraries' versions always do.
    """
    digest = hashlib.sha256(json.dumps([depends_on, _versions()], sort_keys=True).encode())
    package = Path(__file__).parent
    code = sorted({path for module in modules for path in package.glob(f"{module}.py")})
    for path in [*code, *files]:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


@cache
def _versions() -> dict[str, str]:
    return {library: version(library) for library in LIBRARIES}


class Entry:
    """One folder, whole and checked, that nobody prunes while this process holds it.

    Two processes that want the same entry at the same time make it once.
    """

    def __init__(self, kind: str, digest: str, make: Callable[[Path], None]) -> None:
        """Find the entry, or let `make` fill an empty folder that becomes it.

        Raises:
            InputError: the cache's folder can't be written to.
        """
        self.folder = folder() / kind / digest
        self._lock = _lock_file(self.folder)
        try:
            self._hold(make)
        except BaseException:
            self.close()
            raise

    def _hold(self, make: Callable[[Path], None]) -> None:
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        pause = 0.1
        while not _intact(self.folder):
            try:  # not waiting: who has made it holds a shared lock for long
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another makes it; the shared lock is lost all the same
                time.sleep(pause)
                # Ever longer: two that read a large broken one in turns would keep each other from making it.
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                if not _intact(self.folder):
                    self._fill(make)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        os.utime(self.folder)  # the most recently used

    def _fill(self, make: Callable[[Path], None]) -> None:
        for left in (self.folder, *_parts(self.folder)):
            shutil.rmtree(left, ignore_errors=True)
        with files.atomic_write(self.folder) as aside:
            aside.mkdir()
            make(aside)
            paths = sorted(aside.iterdir())
            files.write_json(aside / CHECKSUMS, {path.name: files.sha256(path) for path in paths})

    def close(self) -> None:
        """Let others prune it."""
        os.close(self._lock)


def exists(kind: str, digest: str) -> bool:
    """Whether there is such an entry. It may be broken, which `Entry` finds."""
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
    """Whether every file is there with the checksum that it was written with."""
    try:
        checksums = json.loads((entry / CHECKSUMS).read_text(encoding="utf-8"))
        return bool(checksums) and all(files.sha256(entry / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _parts(entry: Path) -> Iterator[Path]:
    """What a killed process left of it, half-written."""
    return entry.parent.glob(f".{entry.name}.*.part")


def make_room(kind: str, needed: int) -> None:
    """Remove the entries of `kind` that were used longest ago, but none in use, until `needed` more bytes fit.

    Raises:
        InputError: they don't fit all the same, below the limit or on the disk.
    """
    root = folder() / kind
    root.mkdir(parents=True, exist_ok=True)
    limit = _limit()
    in_use = 0
    if needed <= min(limit, _used(root) + _free(root)):  # else nothing is removed in vain
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
    found = 0
    for entry in root.iterdir():
        with suppress(FileNotFoundError, NotADirectoryError):  # another process removes or renames it meanwhile; a lock
            found += sum(path.stat().st_size for path in entry.iterdir())
    return found


def _free(root: Path) -> int:
    return shutil.disk_usage(root).free


def _remove_unused(lock: Path) -> None:
    with lock.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        entry = lock.with_suffix("")
        for left in (entry, *_parts(entry)):
            shutil.rmtree(left, ignore_errors=True)
