"""A picture's pixels are Pillow's, upright and in RGB, whatever the file; and how it meets the network's square."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import encode, picture, with_orientation
from PIL import Image, ImageOps, PngImagePlugin

from flatmin import images
from flatmin.images import BrokenImageError


def expected(encoded: bytes) -> np.ndarray:
    """What Pillow's own functions give."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"))


def blocks(size: tuple[int, int] = (80, 60)) -> Image.Image:
    """Saturated colours, which a decoder's fast transform gets wrong most."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 2, (15, 20, 3), np.uint8) * 255).resize(size, 0)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [75, 100])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"exif": with_orientation(6)}], ids=["plain", "progressive", "turned"]
)
def test_read_jpeg_gives_pillows_pixels(quality: int, subsampling: int, options: dict[str, Any]) -> None:
    encoded = encode(blocks(), "JPEG", quality=quality, subsampling=subsampling, **options)
    np.testing.assert_array_equal(np.asarray(images.read(encoded)), expected(encoded))


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "ICO", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF"])
def test_read_other_formats_gives_pillows_pixels(kind: str) -> None:
    encoded = encode(picture(), kind)
    np.testing.assert_array_equal(np.asarray(images.read(encoded)), expected(encoded))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_read_turns_pictures_upright(kind: str, orientation: int) -> None:
    encoded = encode(picture(), kind, exif=with_orientation(orientation))
    np.testing.assert_array_equal(np.asarray(images.read(encoded)), expected(encoded))


def test_read_with_orientation_ignores_the_files_own() -> None:
    encoded = encode(picture(), exif=with_orientation(6))
    np.testing.assert_array_equal(np.asarray(images.read(encoded, 1)), np.asarray(picture()))
    np.testing.assert_array_equal(np.asarray(images.read(encoded, 3)), np.rot90(np.asarray(picture()), 2))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_read_ignores_orientations_that_are_none(orientation: int) -> None:
    encoded = encode(picture(), exif=with_orientation(orientation))
    np.testing.assert_array_equal(np.asarray(images.read(encoded)), np.asarray(picture()))


def tagged(*tag: Any) -> bytes:
    """A JPEG of 24 x 16 pixels with EXIF orientation 6, and one more tag: number, type, count and content."""
    entries = sorted([*([] if tag[0] == 0x0112 else [(0x0112, 3, 1, struct.pack("<H", 6))]), tag])
    start, table, values = 8 + 2 + 12 * len(entries) + 4, b"", b""
    for number, kind, count, content in entries:
        if len(content) > 4:
            values, content = values + content, struct.pack("<I", start + len(values))
        table += struct.pack("<HHI", number, kind, count) + content.ljust(4, b"\0")
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + values
    segment = b"Exif\0\0" + tiff
    jpeg = encode(Image.new("RGB", (24, 16), (200, 30, 30)), "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


@pytest.mark.parametrize(
    "tag",
    [
        (296, 5, 1, struct.pack("<II", 2, 1)),  # ResolutionUnit as a fraction
        (282, 2, 3, b"72\0"),  # XResolution as text
        (305, 5, 1, struct.pack("<II", 1, 1)),  # Software as a fraction
        (256, 11, 1, struct.pack("<f", 24.0)),  # ImageWidth as a float
        (531, 5, 1, struct.pack("<II", 1, 0)),  # YCbCrPositioning as a fraction of zero
        (0x8769, 4, 1, struct.pack("<I", 99999)),  # details that lie outside the file
        (0x0112, 5, 1, struct.pack("<II", 6, 1)),  # the orientation itself as a fraction
    ],
    ids=lambda tag: str(tag[0]),
)
def test_read_with_odd_exif_tag_is_upright(tag: Any) -> None:
    assert images.read(tagged(*tag)).size == (16, 24)


def test_read_png_with_long_text_or_profile_gives_its_pixels() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "a node " * 200_000, zip=True)
    text.add_itxt("notes", "more " * 300_000)
    for options in ({"pnginfo": text}, {"icc_profile": bytes(1_500_000)}):
        encoded = encode(picture(), **options)
        np.testing.assert_array_equal(np.asarray(images.read(encoded)), np.asarray(picture()))
    text.add_itxt("XML:com.adobe.xmp", "<x>" + "more " * 600_000 + "</x>", zip=True)
    np.testing.assert_array_equal(np.asarray(images.read(encode(picture(), pnginfo=text))), np.asarray(picture()))


RAW_EXIF = f"\nexif\n      {len(with_orientation(6).tobytes())}\n{with_orientation(6).tobytes().hex()}\n"


@pytest.mark.parametrize(
    ("keyword", "content"), [("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>'), ("Raw profile type exif", RAW_EXIF)]
)
@pytest.mark.parametrize("kind", ["iTXt", "tEXt", "zTXt"])
def test_read_png_with_orientation_in_text_is_upright(keyword: str, content: str, kind: str) -> None:
    text = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        text.add_itxt(keyword, content)
    else:
        text.add_text(keyword, content, zip=kind == "zTXt")
    encoded = encode(picture(), pnginfo=text)
    if (keyword, kind) == ("XML:com.adobe.xmp", "iTXt") or keyword != "XML:com.adobe.xmp":
        assert expected(encoded).shape == (12, 8, 3)  # else Pillow reads none, and this shows nothing
    np.testing.assert_array_equal(np.asarray(images.read(encoded)), expected(encoded))


def test_read_16_bits_keeps_the_upper_8() -> None:
    numbers = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(images.read(encode(Image.fromarray(numbers), kind)))
        np.testing.assert_array_equal(pixels[..., 0], numbers >> 8)


NUMBERS = np.arange(0, 4096, 64).reshape(8, 8)  # of 12 bits
PACKED = b"".join((first << 12 | second).to_bytes(3, "big") for first, second in NUMBERS.reshape(-1, 2).tolist())
BLACK_IS_ZERO, WHITE_IS_ZERO, UNSIGNED, SIGNED = 1, 0, 1, 2


def tiff(bits: int, content: bytes, photometric: int = BLACK_IS_ZERO, sample_format: int = UNSIGNED) -> bytes:
    """A grey TIFF file of 8 x 8 pixels."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 8, 279: len(content)}
    tags[339] = sample_format
    tags[273] = 14 + 12 * len(tags)  # where the content begins
    table = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + table + bytes(4) + content


