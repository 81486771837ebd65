"""Which files below a folder are pictures. Every other file is counted, by reason and suffix."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from flatmin import images
from flatmin.common.errors import InputError
from flatmin.common.params import Links
from flatmin.images import BrokenImageError

# What file managers, archives and network storage leave behind. Names that begin with a dot are hidden anyway.
SYSTEM = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information")
)

# How the files of the formats begin that are read under a name without a suffix.
SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM....\0\0\0\0|II\*\0|MM\0\*"
    rb"|RIFF....WEBP|....ftypavi[fs]|\0\0\0\x0cjP  ",
    re.DOTALL,
)

# The path of a file in the cache of DVC 3, or in that of earlier ones.
_DVC_CACHE = re.compile(r"/(files/md5|\.dvc/cache)/[0-9a-f]{2}/[0-9a-f]{30}\Z")

Above = tuple[tuple[int, int], ...]  # the device and inode of each folder above another one

REASONS = {"suffix": "", "hidden": "hidden or system", "no_file": "no file", "loop": "links in a loop"}
MAX_LISTED = 10


class Listing:
    """The pictures below a folder.

    Attributes:
        files: Their paths relative to the folder, with forward slashes, sorted.
        folders: The folders one or two levels below it that are not hidden, sorted.
        linked: Whether some of them are reached by symbolic links.
        ignored: How many other files there are, for each key of `REASONS` by suffix (`none` if a name has none).
    """

    def __init__(self, root: Path, links: Links) -> None:
        """Walk through the folder.

        Raises:
            InputError: A folder cannot be read, a link is not allowed, or the name of a picture is not valid UTF-8.
        """
        self.files: list[str] = []
        self.folders: list[str] = []
        self.linked = False
        self._ignored: dict[str, Counter[str]] = {reason: Counter() for reason in REASONS}
        self._root, self._links = str(root), links
        self._real_root = os.path.realpath(root)
        # Each with the folders above it, by which a loop of links is known, and whether it is hidden.
        pending: list[tuple[str, Above, bool]] = [("", (_identity(self._root),), False)]
        while pending:
            folder, above, hidden = pending.pop()
            for entry in self._entries(folder, hidden):
                path = folder + entry.name
                hide = hidden or entry.name.startswith(".") or entry.name.lower() in SYSTEM
                if not _is_folder(entry):
                    self._add_file(entry, path, hide)
                elif self._enters(entry, above, hide):
                    pending.append((path + "/", (*above, _identity(entry.path)), hide))
                    if not hide and path.count("/") < 2:
                        self.folders.append(path)
        self.files.sort()
        self.folders.sort()
        self.ignored = {reason: dict(sorted(counts.items())) for reason, counts in self._ignored.items() if counts}

    def _entries(self, folder: str, hidden: bool) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(f"{self._root}/{folder}") as entries:
                return list(entries)
        except OSError as error:
            if hidden:
                self._ignore("hidden", folder.rstrip("/"))
                return []
            path = f"{self._root}/{folder}"
            received = path if len(path) < 200 else f"{path[:200]}..."
            raise InputError(
                f"data.name: expected folders that can be read, received {received!r}: {error.strerror}"
            ) from None

    def _enters(self, entry: os.DirEntry[str], above: Above, hidden: bool) -> bool:
        """Whether to walk through a folder: not where a hidden link leads, nor where a link leads back to."""
        if entry.is_symlink() and hidden:
            self._ignore("hidden", entry.name)
            return False
        if entry.is_symlink():
            check_link(entry.path, self._real_root, self._links)
            self.linked = True
        if _identity(entry.path) in above:
            self._ignore("loop", entry.name)
            return False
        return True

    def _add_file(self, entry: os.DirEntry[str], path: str, hidden: bool) -> None:
        if hidden:
            self._ignore("hidden", entry.name)
        elif not _is_file_or_missing(entry):
            self._ignore("no_file", entry.name)
        elif not _is_picture(entry):
            self._ignore("suffix", entry.name)
        else:
            if not _is_utf8(path):
                raise InputError(f"data.name: expected names in UTF-8, received {entry.path!r}")
            if entry.is_symlink():
                check_link(entry.path, self._real_root, self._links)
                self.linked = True
            self.files.append(path)

    def _ignore(self, reason: str, name: str) -> None:
        self._ignored[reason][_suffix(name).removeprefix(".") or "none"] += 1


def describe(ignored: Mapping[str, Mapping[str, int]], empty: list[str]) -> str:
    """Return a line that says which files were not read, and which folders hold no picture; "" if there is nothing."""
    parts = []
    counts = Counter(ignored.get("suffix", {}))
    listed = [f"{count} {_in_words(suffix)}" for suffix, count in counts.most_common(MAX_LISTED)]
    if rest := counts.total() - sum(count for _, count in counts.most_common(MAX_LISTED)):
        listed.append(f"{rest} of other suffixes")
    if listed:
        parts.append(", ".join(listed))
    for reason, words in REASONS.items():
        if words and reason in ignored:
            parts.append(f"{sum(ignored[reason].values())} {words}")
    total = sum(sum(by_suffix.values()) for by_suffix in ignored.values())
    lines = [f"{total} file{'s were' if total > 1 else ' was'} not read: {'; '.join(parts)}"] if parts else []
    if empty:
        more = f", ... ({len(empty)})" if len(empty) > MAX_LISTED else ""
        lines.append(f"folders without images: {', '.join(map(_shown, empty[:MAX_LISTED]))}{more}")
    return "; ".join(lines)


def check_link(path: str, real_root: str, links: Links) -> None:
    """Refuse a symbolic link that `data.links` does not allow.

    Args:
        path: The link.
        real_root: The folder of the data, without links.

    Raises:
        InputError: It is not allowed.
    """
    target = os.path.realpath(path)
    if links == "refuse" or (links == "within" and (os.path.isdir(path) or not is_near(target, real_root))):
        refuse_link(path, links, target, real_root)


def refuse_link(path: str, links: Links, target: str, real_root: str) -> NoReturn:
    """Raise InputError for the link `path` to `target`, and say which value of `data.links` reads it."""
    expected = "no symbolic links"
    if links == "within":
        expected = "symbolic links to files within the folder of data.name or in DVC's cache only"
    value = "within" if links == "refuse" and is_near(target, real_root) and not os.path.isdir(target) else "follow"
    raise InputError(
        f"data.links: expected {expected}, as it is {links}, received {path!r}; write data.links: {value} to read it"
    )


def is_near(path: str, folder: str) -> bool:
    """Whether a path lies below a folder or in a DVC cache, to which DVC itself may link. Neither may contain links."""
    return path.startswith(folder.rstrip("/") + "/") or _DVC_CACHE.search(path) is not None


def real_file(path: str) -> str:
    """Return a link's target, or the path itself where that is in a DVC cache, in which equal files are one."""
    target = os.path.realpath(path)
    return path if _DVC_CACHE.search(target) else target


