"""Pictures that the user names, read as the network sees them."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flatmin import images
from flatmin.common.errors import InputError
from flatmin.data.sources import listing
from flatmin.data.sources.listing import Listing
from flatmin.images import BrokenImageError
from flatmin.inputs import workers
from flatmin.models.classifier import Description

_THREADS = 16  # at most; each holds a decoded picture
_LARGE = 16 * 10**6  # pixels: larger pictures, which take up to 1.5 GB, are decoded one at a time
_large = threading.Lock()


class Picture(NamedTuple):
    """A picture as the network sees it, or why there is none.

    Attributes:
        path: as the user wrote it, or below a folder that he did.
        pixels: uint8 [size, size, 3]; None if it cannot be read.
        reason: why not.
    """

    path: str
    pixels: np.ndarray | None
    reason: str = ""


class _Reading(NamedTuple):
    """The task of reading one picture."""

    path: str
    description: Description

    @property
    def result_bytes(self) -> int:
        return 3 * self.description.image_size**2

    @property
    def working_bytes(self) -> int:
        return 0  # known to the thread alone, which has a limit of its own

    def run(self) -> Picture:
        return read(self.path, self.description)


def read(path: str, description: Description) -> Picture:
    """Read one picture for the network of a description."""
    try:
        encoded = Path(path).read_bytes()
        with images.broken_if_unreadable(), images.open_image(encoded, images.LARGEST) as opened:
            is_large = opened.width * opened.height > _LARGE
        with _large if is_large else nullcontext():
            return Picture(path, description.input_of(images.read(encoded, max_pixels=images.LARGEST)))
    except BrokenImageError as error:
        return Picture(path, None, str(error))
    except OSError as error:
        return Picture(path, None, error.strerror or str(error))


def read_all(paths: Iterable[str], description: Description) -> Iterator[Picture]:
    """Read pictures in threads; give them in order. No more are held than a bounded number of bytes."""
    threads = min(workers.cores(), _THREADS)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, which changes no pixel
        yield from workers.in_order(pool, (_Reading(path, description) for path in paths), threads)


def find(names: Sequence[str]) -> tuple[Iterable[str], int | None]:
    """The paths that a user's words stand for: pictures, folders of pictures, and `-` for lines of standard input.

    What a folder holds besides pictures is told on standard error.

    Returns:
        The paths, and their number; None if it is not known.

    Raises:
        InputError: a folder has no picture, or cannot be read.
    """
    parts = [_in_folder(name) if os.path.isdir(name) else [name] for name in names]
    if "-" not in names:
        return [path for part in parts for path in part], sum(map(len, parts))
    return (path for part in parts for path in (_lines() if part == ["-"] else part)), None


def _in_folder(folder: str) -> list[str]:
    listed = Listing(Path(folder), "follow")
    if told := listing.describe(listed.ignored, []):
        print(f"{folder}: {told}", file=sys.stderr)
    if not listed.files:
        raise InputError(f"{folder}: expected images, received none")
    return [os.path.join(folder, file) for file in listed.files]


def _lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        if path := line.rstrip(b"\r\n"):
            yield os.fsdecode(path)


def shown(path: str) -> str:
    """A path as one line."""
    return path if path.isprintable() else ascii(path)