@pytest.mark.parametrize(
    ("encoded", "grey"),
    [
        (tiff(8, (NUMBERS >> 4).astype(np.uint8).tobytes(), WHITE_IS_ZERO), 255 - (NUMBERS >> 4)),
        (tiff(12, PACKED), NUMBERS >> 4),
        (tiff(16, (NUMBERS << 4).astype("<u2").tobytes()), NUMBERS >> 4),
        (tiff(16, (NUMBERS << 4).astype("<u2").tobytes(), WHITE_IS_ZERO), 255 - (NUMBERS >> 4)),
    ],
    ids=["8 bits, 0 is white", "12 bits", "16 bits", "16 bits, 0 is white"],
)
def test_read_tiff_uses_its_range_and_knows_what_is_white(encoded: bytes, grey: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(images.read(encoded))[..., 1], grey)


@pytest.mark.parametrize(("largest", "kind"), [(1023, ">u2"), (65535, ">u2"), (100, "u1")])
def test_read_pgm_uses_its_stated_range(largest: int, kind: str) -> None:
    numbers = np.linspace(0, largest, 64).astype(kind)
    pixels = np.asarray(images.read(b"P5 8 8 %d\n" % largest + numbers.tobytes()))[..., 0].ravel()
    np.testing.assert_allclose(pixels, numbers.astype(float) * 255 / largest, atol=1)
    assert (pixels[0], pixels[-1]) == (0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_read_other_color_modes_gives_pillows_rgb(mode: str) -> None:
    image = picture().convert(mode)
    encoded = encode(image, "JPEG" if mode in {"CMYK", "YCbCr"} else "PNG")
    np.testing.assert_array_equal(np.asarray(images.read(encoded)), expected(encoded))


def test_read_transparent_pictures_gives_the_colors_below() -> None:
    for image, transparent in (
        (picture().quantize(16), 3),
        (picture().quantize(16), bytes(range(16))),
        (picture().convert("1"), 0),
        (picture(), (1, 2, 3)),
    ):
        encoded = encode(image, transparency=transparent)
        np.testing.assert_array_equal(np.asarray(images.read(encoded)), np.asarray(image.convert("RGB")))


FITS = b"".join(b"%-80s" % line for line in (b"SIMPLE  = T", b"BITPIX  = 16", b"NAXIS   = 2", b"NAXIS1  = 8"))
FITS = (FITS + b"%-80s%-80s" % (b"NAXIS2  = 8", b"END")).ljust(2880) + bytes(2880)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "^it is empty$"),
        (b"no picture at all", "no format"),
        (encode(picture(width=200, height=200), "JPEG")[:3000], "truncated"),
        (encode(picture(width=200, height=200))[:3000], "truncated"),
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "range"),
        (encode(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "range"),
        (tiff(8, bytes(64), sample_format=SIGNED), "signed"),
        (tiff(12, PACKED, WHITE_IS_ZERO), "a TIFF file that is damaged or whose kind of pixels is not read"),
        (FITS, "range"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no format"),  # whose reader starts another program
    ],
    ids=["empty", "text", "JPEG", "PNG", "float TIFF", "32-bit TIFF", "signed TIFF", "odd TIFF", "FITS", "EPS"],
)
def test_read_broken_picture_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(BrokenImageError, match=reason) as error:
        images.read(content)
    assert "0x" not in str(error.value)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_read_tiff_with_separate_planes_is_right_or_refused(bits: int, compression: str | None) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.asarray(picture())
    file, numbers = io.BytesIO(), pixels.astype(np.uint16) << (bits - 8)
    planes = np.moveaxis(numbers.astype(f"uint{bits}"), 2, 0)
    tifffile.imwrite(file, planes, photometric="rgb", planarconfig="separate", compression=compression)
    if bits == 16 and not compression:
        with pytest.raises(BrokenImageError, match="16 bits in separate planes"):
            images.read(file.getvalue())
    else:
        np.testing.assert_array_equal(np.asarray(images.read(file.getvalue())), pixels)


