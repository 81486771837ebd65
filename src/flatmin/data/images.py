"""One picture on its way into the records: checked, brought to its stored size, without metadata."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from flatmin import images
from flatmin.images import MAX_PIXELS, OWN_SIZE, BrokenImageError, Stored

# A marker of a JPEG file: not a stuffed byte, a restart, or padding.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_END = 0xD9
_NEEDED_SEGMENTS = (0xE0, 0xEE)  # JFIF and Adobe say how colours are stored
_NEEDED_CHUNKS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_BITS_PER_SAMPLE = 258  # the TIFF tag
_QUARTER = 64  # of the range of 8 bits
_PNG_BIT_DEPTH = 24  # offset of that byte in a PNG file


class Picture(NamedTuple):
    """A picture as the records hold it.

    Attributes:
        encoded: a PNG or JPEG without metadata, which `flatmin.images.read` decodes with `orientation`.
        orientation: EXIF's, 1 to 8, which the file came with.
        height, width: in pixels, of the upright picture.
        digest: 16 bytes, equal for equal pixels before any resizing.
        frames: whether the file has more frames or pages than this one.
        dark: whether its 12 or 16 bits use less than a quarter of their range.
    """

    encoded: bytes
    orientation: int
    height: int
    width: int
    digest: bytes
    frames: bool
    dark: bool


def read_picture(encoded: bytes, stored: Stored = OWN_SIZE, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a picture, bring it to its stored size, and encode it without loss.

    A JPEG or an 8-bit PNG that keeps its size keeps its data too, all but metadata.

    Args:
        encoded: the bytes of a file.
        stored: the stored size.
        max_pixels: of the largest picture that is read.

    Raises:
        BrokenImageError: it is not a picture, is damaged, or is too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata, and of a size that max_pixels allows
        with images.broken_if_unreadable(), images.open_image(encoded, max_pixels) as opened:
            kind, deep = opened.format, _bits(opened, encoded) > 8
            opened.load()
            frames = bool(getattr(opened, "is_animated", False))
            orientation = images.file_orientation(opened)
            rgb = images.to_rgb(opened, orientation)
    pixels = rgb.tobytes()
    digest = hashlib.blake2b(repr(rgb.size).encode() + pixels, digest_size=16).digest()
    dark = deep and kind != "PPM" and int(np.frombuffer(pixels, np.uint8).max()) < _QUARTER
    size = stored.size(*rgb.size)
    if size[0] * size[1] > max(max_pixels, rgb.width * rgb.height):
        raise BrokenImageError(
            f"of {rgb.width} x {rgb.height} pixels it would be stored with more than data.max_pixels"
        )
    if size != rgb.size:
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    elif (kept := _without_metadata(encoded, kind, deep)) and _decodes_to(kept, orientation, pixels, max_pixels):
        return Picture(kept, orientation, rgb.height, rgb.width, digest, frames, dark)
    return Picture(to_png(rgb), 1, rgb.height, rgb.width, digest, frames, dark)


def to_png(image: Image.Image) -> bytes:
    """Encode a Pillow image as PNG, without metadata."""
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _bits(image: Image.Image, encoded: bytes) -> int:
    """Bits of each value in the file, of the formats that have more than 8."""
    if image.format == "PNG":
        return encoded[_PNG_BIT_DEPTH]
    if image.format == "TIFF":
        bits: tuple[int, ...] = image.tag_v2.get(_BITS_PER_SAMPLE, (8,))  # type: ignore[attr-defined]
        return max(bits)
    return 16 if image.mode.startswith("I") else 8


def _decodes_to(encoded: bytes, orientation: int, pixels: bytes, max_pixels: int) -> bool:
    try:
        return images.read(encoded, orientation, max_pixels).tobytes() == pixels
    except BrokenImageError:
        return False


def _without_metadata(encoded: bytes, kind: str | None, deep: bool) -> bytes | None:
    """A JPEG or PNG file with what its pixels follow from, and nothing else. None of other formats and damaged files.

    deep: whether it has more than 8 bits a value, which no record keeps.
    """
    if kind in {"JPEG", "MPO"}:
        return _jpeg_without_metadata(encoded)
    if kind == "PNG" and not deep:
        chunks = [chunk for name, chunk in images.png_chunks(encoded) if name in _NEEDED_CHUNKS]
        return encoded[: len(images.PNG)] + b"".join(chunks)
    return None


def _jpeg_without_metadata(encoded: bytes) -> bytes | None:
    """Leave out EXIF data, profiles and comments of a JPEG file, and all that follows its first picture."""
    parts, start = [encoded[:2]], 2
    while found := _MARKER.search(encoded, start):
        parts.append(encoded[start : found.start()])  # a scan's data, after its header; else nothing
        marker, start = encoded[found.start() + 1], found.end()
        if marker == _END:
            return b"".join([*parts, found[0]])
        end = start + int.from_bytes(encoded[start : start + 2], "big")
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or marker in _NEEDED_SEGMENTS:
            parts.append(found[0] + encoded[start:end])
        start = end
    return None
