"""The one way from a file to the pixels that a network sees: for prepare, training, evaluate and every later use.

`read` gives a picture as a person sees it, `Stored.resize` brings it to the size in which it is stored, `to_square`
fits it to the network's input. All are Pillow's own arithmetic, so another program gets the same pixels: open the
file, apply its orientation, convert it to RGB, resize it twice.
"""

from __future__ import annotations

import ctypes
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError, _imaging

Fit = Literal["squash", "crop", "pad"]

LARGEST = 178_956_970  # pixels: Pillow itself refuses pictures of more
MAX_PIXELS = 120_000_000  # a little more than the 108 million of a phone's
PAD = 128  # the value of the border that the fit `pad` adds, as of augmentation's
ORIENTATION = 0x0112  # the EXIF tag

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how its files begin
# Tags of TIFF, and the values of them that Pillow does not heed.
_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _PLANES, _SAMPLE_FORMAT = 258, 259, 262, 284, 339
_NOT_COMPRESSED, _WHITE_IS_ZERO, _SEPARATE, _SIGNED = 1, 0, 2, 2

# What Pillow reads by starting another program, or only names.
_NOT_READ = frozenset(("EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"))
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = frozenset((b"iCCP", b"iTXt", b"tEXt", b"zTXt"))
_WITH_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # the text that Pillow finds an orientation in
_opening = threading.Lock()


class BrokenImageError(Exception):
    """A picture cannot be read. The message says why."""


class Stored(NamedTuple):
    """How large pictures are stored, which decides with `to_square` what the network sees of them.

    Attributes:
        side: pixels of the shorter side; None keeps each picture's size.
        enlarge: whether smaller pictures are enlarged.
    """

    side: int | None = None
    enlarge: bool = True

    @classmethod
    def by_setting(cls, image_size: int | str, largest: int | None) -> Stored:
        """The stored size that `data.image_size` asks for; `largest` is the side that `auto` stands for."""
        if image_size == "auto":
            return cls(largest, enlarge=False)
        return cls(None if image_size == "original" else int(image_size))

    def describe(self) -> str:
        """One line."""
        if self.side is None:
            return "images are stored in their own size"
        if self.enlarge:
            return f"images are stored with a shorter side of {self.side} pixels"
        return f"images are stored with a shorter side of at most {self.side} pixels, the largest network input"

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The stored width and height, which keep the proportions."""
        shorter = min(width, height)
        if self.side is None or self.side == shorter or (self.side > shorter and not self.enlarge):
            return width, height
        return max(1, round(width * self.side / shorter)), max(1, round(height * self.side / shorter))

    def resize(self, picture: Image.Image) -> Image.Image:
        """Bring an RGB picture to its stored size, bicubically, with antialiasing where it shrinks."""
        size = self.size(*picture.size)
        if size == picture.size:
            return picture
        if size[0] * size[1] > LARGEST:
            raise BrokenImageError(f"of {picture.width} x {picture.height} pixels it would get {size[0]} x {size[1]}")
        return picture.resize(size, Image.Resampling.BICUBIC)


OWN_SIZE = Stored()


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read: all that it decodes by itself."""
    Image.init()
    _silence()
    return tuple(sorted(set(Image.OPEN) - _NOT_READ))


def _silence() -> None:
    """Keep Pillow and its TIFF library from writing to standard error, beside the errors that are raised anyway."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    library = ctypes.CDLL(_imaging.__file__)  # which finds the symbols of those that it is linked with
    if hasattr(library, "TIFFSetErrorHandler"):
        library.TIFFSetErrorHandler(None)


@cache
def suffixes() -> frozenset[str]:
    """The suffixes of the formats that are read, such as `.jpg`, in lower case."""
    known = (*formats(), "MPO")  # from phones and cameras: a JPEG followed by more pictures
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def read(encoded: bytes, orientation: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture completely: RGB, upright, its first frame, without its alpha channel.

    16-bit values are reduced to their upper 8 bits. Colour profiles are not applied. Pillow may warn of odd metadata.

    Args:
        encoded: the bytes of a file in any of `formats()`.
        orientation: EXIF's, 1 to 8, in place of the file's own; None takes that.
        max_pixels: of the largest picture that is decoded.

    Raises:
        BrokenImageError: it is not a picture, is damaged, or is too large.
    """
    with broken_if_unreadable(), open_image(encoded, max_pixels) as opened:
        opened.load()
        return to_rgb(opened, file_orientation(opened) if orientation is None else orientation)


def to_square(picture: Image.Image, size: int, fit: Fit) -> Image.Image:
    """Resize a picture to size x size pixels, bilinearly, with antialiasing where it shrinks.

    Args:
        picture: RGB.
        size: height and width of the network's input.
        fit: `squash` changes the proportions, `crop` takes the largest square in the middle, `pad` adds grey borders.
    """
    if picture.size == (size, size):
        return picture
    box: tuple[float, float, float, float] | None = None
    if fit == "pad":
        return _pad(picture, size)
    if fit == "crop":
        side = min(picture.size)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BILINEAR, box)


