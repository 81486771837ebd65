"""Sources: the examples they hold, in which order, and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import CIFAR, decode_with_tensorflow, needs_cifar

from flatmin import images
from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data.sources import open_source
from flatmin.data.sources.base import Source, balanced_order


def opened(source: str, name: str | Path, **changes: Any) -> Source:
    splits = {"train": "train", "test": "train"}  # overlaps are refused later
    values = {"source": source, "name": str(name), "seed": 0, "splits": splits, "val_fraction": 0.1, **changes}
    return open_source(Data.model_validate(values))


# The order of examples


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**31 - 1),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_balanced_order_any_slice_is_stratified(sizes: list[int], seed: int, ends: tuple[float, float]) -> None:
    labels = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    order = balanced_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    start, stop = sorted(round(end * len(labels)) for end in ends)
    counts = np.bincount(labels[order][start:stop], minlength=len(sizes))
    fractions = np.array(sizes) / len(labels)
    # At each end a class is off by up to half an example, and by its fraction of what all classes are off.
    assert (np.abs(counts - fractions * (stop - start)) <= 1 + fractions * len(sizes) + 1e-9).all()


@settings(deadline=None, max_examples=60)
@given(classes=st.integers(1, 8), size=st.integers(1, 30), seed=st.integers(0, 2**31 - 1), data=st.data())
def test_balanced_order_with_equal_classes_counts_differ_by_one_at_most(
    classes: int, size: int, seed: int, data: st.DataObject
) -> None:
    labels = np.repeat(np.arange(classes, dtype=np.int32), size)
    stop = data.draw(st.integers(0, len(labels)))
    counts = np.bincount(labels[balanced_order(labels, seed)][:stop], minlength=classes)
    assert counts.max() - counts.min() <= 1


def test_balanced_order_depends_on_seed_only() -> None:
    labels = np.repeat(np.arange(3, dtype=np.int32), 20)
    np.testing.assert_array_equal(balanced_order(labels, 1), balanced_order(labels, 1))
    assert (balanced_order(labels, 1) != balanced_order(labels, 2)).any()


def test_balanced_order_without_labels_keeps_order() -> None:
    assert balanced_order(np.full(5, -1, np.int32), 3).tolist() == [0, 1, 2, 3, 4]
    assert balanced_order(np.empty(0, np.int32), 3).tolist() == []


# Bundled


def test_digits_are_scikit_learns_scans() -> None:
    from sklearn.datasets import load_digits

    source = opened("bundled", "digits")
    assert source.class_names == [str(digit) for digit in range(10)]
    examples = list(source.examples("train"))
    assert len(examples) == 1797
    digits = load_digits()
    for example in examples[:50]:
        index = int(example.name.removeprefix("digits/"))
        assert example.label == digits.target[index]
        pixels = decode_with_tensorflow(example.image)
        assert pixels.shape == (8, 8, 3)
        np.testing.assert_array_equal(pixels[..., 1], np.rint(digits.images[index] * 255 / 16))
    assert source.labels("train").tolist() == [example.label for example in examples]


def test_digits_with_their_own_names_in_another_order_are_refused() -> None:
    names = [str(digit) for digit in range(10)]
    with pytest.raises(InputError, match=r"data\.class_names: expected new names .*, received '9' for '0'"):
        opened("bundled", "digits", class_names=names[::-1])
    assert opened("bundled", "digits", class_names=[*names[1:], "10"]).class_names == [*names[1:], "10"]


def test_bundled_with_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.name: expected digits.*'letters'"):
        opened("bundled", "letters")


def test_examples_of_split_expressions_are_the_slices_of_tfds() -> None:
    source = opened("bundled", "digits")
    names = [example.name for example in source.examples("train")]
    for expression, expected in {
        "train[:10]": names[:10],
        "train[-5:]": names[-5:],
        "train[:1%]": names[:18],
        "train[10:12]+train[2:4]": names[10:12] + names[2:4],
    }.items():
        assert [example.name for example in source.examples(expression)] == expected
        assert len(source.labels(expression)) == len(expected)


def test_examples_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened("bundled", "digits")
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
def test_locate_of_wrong_expression_lists_the_splits(expression: str) -> None:
    source = opened("bundled", "digits")
    with pytest.raises(InputError, match=r"data\.splits\.val: expected slices of train \(1797\)") as error:
        source.locate(expression, "data.splits.val")
    assert "\n" not in str(error.value)


# TensorFlow Datasets


@needs_cifar
@pytest.mark.slow
def test_tfds_with_prepared_builder_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    source = opened("tfds", CIFAR)
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


MASK_VALUE = 7


def builder(features: dict[str, Any], **info: Any) -> Any:
    """Make a builder like those of `tfds.builder`, with ten examples and no download."""
    specification = tfds.features.FeaturesDict(features)

    def value(key: str, feature: Any, index: int) -> Any:
        if isinstance(feature, tfds.features.ClassLabel):
            return index % 2
        if isinstance(feature, tfds.features.Text):
            return f"{key}-{index}"
        shape = [size or 4 for size in feature.shape]
        return np.full(shape, MASK_VALUE if key == "mask" else 0, feature.np_dtype)

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = Path(__file__).parent

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=specification, **info)

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for index in range(10):
                yield index, {key: value(key, feature, index) for key, feature in features.items()}

    return Tiny


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, tiny: Any) -> None:
    """Let `tfds.builder` give this builder, whose data are in `folder`."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: tiny(data_dir=data_dir))