NOISY = """
import sys
from flatmin import images
for path in sys.argv[1:]:
    try:
        images.read(open(path, "rb").read())
    except images.BrokenImageError:
        print("broken")
"""


def test_read_lets_no_library_write_to_standard_error(tmp_path: Path) -> None:
    damaged = bytearray(encode(picture(), "TIFF", compression="tiff_lzw"))
    damaged[20:40] = b"x" * 20  # of which libtiff writes a line
    planes = tiff(8, bytes(64)).replace(struct.pack("<HHII", 277, 4, 1, 1), struct.pack("<HHII", 277, 4, 1, 9))
    for name, content in (("damaged", damaged), ("planes", planes)):  # of the latter Pillow logs an error
        (tmp_path / name).write_bytes(content)
    paths = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run([sys.executable, "-c", NOISY, *paths], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("broken\n" * 2, "")


def test_read_checks_the_size_before_decoding() -> None:
    header = struct.pack(">IIBBBBB", 20_000, 5_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = images.PNG + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(BrokenImageError, match=r"100000000 pixels, and data\.max_pixels, which can be set, allows 120"):
        images.read(bomb, max_pixels=120)
    with pytest.raises(BrokenImageError, match=r"^image file is truncated"):  # it was tried
        images.read(bomb)


def test_suffixes_are_those_of_formats_that_are_read() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tga", ".jp2", ".mpo", ".tif", ".pgm"} <= images.suffixes()
    assert not {".eps", ".ps", ".wmf", ".emf", ".pdf", ".h5", ".mpg"} & images.suffixes()


def test_to_square_by_each_fit() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    squashed, cropped, padded = (np.asarray(images.to_square(wide, 20, fit)) for fit in ("squash", "crop", "pad"))
    assert {array.shape for array in (squashed, cropped, padded)} == {(20, 20, 3)}
    np.testing.assert_array_equal(squashed[10, [1, 10, 18]], [[255, 0, 0], [0, 0, 255], [255, 0, 0]])
    assert (cropped == (0, 0, 255)).all()
    assert (padded[[0, 19]] == images.PAD).all()
    np.testing.assert_array_equal(padded[10, [1, 10]], [[255, 0, 0], [0, 0, 255]])


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_to_square_of_square_of_that_size_changes_nothing(fit: images.Fit) -> None:
    square = picture(width=16, height=16)
    np.testing.assert_array_equal(np.asarray(images.to_square(square, 16, fit)), np.asarray(square))


@pytest.mark.parametrize(("width", "height"), [(1, 20_000), (20_000, 1), (3, 400)])
def test_to_square_pads_a_thin_picture_to_a_line(width: int, height: int) -> None:
    square = np.asarray(images.to_square(Image.new("RGB", (width, height), (255, 0, 0)), 16, "pad"))
    line = square[:, 8] if width < height else square[8]
    assert (line == (255, 0, 0)).all()
    assert (square == images.PAD).all(axis=2).sum() == 16 * 15


@pytest.mark.parametrize(("width", "height"), [(40, 20), (3, 7), (100, 4), (77, 76)])
def test_to_square_pads_as_pillow_does(width: int, height: int) -> None:
    image = picture(width=width, height=height)
    expected = ImageOps.pad(image, (16, 16), Image.Resampling.BILINEAR, (images.PAD,) * 3)
    np.testing.assert_array_equal(np.asarray(images.to_square(image, 16, "pad")), np.asarray(expected))


def test_to_square_averages_where_it_shrinks() -> None:
    checkered = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    shrunk = np.asarray(images.to_square(checkered, 16, "squash")).astype(int)
    assert np.abs(shrunk - 127.5).max() < 2  # without antialiasing all black or all white


def test_images_imports_no_tensorflow() -> None:
    code = "import sys, flatmin.images; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stored_resize_of_too_many_pixels_is_broken() -> None:
    with pytest.raises(BrokenImageError, match="of 100000 x 1 pixels it would get 22400000 x 224"):
        images.Stored(224).resize(Image.new("RGB", (100_000, 1)))


def test_file_orientation_is_an_integer() -> None:
    with images.open_image(tagged(0x0112, 5, 1, struct.pack("<II", 6, 1)), 10**6) as opened:
        orientation = images.file_orientation(opened)
    assert (orientation, type(orientation)) == (6, int)
