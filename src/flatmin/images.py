"""Reads a picture, and fits it into a square: the one way from a file to the network's input."""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image, ImageOps

Fit = Literal["squash", "crop", "pad"]
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(Exception):
    """A picture cannot be read."""


def read(encoded: bytes, orientation: int | None = None, max_pixels: int = 2**28) -> Image.Image:
    """Decode a picture: RGB, upright."""
    try:
        picture: Image.Image = Image.open(io.BytesIO(encoded))
        if orientation is None:
            return ImageOps.exif_transpose(picture).convert("RGB")
        picture = picture.convert("RGB")
    except OSError as error:
        raise BrokenImageError(str(error)) from error
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def to_square(picture: Image.Image, size: int, fit: Fit) -> Image.Image:
    """Resize to size x size, bilinear with antialiasing."""
    if fit == "crop":
        return ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
    if fit == "pad":
        return ImageOps.pad(picture, (size, size), Image.Resampling.BILINEAR)
    return picture.resize((size, size), Image.Resampling.BILINEAR)
