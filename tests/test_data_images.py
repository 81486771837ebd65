"""One picture on its way into the records: which data stay as they are, and that its pixels do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pictures import encode, picture, with_orientation
from PIL import Image

from flatmin import images
from flatmin.data.images import Picture, read_picture
from flatmin.images import OWN_SIZE, BrokenImageError, Stored

PROFILE = np.random.default_rng(0).integers(0, 256, 60_000, np.uint8).tobytes()


def pixels(read: Picture) -> np.ndarray:
    return np.asarray(images.read(read.encoded, read.orientation))


@pytest.mark.parametrize(
    "encoded",
    [
        encode(picture(), "JPEG"),
        encode(picture().convert("L"), "JPEG"),
        encode(picture().convert("CMYK"), "JPEG"),
        *(encode(picture().convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    ],
    ids=["JPEG", "grey JPEG", "CMYK JPEG", "PNG 1", "PNG L", "PNG LA", "PNG P", "PNG RGB", "PNG RGBA"],
)
def test_read_picture_without_metadata_keeps_its_bytes(encoded: bytes) -> None:
    read = read_picture(encoded)
    assert read.encoded == encoded
    assert (read.height, read.width, read.orientation) == (8, 12, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_picture_with_orientation_keeps_its_data(kind: str, orientation: int) -> None:
    encoded = encode(picture(), kind, exif=with_orientation(orientation))
    read = read_picture(encoded)
    assert (read.encoded, read.orientation) == (encode(picture(), kind), orientation)
    np.testing.assert_array_equal(pixels(read), np.asarray(images.read(encoded)))
    assert (read.height, read.width) == pixels(read).shape[:2]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}], ids=str)
def test_read_picture_of_jpeg_leaves_out_metadata_alone(options: dict[str, Any]) -> None:
    plain = picture(width=100, height=70)
    exif = with_orientation(6)
    exif[0x010E] = "\xff\xd9 a description"
    encoded = encode(plain, "JPEG", **options, exif=exif, icc_profile=PROFILE, comment=b"\xff\xd9\xff\xda comment")
    read = read_picture(encoded)
    assert read.encoded == encode(plain, "JPEG", **options)
    np.testing.assert_array_equal(pixels(read), np.asarray(images.read(encoded)))


def test_read_picture_of_mpo_keeps_the_first_jpeg() -> None:
    read = read_picture(encode(picture(), "MPO", save_all=True, append_images=[picture(1)]))
    assert read.encoded.count(b"\xff\xd8\xff") == 1
    np.testing.assert_array_equal(pixels(read), np.asarray(images.read(encode(picture(), "JPEG"))))
    assert read.frames


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("stored", [OWN_SIZE, Stored(32)])
def test_read_picture_keeps_no_profile(kind: str, stored: Stored) -> None:
    image = picture(width=40, height=30).convert("CMYK" if kind == "JPEG" else "RGB")
    read = read_picture(encode(image, kind, icc_profile=PROFILE), stored)
    assert len(read.encoded) < 10_000
    assert PROFILE[:100] not in read.encoded


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "PPM", "TIFF", "WEBP"])
def test_read_picture_of_other_formats_becomes_png(kind: str) -> None:
    encoded = encode(picture(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    read = read_picture(encoded)
    assert read.encoded.startswith(images.PNG)
    np.testing.assert_array_equal(pixels(read), np.asarray(images.read(encoded)))


def test_read_picture_of_animation_gives_first_frame() -> None:
    frames = [picture(seed).quantize(64) for seed in range(3)]
    read = read_picture(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    np.testing.assert_array_equal(pixels(read), np.asarray(frames[0].convert("RGB")))
    assert read.frames
    assert not read_picture(encode(frames[0], "GIF")).frames


def test_read_picture_of_16_bits_says_whether_it_is_dark() -> None:
    numbers = np.arange(64, dtype=np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        assert read_picture(encode(Image.fromarray(numbers * 255), kind)).dark
        assert not read_picture(encode(Image.fromarray(numbers * 262), kind)).dark
    assert not read_picture(b"P5 8 8 65535\n" + numbers.astype(">u2").tobytes()).dark  # its range is stated
    assert not read_picture(encode(Image.new("RGB", (8, 8)))).dark


@pytest.mark.parametrize(
    ("stored", "size", "expected"),
    [
        (OWN_SIZE, (40, 30), (40, 30)),
        (Stored(15), (40, 30), (20, 15)),
        (Stored(60), (40, 30), (80, 60)),
        (Stored(60, enlarge=False), (40, 30), (40, 30)),
        (Stored(15, enlarge=False), (30, 40), (15, 20)),
        (Stored(2), (3, 1000), (2, 667)),
    ],
)
def test_read_picture_is_stored_in_proportion(stored: Stored, size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = picture(width=size[0], height=size[1])
    read = read_picture(encode(image), stored)
    assert (read.width, read.height) == expected
    np.testing.assert_array_equal(pixels(read), np.asarray(image.resize(expected, Image.Resampling.BICUBIC)))
    assert read_picture(read.encoded, stored).encoded == read.encoded


@pytest.mark.parametrize("orientation", [1, 6])
def test_read_picture_turned_and_resized_is_stored_upright(orientation: int) -> None:
    encoded = encode(picture(width=40, height=30), "JPEG", exif=with_orientation(orientation))
    read = read_picture(encoded, Stored(15))
    upright = images.read(encoded)
    assert read.orientation == 1
    expected = upright.resize((20, 15) if orientation == 1 else (15, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels(read), np.asarray(expected))


def test_stored_by_setting() -> None:
    assert Stored.by_setting("auto", 96) == Stored(96, enlarge=False)
    assert Stored.by_setting("auto", None).size(4000, 3000) == (4000, 3000)
    assert Stored.by_setting("original", 96) == OWN_SIZE
    assert Stored.by_setting(32, 96) == Stored(32)


def test_read_picture_digest_depends_on_pixels_and_shape_only() -> None:
    png, bmp, other = encode(picture()), encode(picture(), "BMP"), encode(picture(1))
    assert read_picture(png).digest == read_picture(bmp).digest == read_picture(png, Stored(32)).digest
    assert read_picture(png).digest != read_picture(other).digest
    wide, high = encode(Image.new("RGB", (4, 2))), encode(Image.new("RGB", (2, 4)))
    assert read_picture(wide).digest != read_picture(high).digest


def test_read_picture_of_damaged_files_gives_what_pillow_gives_or_is_broken() -> None:
    without_end = encode(picture())[:-12]
    np.testing.assert_array_equal(pixels(read_picture(without_end)), np.asarray(picture()))
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG"):
        encoded = bytearray(encode(picture(width=50, height=40), kind))
        for _ in range(200):
            damaged = bytearray(encoded)
            damaged[random.integers(len(damaged))] = random.integers(256)
            try:
                read = read_picture(bytes(damaged))
            except BrokenImageError:
                continue
            np.testing.assert_array_equal(pixels(read), np.asarray(images.read(bytes(damaged))))


def test_read_picture_larger_than_max_pixels_is_broken() -> None:
    encoded = encode(picture(width=11, height=11))
    with pytest.raises(BrokenImageError, match=r"121 pixels, and data.max_pixels, which can be set, allows 120"):
        read_picture(encoded, max_pixels=120)
    with pytest.raises(BrokenImageError, match=r"would be stored with more than data.max_pixels"):
        read_picture(encode(picture(width=1, height=200)), Stored(100), max_pixels=1000)
    assert read_picture(encoded, max_pixels=121).height == 11