def _pad(picture: Image.Image, size: int) -> Image.Image:
    """Do what Pillow's `ImageOps.pad` does, which leaves out a picture that would get thinner than a pixel."""
    width, height = (max(1, round(side / max(picture.size) * size)) for side in picture.size)
    square = Image.new("RGB", (size, size), (PAD, PAD, PAD))
    place = round((size - width) * 0.5), round((size - height) * 0.5)
    square.paste(picture.resize((width, height), Image.Resampling.BILINEAR), place)
    return square


def open_image(encoded: bytes, max_pixels: int) -> Image.Image:
    """Open a picture without decoding it, whose size is checked before anything is.

    Raises:
        BrokenImageError: it has more than `max_pixels`.
        Exception: almost any, from Pillow's readers of damaged files.
    """
    if not encoded:
        raise BrokenImageError("it is empty")
    with _opening, warnings.catch_warnings():  # which sets filters of the whole process
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides
        try:
            image = Image.open(io.BytesIO(_without_text(encoded, _WITH_ORIENTATION)), formats=formats())
        except UnidentifiedImageError:
            if not encoded.startswith(_TIFF):
                raise
            raise BrokenImageError("it is a TIFF file that is damaged or whose kind of pixels is not read") from None
        except ValueError:  # such text can be too long, too
            image = Image.open(io.BytesIO(_without_text(encoded, ())), formats=formats())
    if image.width * image.height > max_pixels:
        image.close()
        raise BrokenImageError(
            f"it has {image.width * image.height} pixels, and data.max_pixels, which can be set, allows {max_pixels}"
        )
    return image


def file_orientation(image: Image.Image) -> int:
    """EXIF's orientation of an opened picture, 1 to 8; 1 where it has none, or one that is none."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF data can be damaged in any way, and the pixels be whole
        return 1
    return int(orientation) if orientation in _TURNS else 1  # a file may have it as a fraction


def to_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Convert a decoded picture to RGB and turn it upright.

    Raises:
        BrokenImageError: its numbers have no known range, or are not where Pillow looks for them.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise BrokenImageError(f"its numbers (Pillow's mode {image.mode}) have no known range")
    if image.format == "FITS" and image.mode.startswith("I"):
        raise BrokenImageError("its numbers (FITS of 16 bits) have no known range")
    if _tiff_tag(image, _SAMPLE_FORMAT) == _SIGNED:
        raise BrokenImageError("its numbers are signed, and have no known range")
    layout = [_tiff_tag(image, tag) for tag in (_BITS_PER_SAMPLE, _PLANES, _COMPRESSION)]
    if layout == [16, _SEPARATE, _NOT_COMPRESSED] and len(image.getbands()) > 1:  # of which Pillow reads every half
        raise BrokenImageError("it is a TIFF file of colours of 16 bits in separate planes, which is not read")
    if image.mode.startswith("I"):
        image = Image.fromarray(_upper_bits(image))
    image.info.pop("transparency", None)  # Pillow warns of it in a palette, and changes no colour for it
    rgb = image.convert("RGB")
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def _upper_bits(image: Image.Image) -> np.ndarray:
    """The upper 8 of the 12 bits of a TIFF file or of 16: also a PPM file's, which Pillow brings to 16; it would clip.

    Returns:
        uint8 [height, width]: 255 is white.
    """
    bits = 12 if _tiff_tag(image, _BITS_PER_SAMPLE) == 12 else 16
    upper = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return 255 - upper if _tiff_tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO else upper  # of 8 bits Pillow does so


def _tiff_tag(image: Image.Image, number: int) -> int | None:
    """The value of a tag of a TIFF file, of several the first; None without it, and for other formats."""
    if image.format != "TIFF":
        return None
    value = image.tag_v2.get(number)  # type: ignore[attr-defined]
    found: int | None = value[0] if isinstance(value, tuple) else value
    return found


@contextmanager
def broken_if_unreadable() -> Iterator[None]:
    """Turn whatever Pillow's readers raise on damaged files into a `BrokenImageError`."""
    try:
        yield
    except BrokenImageError:
        raise
    except Exception as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its message contains an address in memory
        reason = "it is of no format that is read" if unknown else str(error) or type(error).__name__
        raise BrokenImageError(reason) from None


def png_chunks(encoded: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The name and all bytes of each chunk of a PNG file, as far as they are whole.

    Of a file that is no PNG there are none.
    """
    start = len(PNG)
    while encoded.startswith(PNG) and start + 12 <= len(encoded):
        end = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        yield encoded[start + 4 : start + 8], encoded[start:end]
        start = end


def _without_text(encoded: bytes, keywords: tuple[bytes, ...]) -> bytes:
    """Leave out a PNG file's text but that of these keywords, and its colour profile.

    Pillow limits the length of both, and they change no pixel.
    """
    chunks = [
        chunk
        for name, chunk in png_chunks(encoded)
        if name not in _PNG_TEXT or (name != b"iCCP" and chunk[8:].partition(b"\0")[0] in keywords)
    ]
    return PNG + b"".join(chunks) if chunks else encoded
