"""`Records`: what it reads back from a folder of records, which files it opens, and which folders it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import FEW_DIGITS, cats_and_dogs, folder_data, write_picture
from PIL import Image

from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import writer
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
        stored = read.stored(role, range(read.count(role)))
        pictures = [each.read() for each in stored]
        assert all(picture.size == (8, 8) and picture.mode == "RGB" for picture in pictures)
        assert all((each.height, each.width) == (8, 8) for each in stored)
        assert read.mean_pixels(role) == 64
        assert [each.name for each in stored] == read.names(role)
        assert len(labels) == read.count(role)


def test_records_stored_is_of_the_positions_asked_for_and_holds_the_sources_bytes(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=4)
    Image.new("RGB", (5, 9)).save(source / "test" / "cat" / "small.png")
    writer.write(folder_data(source), tmp_path / "records")
    read = Records(tmp_path / "records")
    every = read.stored("test", range(read.count("test")))
    assert read.stored("test", [5, 2]) == [every[5], every[2]]
    assert read.stored("test", np.arange(0, 9, 3)) == every[::3]
    assert {(each.height, each.width) for each in every} == {(8, 12), (9, 5)}
    for each in every:
        with open(each.shard, "rb") as file:
            file.seek(each.offset)
            assert file.read(each.bytes) == (source / each.name).read_bytes()
        with Image.open(source / each.name) as picture:
            np.testing.assert_array_equal(np.asarray(each.read()), np.asarray(picture))


def test_records_open_only_the_roles_that_are_asked_for(digits: Path, tmp_path: Path) -> None:
    for role in ("train", "val"):
        shutil.copytree(digits / role, tmp_path / role)
    (tmp_path / "test").mkdir()
    read = Records(tmp_path)
    assert read.roles == ["train", "val"]
    assert read.class_names == Records(digits).class_names
    assert read.fit("val") == "squash"
    assert read.digest("val") == Records(digits).digest("val") != read.digest("train")
    (tmp_path / "val" / "role.json").write_text("{")
    assert Records(tmp_path).count("train") == 240
    with pytest.raises(InputError, match=r"val/role.json: expected JSON"):
        Records(tmp_path).count("val")


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
        Records(digits).count("predict")


def test_records_with_damaged_file_name_it(tmp_path: Path) -> None:
    writer.write(folder_data(cats_and_dogs(tmp_path / "source", train=3, test=1)), tmp_path / "records")
    shard = next((tmp_path / "records/val").glob("*.tfrecord"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{shard.name}: expected \d+ bytes, received \d+; `dvc repro prepare`"):
        Records(tmp_path / "records").count("val")
    shard.unlink()
    with pytest.raises(InputError, match=rf"{shard.name}: expected \d+ bytes, received none"):
        Records(tmp_path / "records").count("val")
    assert Records(tmp_path / "records").count("train") == 4


def test_records_with_index_of_other_bytes_name_it(tmp_path: Path) -> None:
    writer.write(folder_data(cats_and_dogs(tmp_path / "source", train=3, test=1)), tmp_path / "records")
    index = tmp_path / "records/train/index.csv"
    content = index.read_text()
    index.write_text(content.replace(",0,", ",1,", 1))  # a label, in as many bytes
    assert len(content) == index.stat().st_size
    with pytest.raises(InputError, match=r"train/index\.csv: expected it as prepare wrote it, received other bytes"):
        Records(tmp_path / "records").labels("train")


def test_stored_image_of_other_bytes_is_an_error_that_names_it(tmp_path: Path) -> None:
    writer.write(folder_data(cats_and_dogs(tmp_path / "source", train=3, test=1)), tmp_path / "records")
    first, second = Records(tmp_path / "records").stored("test", [0, 1])
    content = bytearray(Path(first.shard).read_bytes())
    content[first.offset + first.bytes // 2] ^= 1
    Path(first.shard).write_bytes(content)
    expected = rf"{first.shard}: expected '{first.name}' as prepare wrote it .*, received other bytes$"
    with pytest.raises(InputError, match=expected):
        first.read()
    assert second.read().size == (12, 8)
    with pytest.raises(InputError, match=r"received other bytes$"):
        second._replace(offset=10**6).read()


def test_records_without_description_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train/role\.json: expected a file that an earlier stage wrote"):
        Records(tmp_path).count("train")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/role.json").write_text("{}")
    with pytest.raises(InputError, match=r"train/role\.json: class_names: expected as prepare writes it, found none"):
        Records(tmp_path).count("train")
    info = json.loads((digits / "train/role.json").read_text())
    del info["fit"]
    (tmp_path / "train/role.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match=r"fit: expected as prepare writes it, found none"):
        Records(tmp_path).count("train")
