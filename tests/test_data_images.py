"""One picture: which encodings stay as they are, what the others become, and what counts as broken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from pictures import decode_with_pillow, decode_with_tensorflow, encode, picture, with_orientation
from PIL import Image

from flatmin.data.images import BrokenImageError, read_picture


@pytest.mark.parametrize(
    "image",
    [
        picture(mode="L"),
        picture(mode="RGB"),
        picture(mode="RGBA"),
        picture().convert("LA"),
        picture().convert("1"),
        picture().quantize(16),
    ],
    ids=lambda image: image.mode,
)
def test_read_picture_of_8_bit_png_keeps_its_bytes(image: Image.Image) -> None:
    encoded = encode(image)
    read = read_picture(encoded)
    assert read.encoded == encoded
    assert (read.height, read.width) == (8, 12)
    np.testing.assert_array_equal(decode_with_tensorflow(read.encoded), decode_with_pillow(encoded))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_read_picture_of_upright_jpeg_keeps_its_bytes(mode: str) -> None:
    for options in ({}, {"exif": with_orientation(1)}):
        encoded = encode(picture().convert(mode), "JPEG", **options)
        read = read_picture(encoded)
        assert read.encoded == encoded
        difference = decode_with_tensorflow(encoded).astype(int) - decode_with_pillow(encoded)
        assert np.abs(difference).max() <= 4  # the two decoders round differently


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_read_picture_of_other_formats_becomes_png(kind: str) -> None:
    encoded = encode(picture(), kind)
    read = read_picture(encoded)
    assert read.encoded.startswith(b"\x89PNG")
    np.testing.assert_array_equal(decode_with_tensorflow(read.encoded), decode_with_pillow(encoded))


def test_read_picture_of_animation_gives_first_frame() -> None:
    frames = [picture(seed).quantize(64) for seed in range(3)]
    encoded = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    expected = np.asarray(frames[0].convert("RGB"))
    np.testing.assert_array_equal(decode_with_tensorflow(read_picture(encoded).encoded), expected)


@pytest.mark.parametrize(
    "encoded",
    [encode(picture().convert("CMYK"), "JPEG"), encode(picture().quantize(16), transparency=3)],
    ids=["CMYK", "transparent palette"],
)
def test_read_picture_of_other_color_modes_becomes_rgb(encoded: bytes) -> None:
    np.testing.assert_array_equal(decode_with_tensorflow(read_picture(encoded).encoded), decode_with_pillow(encoded))


@pytest.mark.parametrize(
    ("orientation", "turn"), [(3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_read_picture_with_exif_orientation_is_upright(orientation: int, turn: Any, kind: str) -> None:
    encoded = encode(picture(), kind, exif=with_orientation(orientation))
    expected = turn(decode_with_pillow(encoded))
    read = read_picture(encoded)
    np.testing.assert_array_equal(decode_with_tensorflow(read.encoded), expected)
    assert (read.height, read.width) == expected.shape[:2]


def test_read_picture_of_16_bits_keeps_upper_8() -> None:
    image = Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8))
    pixels = decode_with_tensorflow(read_picture(encode(image)).encoded)
    np.testing.assert_array_equal(pixels[..., 0].ravel(), np.arange(0, 256, 4))


def test_read_picture_with_size_resizes_once() -> None:
    read = read_picture(encode(picture()), 32)
    assert (read.height, read.width) == (32, 32)
    expected = np.asarray(picture().resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decode_with_tensorflow(read.encoded), expected)
    assert read_picture(read.encoded, 32).encoded == read.encoded


def test_read_picture_digest_depends_on_pixels_and_shape_only() -> None:
    png, bmp, other = encode(picture()), encode(picture(), "BMP"), encode(picture(1))
    assert read_picture(png).digest == read_picture(bmp).digest == read_picture(png, 32).digest
    assert read_picture(png).digest != read_picture(other).digest
    wide, high = encode(Image.new("RGB", (4, 2))), encode(Image.new("RGB", (2, 4)))
    assert read_picture(wide).digest != read_picture(high).digest


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no bytes"),
        (b"no image at all", "no format"),
        (encode(picture(width=200, height=200), "JPEG")[:3000], "truncated"),
        (encode(picture(width=200, height=200))[:3000], "truncated"),
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "range"),
    ],
    ids=["empty", "text", "JPEG", "PNG", "float TIFF"],
)
def test_read_picture_of_broken_image_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(BrokenImageError, match=reason) as error:
        read_picture(content)
    assert "0x" not in str(error.value)


def test_read_picture_repairs_damage_that_only_pillow_tolerates() -> None:
    without_end = encode(picture())[:-12]
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode_with_tensorflow(without_end)
    np.testing.assert_array_equal(decode_with_tensorflow(read_picture(without_end).encoded), np.asarray(picture()))


@pytest.mark.parametrize("limit", [50, 80])  # Pillow raises above twice the limit and warns above the limit
def test_read_picture_of_decompression_bomb_is_broken(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode(picture(width=11, height=11))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BrokenImageError, match="decompression bomb"):
        read_picture(encoded)
