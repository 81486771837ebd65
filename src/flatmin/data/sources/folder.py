"""Images in a folder on disk."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data.sources import listing, roles
from flatmin.data.sources.base import ListedSource
from flatmin.data.sources.listing import Listing

# How data for detection or segmentation name the folder of pictures, and those beside it, whose files may be pictures.
PICTURES = frozenset(("images", "image", "imgs", "img", "jpegimages"))
BESIDE = frozenset(
    ("labels", "label", "annotations", "annotation", "masks", "mask", "gt", "segmentationclass", "segmentationobject")
)


class FolderSource(ListedSource):
    """A folder of class folders, or a folder of splits which hold either class folders or unlabelled images.

    If any image lies two or more folders deep, the top-level folders are splits. The classes of all splits are
    combined. Below a split's class folder, images may lie at any depth. They are recognised by their suffix, or by
    their first bytes where the name has none. The version is a digest of the files' names and sizes.
    """

    HAS_CLASS, HAS_NO_CLASS = "in class folders", "outside one"

    def __init__(self, data: Data) -> None:
        self._root = Path(data.name).expanduser()
        if not self._root.is_dir():
            raise InputError(f"data.name: expected a folder, received {data.name!r}")
        listed = Listing(self._root, data.links)
        self.ignored = listed.ignored
        self.empty = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in _without_pictures(listed)]
        if described := listing.describe(self.ignored, self.empty):
            console.log(f"prepare: {described}")
        outside = [file for file in listed.files if "/" not in file]
        if outside or not listed.files:
            received = f"no images in {data.name!r}"
            if outside:
                received = f"{outside[0]!r} outside any class folder ({len(outside)} of {len(listed.files)} images)"
            raise InputError(f"data.name: expected a folder of images for each class, received {received}")
        items = _arrange(listed, data)
        if listed.linked:
            for pairs in items.values():
                _refuse_twice(self._root, [file for file, _ in pairs])
        groups = data.group and {file: _group(file, data.group) for file in listed.files}
        super().__init__(data, _listing_digest(self._root, listed.files), items, groups or None)

    def _read(self, name: str) -> bytes:
        return listing.read_file(self._root / name)


def _group(file: str, pattern: str) -> str:
    """Return the part of a path that is its group: the first bracket of the pattern, or all of what it finds.

    Raises:
        InputError: The pattern is not found in the path.
    """
    found = re.search(pattern, file)
    group = found and found[1 if found.re.groups else 0]
    if not group:
        raise InputError(f"data.group: expected a pattern that finds a group in each path, received none in {file!r}")
    return group


def _without_pictures(listed: Listing) -> list[str]:
    """Return the folders without pictures, among those that would be splits or classes."""
    parts = [file.split("/")[:-1] for file in listed.files]
    depth = 2 if any(len(folders) > 1 for folders in parts) else 1
    full = {"/".join(folders[:level]) for folders in parts for level in range(1, depth + 1)}
    empty = [folder for folder in listed.folders if folder.count("/") < depth and folder not in full]
    # A split's empty class folders are not named where the split itself is empty, nor is an unlabelled split's folder.
    return [folder for folder in empty if folder.rpartition("/")[0] not in empty]


def _arrange(listed: Listing, data: Data) -> dict[str, list[tuple[str, str]]]:
    """Return the files of each split with their classes, "" where there is none.

    Raises:
        InputError: The folders cannot be what the user means by classes and splits.
    """
    files = listed.files
    if all(file.count("/") == 1 for file in files):
        _refuse_pairs({file.split("/")[0] for file in files}, listed, "", data)
        roles.refuse_splits_as_classes(sorted({file.split("/")[0] for file in files}), data.name)
        return {"train": [(file, file.split("/")[0]) for file in files]}
    items: dict[str, list[tuple[str, str]]] = {}
    for file in files:
        split, *classes = file.split("/")[:-1]
        items.setdefault(split, []).append((file, classes[0] if classes else ""))
    names = {split: {name for _, name in pairs if name} for split, pairs in items.items()}
    scored = sorted(roles.scored_splits(data, items))
    tops = scored or list(items)
    if len(tops) > 1 or all(map(roles.resembles_split, names[tops[0]])):  # else classes in a folder of any name
        _refuse_pairs(tops, listed, "", data)
    _refuse_other_than_splits(items, data)
    _refuse_years(items)
    for split in scored:
        _refuse_pairs(names[split], listed, split, data)
        roles.refuse_splits_as_classes(sorted(names[split]), data.name, split)
    return items


def _refuse_pairs(names: Collection[str], listed: Listing, parent: str, data: Data) -> None:
    """Refuse folders which are no classes or splits, but pictures and what is drawn in them.

    Args:
        names: The folders with pictures in the folder `parent`.
    """
    lower = {name.lower() for name in names}
    if lower & PICTURES and lower <= PICTURES | BESIDE:
        inside = f"{parent}/" if parent else ""
        paths = [path.removeprefix(inside) for path in listed.folders if path.startswith(inside)]
        found = [path for path in paths if "/" not in path]
        raise InputError(
            f"data.name: expected a folder of images for each class, received {', '.join(found[: roles.MAX_LISTED])} in"
            f" {os.path.join(data.name, parent)!r}, as data for detection or segmentation have them; list the images"
            " with one label each in a table (data.source: table)"
        )


def _refuse_years(items: dict[str, list[tuple[str, str]]]) -> None:
    """Refuse classes that are all years, with pictures in folders below them: those are the classes."""
    classes = {name for pairs in items.values() for _, name in pairs if name}
    deeper = next((file for pairs in items.values() for file, _ in pairs if file.count("/") > 2), None)
    if deeper and classes and all(re.fullmatch(r"(19|20)\d\d", name) for name in classes):
        raise InputError(
            f"data.name: expected SPLIT/CLASS/image, received {deeper!r}, whose classes would be"
            f" {', '.join(sorted(classes)[: roles.MAX_LISTED])}: put the folders of years below those of classes"
        )


def _refuse_other_than_splits(items: dict[str, list[tuple[str, str]]], data: Data) -> None:
    """Refuse top-level folders that are splits by their depth alone: no name is usual, and no role names any."""
    expressions = data.splits.model_dump(exclude_none=True).values() if data.splits else ()
    named = any(roles.named_splits(text, items) for text in expressions)
    if named or any(split.lower() in roles.USUAL for split in items):
        return
    found = next(file for pairs in items.values() for file, class_name in pairs if class_name)
    if len(items) == 1:
        write = f"data.name: {Path(data.name) / next(iter(items))}"
    else:
        write = (
            "the names of the splits in data.splits, if these folders are splits; if they are classes, move them into a"
            f" folder train/, in which images may lie deeper (train/{found})"
        )
    tops = ", ".join(list(items)[: roles.MAX_LISTED]) + (", ..." if len(items) > roles.MAX_LISTED else "")
    raise InputError(
        f"data.name: expected CLASS/image or SPLIT/CLASS/image, received {found!r} in {tops}; write {write}"
    )


def _refuse_twice(root: Path, files: Sequence[str]) -> None:
    """Refuse two pictures of a split that are one file, by symbolic links."""
    found: dict[str, str] = {}
    for file in files:
        other = found.setdefault(listing.real_file(f"{root}/{file}"), file)
        if other != file:
            raise InputError(
                f"data.name: expected each image of a split once, received {other!r} and {file!r}, which are one file"
            )


def _listing_digest(root: Path, files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file}\0{listing.size(root / file)}\n".encode())
    return digest.hexdigest()[:16]
