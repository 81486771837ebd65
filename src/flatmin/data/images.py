"""Reads one picture: checks it, turns it upright and converts it to what records hold."""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_ORIENTATION = 0x0112  # the EXIF tag

_PNG_BIT_DEPTH = 24  # that byte of a PNG file


class BrokenImageError(Exception):
    """An image can't be decoded; the message says why."""


class Picture(NamedTuple):
    """encoded: a PNG or JPEG that TensorFlow reads as this picture. height, width: its size in pixels.

    digest: 16 bytes, equal for equal pixels as they came, before any resizing.
    """

    encoded: bytes
    height: int
    width: int
    digest: bytes


def read_picture(image: bytes, size: int | None = None) -> Picture:
    """Decode all of an image with Pillow; encode it anew only where TensorFlow would read it otherwise.

    It is seen in RGB, upright as EXIF has it, without its alpha channel; of several frames the first, of 16
    bits the upper 8.

    Args:
        image: the bytes of a file of any format that Pillow reads.
        size: the side in pixels of a square to resize to, bicubically.

    Raises:
        BrokenImageError: it is no image, or damaged, or so large that Pillow takes it for an attack.
    """
    if not image:
        raise BrokenImageError("no bytes could be read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image)) as opened:
                opened.load()
                as_it_came = _tensorflow_agrees(opened, image)
                rgb = _to_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's readers raise nearly anything when the file is damaged
        unknown = isinstance(error, UnidentifiedImageError)  # its message is an address in memory
        reason = "it is of no format that Pillow knows" if unknown else str(error) or type(error).__name__
        raise BrokenImageError(reason) from None
    digest = hashlib.blake2b(repr(rgb.size).encode() + rgb.tobytes(), digest_size=16).digest()
    if size is not None and rgb.size != (size, size):
        rgb, as_it_came = rgb.resize((size, size), Image.Resampling.BICUBIC), False
    encoded = image if as_it_came and _tensorflow_reads(image, rgb.size) else to_png(rgb)
    return Picture(encoded, rgb.height, rgb.width, digest)


def _tensorflow_agrees(image: Image.Image, encoded: bytes) -> bool:
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return False
    if image.format in {"JPEG", "MPO"}:  # MPO, of phones and cameras, is a JPEG with more behind it
        return image.mode in {"L", "RGB"}
    plain = image.mode in {"1", "L", "LA", "P", "RGB", "RGBA"} and "transparency" not in image.info
    return image.format == "PNG" and plain and encoded[_PNG_BIT_DEPTH] <= 8


def _tensorflow_reads(encoded: bytes, size: tuple[int, int]) -> bool:
    """Pillow forgives damage, such as a PNG's missing end, that would stop TensorFlow while it trains."""
    import tensorflow as tf

    try:
        height, width, _ = tf.io.decode_image(encoded, channels=3, expand_animations=False).shape
    except tf.errors.InvalidArgumentError:
        return False
    return (width, height) == size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")  # Pillow's own would clip
    if image.mode in {"I", "F"}:
        raise BrokenImageError(f"its numbers (Pillow's mode {image.mode}) have no known range")
    return image.convert("RGB")


def to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
