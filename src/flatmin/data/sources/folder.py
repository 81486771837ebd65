"""Images in a folder on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from flatmin.common.errors import InputError
from flatmin.data.sources.base import UNKNOWN, ListedSource

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)


class FolderSource(ListedSource):
    """A folder of class folders, or a folder of splits which hold either class folders or unlabelled images.

    If any image lies two or more folders deep, the top-level folders are splits. The classes of all splits are combined
    and sorted. Images may lie at any depth below their class folder; they are recognised by their suffix,
    and hidden files and folders are ignored. The version is a digest of the files' names and sizes.
    """

    def __init__(self, name: str, seed: int) -> None:
        self._root = Path(name).expanduser()
        if not self._root.is_dir():
            raise InputError(f"data.name: expected a folder, received {name!r}")
        files = sorted(_find_images(self._root))
        outside = [file for file in files if "/" not in file]
        if outside or not files:
            received = f"{outside[0]!r} outside any class folder" if outside else f"no images in {name!r}"
            raise InputError(f"data.name: expected a folder of images for each class, received {received}")
        if all(file.count("/") == 1 for file in files):
            located = [("train", file.split("/")[0], file) for file in files]
        else:
            located = [_split_and_class(file) for file in files]
        class_names = sorted({class_name for _, class_name, _ in located if class_name})
        labels = {class_name: label for label, class_name in enumerate(class_names)}
        items: dict[str, list[tuple[str, int]]] = {}
        for split, class_name, file in located:
            items.setdefault(split, []).append((file, labels.get(class_name, UNKNOWN)))
        _refuse_partly_labelled(items)
        super().__init__(class_names, _listing_digest(self._root, files), items, seed)

    def _read(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError:
            return b""  # treated like an empty file: a broken image, which is reported and counted on decoding


def _split_and_class(file: str) -> tuple[str, str, str]:
    """Return (split, class or "", file) of `split/class/.../file` or `split/file`."""
    split, *classes = file.split("/")[:-1]
    return split, classes[0] if classes else "", file


def _refuse_partly_labelled(items: Mapping[str, Sequence[tuple[str, int]]]) -> None:
    for split, pairs in items.items():
        unlabelled = [file for file, label in pairs if label == UNKNOWN]
        if 0 < len(unlabelled) < len(pairs):
            raise InputError(
                f"data.name: expected all or none of the images of {split!r} in class folders,"
                f" received {unlabelled[0]!r} outside one"
            )


def _find_images(root: Path) -> Iterator[str]:
    """Yield the paths of the images below `root`, relative to it, with forward slashes.

    Raises:
        InputError: A symbolic link leads out of `root`, which is hardly ever intended, or to a folder; or a name is
            not valid UTF-8.
    """
    resolved_root = root.resolve()
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise InputError(f"data.name: expected no symbolic links to folders, received {Path(folder) / name}")
        for name in files:
            path = Path(folder) / name
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(resolved_root):
                raise InputError(f"data.name: expected symbolic links to files within {root}, received {path}")
            if not _is_utf8(name) or not _is_utf8(folder):
                raise InputError(f"data.name: expected names in UTF-8, received {str(path)!r}")
            # A dangling link counts as a broken image; pipes and sockets are ignored.
            if path.is_file() or not path.exists():
                yield path.relative_to(root).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listing_digest(root: Path, files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        path = root / file
        digest.update(f"{file}\0{path.stat().st_size if path.exists() else 'none'}\n".encode())
    return digest.hexdigest()[:16]