IMAGE = {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="png")}
LABEL = {"label": tfds.features.ClassLabel(names=["cat", "dog"])}


@pytest.mark.slow
def test_tfds_without_prepared_data_prepares_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, builder({**IMAGE, **LABEL}))
    source = opened("tfds", "tiny")
    assert source.class_names == ["cat", "dog"]
    names = [example.name for example in source.examples("train")]
    assert len(set(names)) == 10
    assert all(name.startswith("tiny-train.tfrecord") for name in names)  # TFDS's own ids
    assert source.labels("train").dtype == np.int32


def test_tfds_with_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, builder({**IMAGE, **LABEL}))
    source = opened("tfds", "tiny")
    (shard,) = tmp_path.rglob("*.tfrecord*")
    shard.write_bytes(shard.read_bytes()[:-1])
    message = rf"data\.name: expected complete files in {tmp_path}.*, received: "
    with pytest.raises(InputError, match=message + ".*truncated"):
        list(source.examples("train"))
    shard.unlink()
    with pytest.raises(InputError, match=message + ".*No such file"):
        source.labels("train")


def test_tfds_with_supervised_pair_and_id_uses_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    coarse = {"coarse_label": tfds.features.ClassLabel(num_classes=5)}
    features = {**IMAGE, **coarse, **LABEL, "id": tfds.features.Text()}
    install(monkeypatch, tmp_path, builder(features, supervised_keys=("image", "label")))
    source = opened("tfds", "tiny")
    assert source.class_names == ["cat", "dog"]
    assert {example.name for example in source.examples("train")} == {f"id-{index}" for index in range(10)}


COARSE = {"coarse": tfds.features.ClassLabel(names=["pet", "wild"])}
MASK = {"mask": tfds.features.Image(shape=(None, None, 3))}
DEPTH = {"image": tfds.features.Image(shape=(4, 4, 1), dtype=np.float32)}


@pytest.mark.parametrize(
    ("features", "columns", "message"),
    [
        (IMAGE, {}, "data.columns.label: expected one ClassLabel, received tiny with image (Image of uint8)"),
        (LABEL, {}, "data.columns.image: expected one Image of 8 or 16 bits, received tiny with label (ClassLabel)"),
        (
            IMAGE | LABEL | COARSE,
            {},
            "data.columns.label: expected a choice, as tiny has several, received null: write",
        ),
        (IMAGE | LABEL | MASK, {}, "data.columns.image: expected a choice, as tiny has several, received null: write"),
        (IMAGE | LABEL, {"label": "image"}, "data.columns.label: expected one ClassLabel, received 'image' of "),
        (
            IMAGE | LABEL,
            {"image": "nope"},
            "data.columns.image: expected one Image of 8 or 16 bits, received 'nope' of",
        ),
        (DEPTH | LABEL, {}, "data.columns.image: expected one Image of 8 or 16 bits, received tiny with"),
    ],
)
def test_tfds_without_one_image_and_one_label_is_refused(
    features: dict[str, Any], columns: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, tmp_path, builder(features))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        opened("tfds", "tiny", columns=columns)
    for key in features:
        assert key in str(error.value) or "choice" in message


