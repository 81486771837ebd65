"""One picture: checks it, turns it upright and converts it to an encoding that records hold."""

from __future__ import annotations

import hashlib
import io
import warnings
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps, UnidentifiedImageError

_ORIENTATION = 0x0112  # the EXIF tag

_PNG_BIT_DEPTH = 24  # offset of that byte in a PNG file


class BrokenImageError(Exception):
    """An image cannot be decoded. The message, which dataset.json records, says why."""


class Picture(NamedTuple):
    """A picture as the records hold it.

    Attributes:
        encoded: A PNG or JPEG that TensorFlow decodes to this picture.
        height: In pixels.
        width: In pixels.
        digest: 16 bytes, equal for equal pixels before any resizing.
    """

    encoded: bytes
    height: int
    width: int
    digest: bytes


def read_picture(image: bytes, size: int | None = None) -> Picture:
    """Decode an image completely with Pillow, and encode it again only if TensorFlow would decode it differently.

    The picture is RGB, upright according to its EXIF orientation and without its alpha channel. An animation gives
    its first frame, and 16-bit values are reduced to their upper 8 bits.

    Args:
        image: The bytes of a file in any format that Pillow reads.
        size: Side in pixels of a square to resize to, bicubically. None keeps the size.

    Raises:
        BrokenImageError: It is not an image, is damaged, or is so large that Pillow suspects a decompression bomb.
    """
    if not image:
        raise BrokenImageError("no bytes could be read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image)) as opened:
                opened.load()
                unchanged = _tensorflow_agrees(opened, image)
                rgb = _to_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        unknown = isinstance(error, UnidentifiedImageError)  # its message contains an address in memory
        reason = "it is of no format that Pillow knows" if unknown else str(error) or type(error).__name__
        raise BrokenImageError(reason) from None
    digest = hashlib.blake2b(repr(rgb.size).encode() + rgb.tobytes(), digest_size=16).digest()
    if size is not None and rgb.size != (size, size):
        rgb, unchanged = rgb.resize((size, size), Image.Resampling.BICUBIC), False
    encoded = image if unchanged and _tensorflow_decodes(image, rgb.size) else to_png(rgb)
    return Picture(encoded, rgb.height, rgb.width, digest)


def to_png(image: Image.Image) -> bytes:
    """Encode a Pillow image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _tensorflow_agrees(image: Image.Image, encoded: bytes) -> bool:
    """Whether TensorFlow decodes these bytes to the same RGB pixels as `_to_rgb`, if it can decode them at all."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return False
    if image.format in {"JPEG", "MPO"}:  # MPO, from phones and cameras, is a JPEG followed by more images
        return image.mode in {"L", "RGB"}
    plain = image.mode in {"1", "L", "LA", "P", "RGB", "RGBA"} and "transparency" not in image.info
    return image.format == "PNG" and plain and encoded[_PNG_BIT_DEPTH] <= 8


def _tensorflow_decodes(encoded: bytes, size: tuple[int, int]) -> bool:
    """Whether TensorFlow can decode the image.

    Pillow tolerates damage, such as a PNG without its end, that would stop TensorFlow during training.
    """
    try:
        height, width, _ = tf.io.decode_image(encoded, channels=3, expand_animations=False).shape
    except tf.errors.InvalidArgumentError:
        return False
    return (width, height) == size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")  # Pillow itself would clip
    if image.mode in {"I", "F"}:
        raise BrokenImageError(f"its numbers (Pillow's mode {image.mode}) have no known range")
    return image.convert("RGB")
