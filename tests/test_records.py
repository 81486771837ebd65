"""What `write` stores and refuses, and what `Records` reads back."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import images, sources
from flatmin.data.sources import Example
from flatmin.data.writer import write
from flatmin.inputs import records
from flatmin.inputs.records import Records

CIFAR = "visual_domain_decathlon/cifar100"
needs_tfds_data = pytest.mark.skipif(
    not (Path(os.environ.get("TFDS_DATA_DIR", "nowhere")) / CIFAR).is_dir(),
    reason=f"TFDS_DATA_DIR names no folder with {CIFAR}",
)


def put(path: Path, seed: int, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    Image.fromarray(pixels).save(path, **more)


def folder(root: Path, **splits: int) -> Path:
    """A folder with so many different images of cat and of dog in each split."""
    seed = 0
    for split, size in splits.items():
        for class_name in ("cat", "dog"):
            for index in range(size):
                put(root / split / class_name / f"{index:02d}.png", seed := seed + 1)
    return root


def data(name: Path | str, train: str = "train", test: str = "test", **more: Any) -> Data:
    splits = {"train": train, "test": test}
    for role in ("val", "predict"):
        if role in more:
            splits[role] = more.pop(role)
    values = {"source": "folder", "name": str(name), "splits": splits, **more}
    if not {"val_fraction", "val_per_class"} & set(more) and "val" not in splits:
        values["val_per_class"] = 1
    return Data.model_validate(values)


DIGITS = {
    "source": "bundled",
    "name": "digits",
    "splits": {"train": "train[:50%]", "test": "train[50%:]"},
    "val_fraction": 0.2,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(settings: Data, tmp_path: Path) -> str:
    """The message; nothing may be left behind."""
    with pytest.raises(InputError) as error:
        write(settings, 0, tmp_path / "out" / "records")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    return str(error.value)


def no_lists(values: dict[str, Any]) -> bool:
    return all(
        no_lists(value) if isinstance(value, dict) else isinstance(value, int | str) for value in values.values()
    )


def test_digits_come_back(tmp_path: Path) -> None:
    summary = write(Data.model_validate({**DIGITS, "image_size": 16}), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    assert read.roles == ["train", "val", "test"]
    assert read.class_names == [str(digit) for digit in range(10)]
    assert sum(read.count(role) for role in read.roles) == 1797
    assert summary["roles"]["test"]["count"] == read.count("test") == 899
    assert summary["digest"] == read.digest
    assert no_lists(summary)
    for role in read.roles:
        assert read.mean_pixels(role) == 256
        labels = read.labels(role)
        assert labels.dtype == np.int32
        images = list(read.images(role).as_numpy_iterator())
        assert all(image.shape == (16, 16, 3) and image.dtype == np.uint8 for image, _ in images)
        assert [label for _, label in images] == labels.tolist()
        assert len(read.names(role)) == len(labels) == read.count(role)
        counts = np.bincount(labels, minlength=10)
        assert list(read.info["roles"][role]["classes"].values()) == counts.tolist()
    everywhere = [name for role in read.roles for name in read.names(role)]
    assert len(set(everywhere)) == 1797


def test_images_names_and_labels_belong_together(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3, test=2)
    write(data(source, predict="test[:1]", test="test[1:]"), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    for role in read.roles:
        for (image, label), name in zip(read.images(role).as_numpy_iterator(), read.names(role), strict=True):
            np.testing.assert_array_equal(image, np.asarray(Image.open(source / name)))
            expected = -1 if role == "predict" else ["cat", "dog"].index(name.split("/")[1])
            assert label == expected


@pytest.mark.parametrize("is_wanted", [None, lambda position: position % 3 == 1])
def test_arrays_are_the_images_whatever_their_sizes(is_wanted: Callable[[Any], Any] | None, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=20, test=1)  # more than are handed over at once
    Image.new("RGB", (5, 9)).save(source / "train" / "cat" / "small.png")
    write(data(source), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    expected = [image for image, _ in read.images("train", is_wanted).as_numpy_iterator()]
    assert len({image.shape for image in expected}) == 2 if is_wanted is None else len(expected) == 13
    for one, other in zip(read.arrays("train", is_wanted), expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.uint8


def test_encoded_images_are_those_of_the_source(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3, test=2)
    write(data(source), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    stored = [image for image, _ in read._stored("test").map(records._parse).as_numpy_iterator()]
    assert stored == [(source / name).read_bytes() for name in read.names("test")]


def test_exif_rotation_is_in_the_records(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    for class_name in ("cat", "dog"):
        put(source / "test" / class_name / "turned.jpg", 50, exif=exif)
    write(data(source), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    stored = np.asarray(Image.open(source / "test" / "cat" / "turned.jpg"))
    for image, _ in read.images("test").as_numpy_iterator():
        np.testing.assert_array_equal(image, np.rot90(stored, -1))
    assert read.info["roles"]["test"]["height"] == {"min": 12, "max": 12}


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    settings = Data.model_validate({**DIGITS, "train_per_class": 20})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(settings, seed, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert Records(tmp_path / "a").digest != Records(tmp_path / "c").digest


def test_replaces_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "stale").touch()
    write(Data.model_validate(DIGITS), 0, tmp_path / "records")
    assert not (tmp_path / "records" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


@pytest.mark.parametrize(("shard", "shard_bytes", "held"), [(33, 2**27, 33), (4096, 1, 1)])
def test_a_shard_is_full_at_so_many_examples_or_bytes(
    shard: int, shard_bytes: int, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "SHARD", shard)
    monkeypatch.setattr(records, "SHARD_BYTES", shard_bytes)
    write(Data.model_validate(DIGITS), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    shards = sorted(path.name for path in (tmp_path / "records").glob("train-*"))
    number = -(-read.count("train") // held)
    assert shards == [f"train-{index:05d}-of-{number:05d}.tfrecord" for index in range(number)]
    labels = [label for _, label in read._stored("train").map(records._parse).as_numpy_iterator()]
    assert labels == read.labels("train").tolist()


def test_images_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = peak = 0
    plain_examples, plain_read = sources._Digits.examples, images.read_picture

    def examples(self: Any, expression: str) -> Iterator[Example]:
        nonlocal waiting, peak
        for example in plain_examples(self, expression):
            waiting += 1
            peak = max(peak, waiting)
            yield example

    def read(image: bytes, size: int | None = None) -> images.Picture:
        nonlocal waiting
        waiting -= 1
        return plain_read(image, size)

    monkeypatch.setattr(sources._Digits, "examples", examples)
    monkeypatch.setattr(datasets, "read_picture", read)
    write(Data.model_validate(DIGITS), 0, tmp_path / "records")
    assert (waiting, peak) == (0, 1)


# Carving


def test_val_per_class_and_train_per_class(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=10, test=1)
    kept: dict[int, set[str]] = {}
    vals = []
    for size in (3, 5):
        write(data(source, val_per_class=2, train_per_class=size), 0, tmp_path / "records")
        read = Records(tmp_path / "records")
        assert Counter(read.labels("val").tolist()) == {0: 2, 1: 2}
        assert Counter(read.labels("train").tolist()) == {0: size, 1: size}
        kept[size] = set(read.names("train"))
        vals.append(read.names("val"))
    assert kept[3] < kept[5]
    assert vals[0] == vals[1]


def test_label_noise_gives_a_share_of_train_other_classes(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=50, test=5)
    found = []
    for name, noise in (("clean", 0.0), ("noisy", 0.2), ("again", 0.2)):
        summary = write(data(source, val_per_class=10, label_noise=noise), 3, tmp_path / name)
        read = Records(tmp_path / name)
        roles = {role: dict(zip(read.names(role), read.labels(role).tolist(), strict=True)) for role in read.roles}
        assert summary["wrong_labels"] == read.info["wrong_labels"] == noise * 80
        found.append(roles)
    clean, noisy, again = found
    changed = [name for name, label in clean["train"].items() if noisy["train"][name] != label]
    assert len(changed) == 16
    assert len({clean["train"][name] for name in changed}) == 2
    assert (clean["val"], clean["test"]) == (noisy["val"], noisy["test"])
    assert noisy == again
    write(data(source, val_fraction=0.2, label_noise=0.2), 4, tmp_path / "seed")
    assert Records(tmp_path / "seed").labels("train").tolist() != Records(tmp_path / "noisy").labels("train").tolist()
    with_val = folder(tmp_path / "with_val", train=5, val=1, test=1)
    assert write(data(with_val, val="val", label_noise=0.5), 0, tmp_path / "all")["wrong_labels"] == 5


def test_val_fraction_is_stratified(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=10, test=1)
    write(data(source, val_fraction=0.3), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    assert Counter(read.labels("val").tolist()) == {0: 3, 1: 3}
    assert Counter(read.labels("train").tolist()) == {0: 7, 1: 7}


def test_a_split_of_its_own_for_val(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=4, val=2, test=1)
    write(data(source, val="val", train_per_class=3), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    assert [read.count(role) for role in read.roles] == [6, 4, 2]


def test_counts_come_out_although_images_are_broken(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=10, test=1)
    for index in range(4):
        (source / "train" / "cat" / f"{index:02d}.png").write_bytes(b"broken")
    summary = write(data(source, val_per_class=3, skip_broken=4), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    assert Counter(read.labels("val").tolist()) == {0: 3, 1: 3}
    assert Counter(read.labels("train").tolist()) == {0: 3, 1: 7}
    assert summary["broken"] == len(read.info["broken"]) == 4


# Duplicates and classes


def test_duplicates_across_roles_are_counted_and_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=4, val=2, test=2)
    put(source / "test" / "dog" / "copy.png", 1)
    put(source / "test" / "dog" / "copy.bmp", 1)
    put(source / "train" / "cat" / "within.png", 1)
    summary = write(data(source, val="val"), 0, tmp_path / "records")
    assert summary["duplicates"] == {"train_val": 0, "train_test": 2, "val_test": 0}
    named = Records(tmp_path / "records").info["duplicates"]["train_test"]["names"]
    assert {name for _, name in named} == {"test/dog/copy.png", "test/dog/copy.bmp"}
    assert {name for name, _ in named} <= {"train/cat/00.png", "train/cat/within.png"}


def test_class_names_can_be_given(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3, test=1)
    write(data(source, class_names=["Katze", "Hund"]), 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    assert read.class_names == ["Katze", "Hund"]
    assert "Katze" in (tmp_path / "records" / "dataset.json").read_text(encoding="utf-8")
    assert refused(data(source, class_names=["a", "b", "c"]), tmp_path).startswith(
        "data.class_names: expected 2 names, received 3"
    )


def test_test_labels_may_all_be_unknown(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3)
    put(source / "test" / "1.png", 90)
    summary = write(data(source), 0, tmp_path / "records")
    assert summary["roles"]["test"] == {"count": 1}
    assert Records(tmp_path / "records").labels("test").tolist() == [-1]


# What is refused


def test_broken_images_are_named_and_counted(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=6, test=2)
    for index in range(4):
        (source / "train" / "cat" / f"{index:02d}.png").write_bytes(b"broken")
    message = refused(data(source, skip_broken=3), tmp_path)
    assert message.startswith("data.skip_broken: expected at most 3 broken images, received 4: train/cat/")
    assert message.count("train/cat/") == 3
    assert message.endswith(", ...")


def test_a_broken_image_is_refused_by_default(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3, test=2)
    path = source / "test" / "cat" / "00.png"
    path.write_bytes(path.read_bytes()[:100])
    message = refused(data(source), tmp_path)
    assert message.startswith("data.skip_broken: expected at most 0 broken images, received 1: test/cat/00.png (")
    write(data(source, skip_broken=1), 0, tmp_path / "records")
    assert Records(tmp_path / "records").count("test") == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"test": "train[:3]"},
            r"data.splits.test: expected no example twice, received train[0:3], which data.splits.train",
        ),
        (
            {"train": "train[:4]+train[2:]"},
            "data.splits.train: expected no example twice, received train[2:4]",
        ),
        ({"val": "nope"}, "data.splits.val: expected slices of test (2), train (6)"),
        ({"predict": "test[:0]"}, "data.splits.predict: expected examples, received none"),
        (
            {"val_per_class": 3},
            "data.val_per_class: expected images of class 'cat' left to train on, received 3",
        ),
        ({"val_fraction": 0.99}, "data.val_fraction: expected images of class 'cat' left to train on"),
        ({"train_per_class": 3}, "data.train_per_class: expected at most 2, as class 'cat' has, received 3"),
        (
            {"train": "train[:1]", "val": "train[1:]"},
            "data.splits.train: expected images of each class, received none",
        ),
    ],
)
def test_impossible_splits(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "source", test=1, train=3)
    assert refused(data(source, **settings), tmp_path).startswith(message)


def test_unknown_labels_to_learn_from(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3, test=1)
    put(source / "new" / "1.png", 90)
    assert "data.splits.train: expected labels from 0 to 1, received -1" in refused(
        data(source, train="train+new"), tmp_path
    )
    assert "data.splits.val: expected labels from 0 to 1, received -1" in refused(data(source, val="new"), tmp_path)
    assert "data.splits.test: expected labels from 0 to 1, received -1 in 1 of 3" in refused(
        data(source, test="test+new"), tmp_path
    )


def test_a_single_class(tmp_path: Path) -> None:
    put(tmp_path / "source" / "cat" / "1.png", 1)
    settings = data(tmp_path / "source", train="train[:50%]", test="train[50%:]")
    assert refused(settings, tmp_path).startswith("data.name: expected two classes or more, received 1")


def test_a_class_that_train_lacks(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3, val=1, test=1)
    put(source / "test" / "eel" / "1.png", 90)
    assert refused(data(source, val="val"), tmp_path).startswith(
        "data.splits.train: expected images of each class, received none of 'eel' (1 of 3"
    )


def test_a_name_that_no_table_can_hold(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3, test=1)
    put(source / "train" / "cat" / "a\rb.png", 1)
    assert refused(data(source), tmp_path).startswith("data.name: expected names without carriage returns, received")


def test_all_of_a_role_is_broken(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3, test=1)
    for class_name in ("cat", "dog"):
        (source / "test" / class_name / "00.png").write_bytes(b"")
    assert refused(data(source, skip_broken=2), tmp_path).startswith(
        "data.splits.test: expected images that can be read, received none"
    )


# Reading


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    write(Data.model_validate(DIGITS), 0, tmp_path / "records")
    shard = next((tmp_path / "records").glob("val-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{shard.name}: expected \d+ bytes, received \d+; `dvc repro prepare`"):
        Records(tmp_path / "records")
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: expected \d+ bytes, received none"):
        Records(tmp_path / "records")
    (tmp_path / "records/dataset.json").write_text("{}")
    with pytest.raises(InputError, match=r"dataset.json: class_names: expected as prepare writes it, found none"):
        Records(tmp_path / "records")
    with pytest.raises(InputError, match=r"dataset\.json: expected a file that an earlier stage wrote"):
        Records(tmp_path)


def test_a_role_that_is_not_there(tmp_path: Path) -> None:
    write(Data.model_validate(DIGITS), 0, tmp_path / "records")
    with pytest.raises(InputError, match=r"expected the role predict, received train, val, test"):
        Records(tmp_path / "records").images("predict")


def test_labels_can_not_be_changed_by_accident(tmp_path: Path) -> None:
    write(Data.model_validate(DIGITS), 0, tmp_path / "records")
    with pytest.raises(ValueError, match="read-only"):
        Records(tmp_path / "records").labels("train")[0] = 3


def test_names_of_every_kind_come_back(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", train=3, test=1)
    strange = ['a,"b".png', "Ümlaut 🦭.png", "two\nlines.png"]
    for index, name in enumerate(strange):
        put(source / "test" / "cat" / name, 90 + index, format="PNG")
    write(data(source), 0, tmp_path / "records")
    assert {f"test/cat/{name}" for name in strange} < set(Records(tmp_path / "records").names("test"))


@needs_tfds_data
def test_tfds_records(tmp_path: Path) -> None:
    splits = {"train": "train[:2000]", "test": "validation[:50]", "predict": "test[:20]"}
    settings = Data.model_validate({"source": "tfds", "name": CIFAR, "splits": splits, "val_per_class": 1})
    summary = write(settings, 0, tmp_path / "records")
    read = Records(tmp_path / "records")
    assert [read.count(role) for role in read.roles] == [1900, 100, 50, 20]
    assert summary["version"] == "1.2.0"
    assert set(read.labels("predict")) == {-1}
    image, _ = next(read.images("predict").as_numpy_iterator())
    assert image.shape == (72, 72, 3)