def test_tfds_with_several_images_and_labels_reads_those_that_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    features = IMAGE | LABEL | COARSE | MASK
    install(monkeypatch, tmp_path, builder(features, supervised_keys=("image", "label")))
    assert opened("tfds", "tiny").class_names == ["cat", "dog"]
    source = opened("tfds", "tiny", columns={"image": "mask", "label": "coarse"})
    assert source.class_names == ["pet", "wild"]
    pixels = {int(decode_with_tensorflow(example.image).max()) for example in source.examples("train")}
    assert pixels == {MASK_VALUE}


def test_tfds_of_16_bits_gives_the_encoded_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = {"image": tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16, encoding_format="png")}
    install(monkeypatch, tmp_path, builder(image | LABEL))
    example = next(opened("tfds", "tiny").examples("train"))
    assert example.image[24] == 16  # PNG's bit depth
    assert np.asarray(images.read(example.image)).max() == 0


def test_tfds_of_array_record_gives_the_examples_of_tfrecord(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    features = IMAGE | LABEL | COARSE | MASK | {"id": tfds.features.Text()}
    read = {}
    for file_format in ("tfrecord", "array_record"):
        tiny = builder(features, supervised_keys=("image", "label"))
        tiny(data_dir=tmp_path / file_format, file_format=file_format).download_and_prepare()
        install(monkeypatch, tmp_path / file_format, tiny)
        source = opened("tfds", "tiny")
        assert [example.label for example in source.examples("train")] == source.labels("train").tolist()
        assert len(list(source.examples("train[2:6]+train[8:]"))) == 6
        read[file_format] = sorted(source.examples("train"))
    assert read["array_record"] == read["tfrecord"]


def test_tfds_of_array_record_without_names_numbers_the_examples(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = builder(IMAGE | LABEL)
    tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    install(monkeypatch, tmp_path, tiny)
    names = [example.name for example in opened("tfds", "tiny").examples("train[3:5]")]
    assert names == ["tiny-train.array_record__3", "tiny-train.array_record__4"]


def test_tfds_of_array_record_with_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = builder(IMAGE | LABEL)
    tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    install(monkeypatch, tmp_path, tiny)
    (shard,) = tmp_path.rglob("*.array_record-*")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    message = rf"data\.name: expected complete files in {tmp_path}.* of the format array_record, received: "
    with pytest.raises(InputError, match=message) as error:
        list(opened("tfds", "tiny").examples("train"))
    assert "\n" not in str(error.value)
    shard.unlink()
    with pytest.raises(InputError, match=message + ".*No such file"):
        opened("tfds", "tiny").labels("train")


def test_tfds_without_splits_takes_the_usual_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, builder(IMAGE | LABEL))
    with pytest.raises(
        InputError, match=r"data\.splits: .* found train \(10\); write data\.splits: \{train: \"train\[:80%"
    ):
        opened("tfds", "tiny", splits=None)


@pytest.mark.slow
def test_tfds_with_unknown_builder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"data\.name: expected a TFDS builder, received 'nonesuch'") as error:
        opened("tfds", "nonesuch")
    assert "\n" not in str(error.value)


def test_tfds_without_network_says_where_the_data_would_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(self: Any) -> None:
        raise ConnectionError("no network\nat all")

    tiny = builder({**IMAGE, **LABEL})
    monkeypatch.setattr(tiny, "download_and_prepare", offline)
    install(monkeypatch, tmp_path, tiny)
    with pytest.raises(InputError, match=r"data\.name: .*TFDS_DATA_DIR") as error:
        opened("tfds", "tiny")
    assert str(tmp_path) in str(error.value)
    assert "no network" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_tfds_groups_are_a_feature_and_another_one_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, builder({**IMAGE, **LABEL, "patient": tfds.features.Text()}))
    source = opened("tfds", "tiny", group="patient")
    groups = source.groups("train[2:]")
    assert groups.tolist() == [example.group for example in source.examples("train[2:]")]
    assert set(source.groups("train")) == {f"patient-{index}" for index in range(10)}
    assert opened("tfds", "tiny", group="label").groups("train[:3]").tolist() == [
        str(label) for label in opened("tfds", "tiny").labels("train[:3]")
    ]
    with pytest.raises(InputError, match=r"^data.group: expected one of label, patient in tiny, received 'image'$"):
        opened("tfds", "tiny", group="image")