def read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        BrokenImageError: It is missing, no file or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise BrokenImageError("it is a folder" if path.is_dir() else "it is no file")
        return path.read_bytes()
    except FileNotFoundError:
        raise BrokenImageError("it is a link to a missing file" if path.is_symlink() else "it is missing") from None
    except OSError as error:
        raise BrokenImageError(error.strerror or str(error)) from None


def size(path: Path) -> int | str:
    """Return a file's size in bytes, `none` if it is missing or out of reach."""
    try:
        return path.stat().st_size
    except OSError:
        return "none"


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (-1, -1)  # listing it will fail, and say why
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file_or_missing(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link that leads nowhere, which counts as a broken image."""
    try:
        return entry.is_file() or not os.path.exists(entry.path)
    except OSError:  # a link to itself
        return True


def _is_picture(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].rstrip(". ").lower()
    if suffix:
        return suffix in images.suffixes()
    try:
        with open(entry.path, "rb") as file:
            return SIGNATURES.match(file.read(16)) is not None
    except OSError:
        return False


def _suffix(name: str) -> str:
    """Return the suffix for counting, `.other` where what follows the last dot is hardly one."""
    suffix = os.path.splitext(name)[1].rstrip(". ").lower()
    return suffix if re.fullmatch(r"(\.[a-z0-9_+~-]{1,12})?", suffix) else ".other"


def _in_words(suffix: str) -> str:
    return {"none": "without a suffix", "other": "of odd suffixes"}.get(suffix, f".{suffix}")


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
