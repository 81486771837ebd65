"""Sources: what they hold, in which order, how images of all kinds are read, and what is refused."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import sources
from flatmin.data.images import BrokenImageError, read_picture
from flatmin.data.sources import balanced_order, open_source

CIFAR = "visual_domain_decathlon/cifar100"
needs_tfds_data = pytest.mark.skipif(
    not (Path(os.environ.get("TFDS_DATA_DIR", "nowhere")) / CIFAR).is_dir(),
    reason=f"TFDS_DATA_DIR names no folder with {CIFAR}",
)


def data(source: str, name: str | Path, **more: Any) -> Data:
    values = {
        "source": source,
        "name": str(name),
        "splits": {"train": "train", "test": "test"},
        "val_fraction": 0.1,
    }
    return Data.model_validate({**values, **more})


def picture(seed: int = 0, mode: str = "RGB", width: int = 12, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    return Image.fromarray(pixels[..., 0] if len(mode) == 1 else pixels, mode)


def encode(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def put(path: Path, content: bytes | None = None, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(seed)) if content is None else content)


def as_tensorflow_reads(image: bytes) -> np.ndarray:
    return np.asarray(tf.io.decode_image(image, channels=3, expand_animations=False))


# How an image is read


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def transparent_palette() -> bytes:
    return encode(picture().quantize(16), transparency=3)


def grey_16_bit() -> bytes:
    return encode(Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_png_stays_as_it_came_and_loses_alpha(mode: str) -> None:
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, channels), np.uint8)
    encoded = encode(Image.fromarray(pixels.squeeze(), mode) if mode != "LA" else picture().convert("LA"))
    read = read_picture(encoded)
    assert read.encoded == encoded
    assert (read.height, read.width) == (8, 12)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(as_tensorflow_reads(read.encoded), expected)


@pytest.mark.parametrize("mode", ["1", "P"])
def test_png_of_few_colours_stays_as_it_came(mode: str) -> None:
    encoded = encode(picture().convert("1") if mode == "1" else picture().quantize(16))
    read = read_picture(encoded)
    assert read.encoded == encoded
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(as_tensorflow_reads(read.encoded), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_stays_as_it_came(mode: str) -> None:
    encoded = encode(picture().convert(mode), "JPEG")
    read = read_picture(encoded)
    assert read.encoded == encoded
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"), np.int32)
    assert np.abs(as_tensorflow_reads(read.encoded) - expected).max() <= 4  # two decoders round differently


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_become_png(kind: str) -> None:
    encoded = encode(picture(), kind)
    read = read_picture(encoded)
    assert read.encoded.startswith(b"\x89PNG")
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(as_tensorflow_reads(read.encoded), expected)


def test_gif_gives_its_first_frame() -> None:
    frames = [picture(seed).quantize(64) for seed in range(3)]
    encoded = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    expected = np.asarray(frames[0].convert("RGB"))
    np.testing.assert_array_equal(as_tensorflow_reads(read_picture(encoded).encoded), expected)


def test_cmyk_jpeg_becomes_rgb() -> None:
    encoded = encode(picture().convert("CMYK"), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(as_tensorflow_reads(read_picture(encoded).encoded), expected)


@pytest.mark.parametrize(
    ("orientation", "turn"), [(3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, turn: Any, kind: str) -> None:
    encoded = encode(picture(), kind, exif=with_orientation(orientation))
    stored = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    read = read_picture(encoded)
    np.testing.assert_array_equal(as_tensorflow_reads(read.encoded), turn(stored))
    assert (read.height, read.width) == turn(stored).shape[:2]


def test_upright_exif_changes_nothing() -> None:
    encoded = encode(picture(), "JPEG", exif=with_orientation(1))
    assert read_picture(encoded).encoded == encoded


def test_transparent_palette_becomes_rgb() -> None:
    encoded = transparent_palette()
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(as_tensorflow_reads(read_picture(encoded).encoded), expected)


def test_16_bits_become_8() -> None:
    pixels = as_tensorflow_reads(read_picture(grey_16_bit()).encoded)
    np.testing.assert_array_equal(pixels[..., 0].ravel(), np.arange(0, 256, 4))


def test_resizes_to_a_square_once() -> None:
    read = read_picture(encode(picture()), 32)
    assert (read.height, read.width) == (32, 32)
    expected = np.asarray(picture().resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(as_tensorflow_reads(read.encoded), expected)
    assert read_picture(read.encoded, 32).encoded == read.encoded


def test_digest_is_that_of_the_pixels() -> None:
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
)
def test_broken_images_are_refused_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BrokenImageError, match=reason) as error:
        read_picture(content)
    assert "0x" not in str(error.value)


def test_damage_that_pillow_alone_forgives_is_repaired() -> None:
    without_end = encode(picture())[:-12]
    with pytest.raises(tf.errors.InvalidArgumentError):
        as_tensorflow_reads(without_end)
    np.testing.assert_array_equal(as_tensorflow_reads(read_picture(without_end).encoded), np.asarray(picture()))


@pytest.mark.parametrize("limit", [50, 80])  # Pillow raises at twice the limit and warns at once
def test_decompression_bombs_are_broken(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = encode(picture(width=11, height=11))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BrokenImageError, match="decompression bomb"):
        read_picture(encoded)


# The order of examples


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**31 - 1),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_any_slice_is_stratified(sizes: list[int], seed: int, ends: tuple[float, float]) -> None:
    labels = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    order = balanced_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    start, stop = sorted(round(end * len(labels)) for end in ends)
    counts = np.bincount(labels[order][start:stop], minlength=len(sizes))
    share = np.array(sizes) / len(labels)
    # each end is off by half an example of the class, and by its share of what all the classes are off
    assert (np.abs(counts - share * (stop - start)) <= 1 + share * len(sizes) + 1e-9).all()


@settings(deadline=None, max_examples=60)
@given(classes=st.integers(1, 8), size=st.integers(1, 30), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_equal_classes_differ_by_one_at_most(classes: int, size: int, seed: int, data: st.DataObject) -> None:
    labels = np.repeat(np.arange(classes, dtype=np.int32), size)
    stop = data.draw(st.integers(0, len(labels)))
    counts = np.bincount(labels[balanced_order(labels, seed)][:stop], minlength=classes)
    assert counts.max() - counts.min() <= 1


def test_order_is_the_seeds() -> None:
    labels = np.repeat(np.arange(3, dtype=np.int32), 20)
    np.testing.assert_array_equal(balanced_order(labels, 1), balanced_order(labels, 1))
    assert (balanced_order(labels, 1) != balanced_order(labels, 2)).any()


def test_examples_without_labels_keep_their_order() -> None:
    assert balanced_order(np.full(5, -1, np.int32), 3).tolist() == [0, 1, 2, 3, 4]
    assert balanced_order(np.empty(0, np.int32), 3).tolist() == []


# bundled


def test_digits() -> None:
    from sklearn.datasets import load_digits

    source = open_source(data("bundled", "digits"), seed=0)
    assert source.class_names == [str(digit) for digit in range(10)]
    examples = list(source.examples("train"))
    assert len(examples) == 1797
    digits = load_digits()
    for example in examples[:50]:
        index = int(example.name.removeprefix("digits/"))
        assert example.label == digits.target[index]
        pixels = as_tensorflow_reads(example.image)
        assert pixels.shape == (8, 8, 3)
        np.testing.assert_array_equal(pixels[..., 1], np.rint(digits.images[index] * 255 / 16))
    assert source.labels("train").tolist() == [example.label for example in examples]


def test_slices_are_tfds_ones() -> None:
    source = open_source(data("bundled", "digits"), seed=0)
    names = [example.name for example in source.examples("train")]
    for expression, expected in {
        "train[:10]": names[:10],
        "train[-5:]": names[-5:],
        "train[:1%]": names[:18],
        "train[10:12]+train[2:4]": names[10:12] + names[2:4],
    }.items():
        assert [example.name for example in source.examples(expression)] == expected
        assert len(source.labels(expression)) == len(expected)


def test_examples_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(data("bundled", "digits"), seed=0)
    read: list[str] = []

    def record(name: str) -> bytes:
        read.append(name)
        return b""

    monkeypatch.setattr(source, "_read", record)
    examples = source.examples("train")
    next(examples)
    next(examples)
    assert len(read) == 2


@pytest.mark.parametrize("expression", ["test", "train[:1x]", "train[:5000]", "", "train["])
def test_wrong_split_expressions_say_what_there_is(expression: str) -> None:
    source = open_source(data("bundled", "digits"), seed=0)
    with pytest.raises(InputError, match=r"data\.splits\.val: expected slices of train \(1797\)") as error:
        source.locate(expression, "data.splits.val")
    assert "\n" not in str(error.value)


def test_unknown_bundled_name() -> None:
    with pytest.raises(InputError, match=r"data\.name: expected digits.*'letters'"):
        open_source(data("bundled", "letters"), seed=0)


# folder


def test_folder_of_classes(tmp_path: Path) -> None:
    for index in range(4):
        put(tmp_path / "dog" / f"{index}.png", seed=index)
        put(tmp_path / "cat" / f"{index}.JPG", seed=index)
    for noise in ("dog/Thumbs.db", "dog/.hidden.png", "cat/notes.txt", ".git/x.png", "readme.md"):
        put(tmp_path / noise, b"noise")
    source = open_source(data("folder", tmp_path), seed=0)
    assert source.class_names == ["cat", "dog"]
    assert list(source.splits) == ["train"]
    examples = list(source.examples("train"))
    expected = {f"cat/{i}.JPG" for i in range(4)} | {f"dog/{i}.png" for i in range(4)}
    assert {example.name for example in examples} == expected
    assert all(source.class_names[example.label] == example.name.split("/")[0] for example in examples)
    assert sorted(source.labels("train[:50%]")) == [0, 0, 1, 1]
    assert source.version == open_source(data("folder", tmp_path), seed=1).version
    put(tmp_path / "cat" / "9.png")
    assert source.version != open_source(data("folder", tmp_path), seed=0).version


def test_folder_of_splits(tmp_path: Path) -> None:
    put(tmp_path / "train" / "cat" / "1.png")
    put(tmp_path / "train" / "dog" / "deep" / "er" / "2.png")
    put(tmp_path / "test" / "dog" / "3.png")
    for index in (2, 1, 3):
        put(tmp_path / "new" / f"{index}.png")
    source = open_source(data("folder", tmp_path), seed=0)
    assert source.class_names == ["cat", "dog"]
    assert set(source.splits) == {"train", "test", "new"}
    assert [(example.name, example.label) for example in source.examples("test")] == [("test/dog/3.png", 1)]
    assert {example.label for example in source.examples("train")} == {0, 1}
    unknown = [(example.name, example.label) for example in source.examples("new")]
    assert unknown == [("new/1.png", -1), ("new/2.png", -1), ("new/3.png", -1)]


def test_unreadable_file_is_broken_not_fatal(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "1.png")
    put(tmp_path / "dog" / "1.png")
    (tmp_path / "dog" / "2.png").symlink_to("nowhere.png")
    source = open_source(data("folder", tmp_path), seed=0)
    assert {example.name: len(example.image) > 0 for example in source.examples("train")} == {
        "cat/1.png": True,
        "dog/1.png": True,
        "dog/2.png": False,
    }


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "1.png").symlink_to(tmp_path / "cat" / "1.png")
    assert len(list(open_source(data("folder", tmp_path), seed=0).examples("train"))) == 2


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_the_folder_are_refused(what: str, tmp_path: Path) -> None:
    put(tmp_path / "in" / "cat" / "1.png")
    put(tmp_path / "out" / "1.png")
    link, target = ("cat/2.png", "out/1.png") if what == "file" else ("dog", "out")
    (tmp_path / "in" / link).symlink_to(tmp_path / target)
    with pytest.raises(InputError, match=r"data\.name: .*link"):
        open_source(data("folder", tmp_path / "in"), seed=0)


def test_pipes_are_not_read(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "1.png")
    put(tmp_path / "dog" / "1.png")
    os.mkfifo(tmp_path / "dog" / "2.png")
    assert len(open_source(data("folder", tmp_path), seed=0).labels("train")) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "images in a folder for each class, received none"),
        (["1.png"], "'1.png' outside"),
        (["train/cat/1.png", "train/2.png"], "all images of 'train'"),
    ],
)
def test_wrong_folders_are_refused(files: list[str], message: str, tmp_path: Path) -> None:
    for file in files:
        put(tmp_path / file)
    with pytest.raises(InputError, match=r"data\.name: .*" + message):
        open_source(data("folder", tmp_path), seed=0)


def test_missing_folder() -> None:
    with pytest.raises(InputError, match=r"data\.name: expected a folder, received 'no/such'"):
        open_source(data("folder", "no/such"), seed=0)


# tfds


@needs_tfds_data
def test_tfds_reads_a_prepared_builder(caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(data("tfds", CIFAR), seed=0)
    assert len(source.class_names) == 100
    assert source.version == "1.2.0"
    examples = list(source.examples("train[:200]"))
    assert len(examples) == 200
    assert examples[0].image.startswith(b"\xff\xd8")
    assert examples[0].name.startswith("cifar100/train/")
    assert source.labels("train[:200]").tolist() == [example.label for example in examples]
    assert set(source.labels("test[:20]")) == {-1}
    assert [example.name for example in source.examples("validation[3:5]")] == [
        example.name for example in source.examples("validation[:50]")
    ][3:5]
    with pytest.raises(InputError, match=r"data\.splits: .*train \(40000\).*'valid'"):
        source.locate("valid")
    assert not caplog.records


def builder(features: dict[str, Any], **more: Any) -> Any:
    """A builder as `tfds.builder` gives it, with ten examples, made without a network."""
    counted = tfds.features.FeaturesDict(features)

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = Path(__file__).parent

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=counted, **more)

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            values = {"image": np.zeros((4, 4, 3), np.uint8), "text": "x"}
            for index in range(10):
                yield (
                    index,
                    {
                        key: index % 2
                        if isinstance(feature, tfds.features.ClassLabel)
                        else f"file-{index}"
                        if key == "id"
                        else values["text" if isinstance(feature, tfds.features.Text) else "image"]
                        for key, feature in features.items()
                    },
                )

    return Tiny


def with_builder(monkeypatch: pytest.MonkeyPatch, folder: Path, features: dict[str, Any], **more: Any) -> None:
    made = builder(features, **more)
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: made(data_dir=data_dir))


IMAGE = {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="png")}
LABEL = {"label": tfds.features.ClassLabel(names=["cat", "dog"])}


def test_tfds_makes_what_is_not_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_builder(monkeypatch, tmp_path, {**IMAGE, **LABEL})
    source = open_source(data("tfds", "tiny"), seed=0)
    assert source.class_names == ["cat", "dog"]
    names = [example.name for example in source.examples("train")]
    assert len(set(names)) == 10
    assert all(name.startswith("tiny-train.tfrecord") for name in names)  # TFDS's own ids
    assert source.labels("train").dtype == np.int32
    (shard,) = tmp_path.rglob("*.tfrecord*")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"data\.name: expected whole files in {tmp_path}.*, received: .*truncated"):
        list(source.examples("train"))
    shard.unlink()
    with pytest.raises(InputError, match=r"data\.name: expected whole files .*, received: .*No such file"):
        source.labels("train")


def test_tfds_takes_names_and_the_supervised_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    coarse = {"coarse_label": tfds.features.ClassLabel(num_classes=5)}
    features = {**IMAGE, **coarse, **LABEL, "id": tfds.features.Text()}
    with_builder(monkeypatch, tmp_path, features, supervised_keys=("image", "label"))
    source = open_source(data("tfds", "tiny"), seed=0)
    assert source.class_names == ["cat", "dog"]
    assert {example.name for example in source.examples("train")} == {f"file-{index}" for index in range(10)}


@pytest.mark.parametrize(
    "features",
    [
        IMAGE,
        LABEL,
        {**IMAGE, **LABEL, "coarse": tfds.features.ClassLabel(num_classes=2)},
        {**IMAGE, **LABEL, "mask": tfds.features.Image(shape=(None, None, 3))},
    ],
)
def test_tfds_without_one_image_and_one_label(
    features: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_builder(monkeypatch, tmp_path, features)
    with pytest.raises(InputError, match=r"data\.name: expected one Image and one ClassLabel, received tiny with"):
        open_source(data("tfds", "tiny"), seed=0)


def test_unknown_builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"data\.name: expected a TFDS builder, received 'nonesuch'") as error:
        open_source(data("tfds", "nonesuch"), seed=0)
    assert "\n" not in str(error.value)


def test_builder_that_cannot_be_made_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = builder({**IMAGE, **LABEL})

    def offline(self: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(made, "download_and_prepare", offline)
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: made(data_dir=data_dir))
    with pytest.raises(InputError, match=r"data\.name: .*TFDS_DATA_DIR") as error:
        open_source(data("tfds", "tiny"), seed=0)
    assert str(tmp_path) in str(error.value)
    assert "no network" in str(error.value)
    assert "\n" not in str(error.value)


def test_importing_datasets_does_not_import_tensorflow() -> None:
    import subprocess
    import sys

    code = "import sys, flatmin.datasets; sys.exit('tensorflow' in sys.modules)"
    root = Path(sources.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})
