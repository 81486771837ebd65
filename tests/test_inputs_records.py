"""`Records`: what it reads back from a folder of records, and which folders it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from pictures import FEW_DIGITS, cats_and_dogs, folder_data, write_picture
from PIL import Image

from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import writer
from flatmin.inputs import records
from flatmin.inputs.records import Records


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of records of some digits; tests only read it."""
    folder = tmp_path_factory.mktemp("digits") / "records"
    writer.write(Data.model_validate(FEW_DIGITS), folder)
    return folder


def test_records_images_match_labels_and_counts(digits: Path) -> None:
    read = Records(digits)
    assert read.roles == ["train", "val", "test"]
    for role in read.roles:
        labels = read.labels(role)
        assert labels.dtype == np.int32
        images = list(read.images(role).as_numpy_iterator())
        assert all(image.shape == (8, 8, 3) and image.dtype == np.uint8 for image, _ in images)
        assert [label for _, label in images] == labels.tolist()
        assert len(read.names(role)) == len(labels) == read.count(role)


def test_records_hold_the_sources_bytes(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=2)
    writer.write(folder_data(source), tmp_path / "records")
    read = Records(tmp_path / "records")
    stored = [image for image, _ in read._stored("test").map(records._parse).as_numpy_iterator()]
    assert stored == [(source / name).read_bytes() for name in read.names("test")]


@pytest.mark.parametrize("keep", [None, lambda position: position % 3 == 1], ids=["all", "every third"])
@pytest.mark.parametrize("different_sizes", [False, True])
def test_records_arrays_equal_images(different_sizes: bool, keep: Callable[[Any], Any] | None, tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=20, test=1)  # more than one batch
    if different_sizes:
        Image.new("RGB", (5, 9)).save(source / "train" / "cat" / "small.png")
    writer.write(folder_data(source), tmp_path / "records")
    read = Records(tmp_path / "records")
    positions = [position for position in range(read.count("train")) if keep is None or keep(position)]
    every = [image for image, _ in read.images("train").as_numpy_iterator()]
    images = [image for image, _ in read.images("train", keep).as_numpy_iterator()]
    for arrays in (images, list(read.arrays("train", keep))):
        for array, position in zip(arrays, positions, strict=True):
            np.testing.assert_array_equal(array, every[position])
            assert array.dtype == np.uint8
    assert len({image.shape for image in every}) == 1 + different_sizes


def test_records_names_of_any_kind_are_unchanged(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=1)
    names = ['a,"b".png', "Ümlaut 🦭.png", "two\nlines.png"]
    for index, name in enumerate(names):
        write_picture(source / "test" / "cat" / name, 90 + index, format="PNG")
    writer.write(folder_data(source), tmp_path / "records")
    assert {f"test/cat/{name}" for name in names} < set(Records(tmp_path / "records").names("test"))


def test_records_labels_are_read_only(digits: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        Records(digits).labels("train")[0] = 3


def test_records_without_the_role_say_which_there_are(digits: Path) -> None:
    with pytest.raises(InputError, match=r"expected the role predict, received train, val, test"):
        Records(digits).images("predict")


def test_records_with_damaged_file_name_it(tmp_path: Path) -> None:
    writer.write(folder_data(cats_and_dogs(tmp_path / "source", train=3, test=1)), tmp_path / "records")
    shard = next((tmp_path / "records").glob("val-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{shard.name}: expected \d+ bytes, received \d+; `dvc repro prepare`"):
        Records(tmp_path / "records")
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: expected \d+ bytes, received none"):
        Records(tmp_path / "records")


def test_records_without_description_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset\.json: expected a file that an earlier stage wrote"):
        Records(tmp_path)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(InputError, match=r"dataset\.json: class_names: expected as prepare writes it, found none"):
        Records(tmp_path)


def test_without_autotune_disables_it_and_keeps_the_elements() -> None:
    dataset = records.without_autotune(tf.data.Dataset.range(3))
    assert dataset.options().autotune.enabled is False
    assert list(dataset.as_numpy_iterator()) == [0, 1, 2]
