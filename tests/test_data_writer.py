"""`write`: which examples get which role, what dataset.json and the metrics say, and what is refused."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from pictures import (
    CIFAR,
    DIGITS,
    FEW_DIGITS,
    cats_and_dogs,
    decode_with_pillow,
    folder_data,
    needs_cifar,
    picture,
    with_orientation,
    write_picture,
)
from PIL import Image

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import images, writer
from flatmin.data.sources.base import Example
from flatmin.data.sources.bundled import DigitsSource
from flatmin.inputs.records import Records


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder; folders, which may be empty, have none."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def described(folder: Path) -> dict[str, Any]:
    return files.read_json(folder / "dataset.json")


def pixels(records: Records, role: str) -> list[np.ndarray]:
    return [np.asarray(image.read()) for image in records.stored(role, range(records.count(role)))]


def written(data: Data, folder: Path) -> Records:
    writer.write(data, folder)
    return Records(folder)


def refused(data: Data, tmp_path: Path) -> str:
    """Return the message of the error, after which no file may be left but the list of broken images."""
    with pytest.raises(InputError) as error:
        writer.write(data, tmp_path / "out" / "records")
    assert "\n" not in str(error.value)
    left = [path.name for path in (tmp_path / "out").glob("*")]
    assert left == (["broken.txt"] if "broken images" in str(error.value) else [])
    return str(error.value)


def values(nested: dict[str, Any]) -> Iterator[Any]:
    for value in nested.values():
        yield from values(value) if isinstance(value, dict) else [value]


# Files


@pytest.mark.slow
def test_write_of_digits_assigns_each_scan_to_one_role(tmp_path: Path) -> None:
    metrics = writer.write(Data.model_validate({**DIGITS, "image_size": 16}), tmp_path / "records")
    records = Records(tmp_path / "records")
    assert records.roles == ["train", "val", "test"]
    assert records.class_names == [str(digit) for digit in range(10)]
    assert metrics["roles"]["test"]["count"] == records.count("test") == 899
    assert metrics["digest"] == described(tmp_path / "records")["digest"]
    assert all(isinstance(value, int | str) for value in values(metrics))
    names = [name for role in records.roles for name in records.names(role)]
    assert len(names) == len(set(names)) == 1797
    for role in records.roles:
        assert records.mean_pixels(role) == 256
        counts = np.bincount(records.labels(role), minlength=10)
        assert list(described(tmp_path / "records")["roles"][role]["classes"].values()) == counts.tolist()


def test_write_keeps_image_name_and_label_together(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=2)
    records = written(folder_data(source, predict="test[:1]", test="test[1:]"), tmp_path / "records")
    for role in records.roles:
        for image, label, name in zip(pixels(records, role), records.labels(role), records.names(role), strict=True):
            np.testing.assert_array_equal(image, decode_with_pillow((source / name).read_bytes()))
            assert label == (-1 if role == "predict" else ["cat", "dog"].index(name.split("/")[1]))


def test_write_of_rotated_jpeg_describes_it_upright(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3)
    for class_name in ("cat", "dog"):
        write_picture(source / "test" / class_name / "rotated.jpg", 50, exif=with_orientation(6))
    records = written(folder_data(source), tmp_path / "records")
    stored = decode_with_pillow((source / "test" / "cat" / "rotated.jpg").read_bytes())
    for image in pixels(records, "test"):
        np.testing.assert_array_equal(image, np.rot90(stored, -1))
    assert described(tmp_path / "records")["roles"]["test"]["height"] == {"min": 12, "max": 12}


@pytest.mark.slow
def test_write_with_equal_seeds_gives_equal_bytes(tmp_path: Path) -> None:
    data = Data.model_validate({**FEW_DIGITS, "train_per_class": 20})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        writer.write(data.model_copy(update={"seed": seed}), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert Records(tmp_path / "a").digest("train") != Records(tmp_path / "c").digest("train")


def test_write_of_a_role_says_nothing_of_others(tmp_path: Path) -> None:
    """So more pictures of one role leave the outputs of the others, and what depends on them, as they are."""
    source = cats_and_dogs(tmp_path / "source", train=3, val=2, test=2)
    written(folder_data(source, val="val"), tmp_path / "before")
    write_picture(source / "test" / "dog" / "more.png", 90)
    write_picture(source / "new" / "1.png", 91)
    written(folder_data(source, val="val", predict="new"), tmp_path / "after")
    before, after = contents(tmp_path / "before"), contents(tmp_path / "after")
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert {name.partition("/")[0] for name in changed} == {"test", "predict", "dataset.json"}
    assert before["predict/index.csv"].count(b"\n") == 1, "a folder for the role that there is none of"


def test_write_counts_examples_that_no_role_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = cats_and_dogs(tmp_path / "source", train=6, test=2, extra=3)
    (source / "train/cat/00.png").write_bytes(b"broken")
    splits = {"train": "train[:10]", "test": "test", "unused": "extra"}
    data = folder_data(source, splits=splits, skip_broken=1, train_per_class=2)
    metrics = writer.write(data, tmp_path / "records")
    taken = sum(metrics["roles"][role]["count"] for role in ("train", "val", "test"))
    assert metrics["left_out"] == 2 * 6 + 2 * 2 + 2 * 3 - taken - metrics["broken"] > 6
    assert f"prepare: examples that no role takes: {metrics['left_out']}\n" in "".join(capsys.readouterr())


@pytest.mark.parametrize("image_size", ["auto", "original", 10])
def test_write_with_image_size_stores_pictures_of_it(image_size: Any, tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=1)
    data = folder_data(source, image_size=image_size)
    for largest, shorter in ((5, 5), (300, 8)):
        writer.write(data, tmp_path / "records", largest)
        sides = described(tmp_path / "records")["roles"]["train"]
        expected = {"auto": shorter, "original": 8, 10: 10}[image_size]
        assert sides["height"] == {"min": expected, "max": expected}
        assert abs(sides["width"]["min"] - 12 / 8 * expected) <= 0.5


def test_write_with_other_fit_changes_the_digest(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=1)
    found = [written(folder_data(source, fit=fit), tmp_path / fit) for fit in ("squash", "crop")]
    assert [records.fit("train") for records in found] == ["squash", "crop"]
    assert found[0].digest("train") != found[1].digest("train")


def test_write_counts_first_frames_and_dark_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=1)
    picture(5).save(source / "train/cat/moving.gif", save_all=True, append_images=[picture(6)])
    Image.fromarray(np.full((8, 8), 900, np.uint16)).save(source / "train/dog/dark.png")
    metrics = writer.write(folder_data(source), tmp_path / "records")
    assert (metrics["first_frames"], metrics["dark"]) == (1, 1)
    assert described(tmp_path / "records")["dark"]["names"] == ["train/dog/dark.png"]
    told = "".join(capsys.readouterr())
    assert "files with several frames or pages, of which the first is taken: 1" in told
    assert "less than a quarter of their range: 1, such as 'train/dog/dark.png'" in told
    assert "prepare: classes: cat, dog\n" in told


def test_write_to_existing_folder_replaces_it(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "old").touch()
    writer.write(Data.model_validate(FEW_DIGITS), tmp_path / "records")
    assert not (tmp_path / "records" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


@pytest.mark.parametrize(("examples", "size", "per_shard"), [(33, 2**27, 33), (4096, 1, 1)])
def test_write_starts_a_shard_when_one_is_full(
    examples: int, size: int, per_shard: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SHARD_EXAMPLES", examples)
    monkeypatch.setattr(writer, "SHARD_BYTES", size)
    data = Data.model_validate({**FEW_DIGITS, "train_per_class": 4})
    records = written(data, tmp_path / "records")
    shards = sorted(path.name for path in (tmp_path / "records/train").glob("*.tfrecord"))
    number = -(-40 // per_shard)
    assert shards == [f"{index:05d}-of-{number:05d}.tfrecord" for index in range(number)]
    assert [record["label"] for record in stored(tmp_path / "records")] == records.labels("train").tolist()
    assert len(pixels(records, "train")) == 40


def test_write_holds_one_image_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unread = most_unread = 0
    examples_of, read_picture = DigitsSource.examples, images.read_picture

    def examples(self: Any, expression: str) -> Iterator[Example]:
        nonlocal unread, most_unread
        for example in examples_of(self, expression):
            unread += 1
            most_unread = max(most_unread, unread)
            yield example

    def read(*arguments: Any) -> images.Picture:
        nonlocal unread
        unread -= 1
        return read_picture(*arguments)

    monkeypatch.setattr(DigitsSource, "examples", examples)
    monkeypatch.setattr(images, "read_picture", read)
    writer.write(Data.model_validate(FEW_DIGITS), tmp_path / "records")
    assert (unread, most_unread) == (0, 1)


# Roles


def test_write_with_train_per_class_leaves_val_alone(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=10, test=1)
    train: dict[int, set[str]] = {}
    val = []
    for size in (3, 5):
        records = written(folder_data(source, val_per_class=2, train_per_class=size), tmp_path / "records")
        assert Counter(records.labels("val").tolist()) == {0: 2, 1: 2}
        assert Counter(records.labels("train").tolist()) == {0: size, 1: size}
        train[size] = set(records.names("train"))
        val.append(records.names("val"))
    assert train[3] < train[5]
    assert val[0] == val[1]


def test_write_with_val_fraction_is_stratified(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=10, test=1)
    records = written(folder_data(source, val_fraction=0.3), tmp_path / "records")
    assert Counter(records.labels("val").tolist()) == {0: 3, 1: 3}
    assert Counter(records.labels("train").tolist()) == {0: 7, 1: 7}


def test_write_with_val_split_takes_all_of_it(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=4, val=2, test=1)
    records = written(folder_data(source, val="val", train_per_class=3), tmp_path / "records")
    assert [records.count(role) for role in records.roles] == [6, 4, 2]


def by_name(records: Records, role: str) -> dict[str, int]:
    """Each example's label by its name."""
    return dict(zip(records.names(role), records.labels(role).tolist(), strict=True))


def stored(folder: Path, role: str = "train") -> list[dict[str, int]]:
    """The numbers that each record of a role holds, read without the reader under test."""
    found = []
    for shard in sorted((folder / role).glob("*.tfrecord")):
        for record in tf.data.TFRecordDataset(str(shard)).as_numpy_iterator():
            features = tf.train.Example.FromString(record).features.feature
            found.append({key: value.int64_list.value[0] for key, value in features.items() if value.int64_list.value})
    return found


def true_label(name: str) -> int:
    """The label by the folder that an example's name begins with."""
    return ["cat", "dog"].index(name.split("/")[1])


def assert_keeps_true_labels(folder: Path, records: Records, roles: tuple[str, ...] = ("train",)) -> None:
    """Records and index of these roles hold the true labels beside those drawn; other roles hold no other labels."""
    for role in reversed(roles):
        with (folder / role / "index.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0])[:4] == ["name", "label", "true_label", "shard"]
        assert [int(row["true_label"]) for row in rows] == [true_label(row["name"]) for row in rows]
        assert [{key: int(row[key]) for key in ("label", "true_label")} for row in rows] == stored(folder, role)
        assert records.labels(role).tolist() == [int(row["label"]) for row in rows]
    # What a training reads: wrong labels are told by as much as there are classes.
    expected = [int(row["label"]) + 2 * (row["label"] != row["true_label"]) for row in rows]
    assert records.training_labels().tolist() == expected
    assert records.training_labels().dtype == np.int32
    for role in {"val", "test"} - set(roles):
        assert (folder / role / "index.csv").read_text().startswith("name,label,shard,")
        assert {tuple(record) for record in stored(folder, role)} == {("label",)}


def test_write_with_label_noise_changes_that_fraction_of_train_only(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=50, test=5)
    labels = []
    for name, noise in (("clean", 0.0), ("noisy", 0.2), ("again", 0.2)):
        data = folder_data(source, seed=3, val_per_class=10, label_noise=noise)
        metrics = writer.write(data, tmp_path / name)
        records = Records(tmp_path / name)
        assert metrics["wrong_labels"] == described(tmp_path / name)["roles"]["train"]["wrong_labels"] == noise * 80
        labels.append({role: by_name(records, role) for role in records.roles})
    clean, noisy, again = labels
    changed = [name for name, label in clean["train"].items() if noisy["train"][name] != label]
    assert len(changed) == 16
    assert len({clean["train"][name] for name in changed}) == 2
    assert (clean["val"], clean["test"]) == (noisy["val"], noisy["test"])
    assert noisy == again
    assert_keeps_true_labels(tmp_path / "noisy", Records(tmp_path / "noisy"))
    other_seed = written(folder_data(source, seed=4, val_fraction=0.2, label_noise=0.2), tmp_path / "seed")
    assert other_seed.labels("train").tolist() != Records(tmp_path / "noisy").labels("train").tolist()


def test_write_without_changed_labels_keeps_no_true_ones(tmp_path: Path) -> None:
    """So records of clean labels are what they were before there were true ones; a noise of no image is none."""
    source = cats_and_dogs(tmp_path / "source", train=5, test=1)
    records = written(folder_data(source), tmp_path / "records")
    assert (tmp_path / "records/train/index.csv").read_text().startswith("name,label,shard,")
    assert {tuple(record) for record in stored(tmp_path / "records")} == {("label",)}
    np.testing.assert_array_equal(records.training_labels(), records.labels("train"))
    written(folder_data(source, label_noise=0.01), tmp_path / "noisy")
    assert contents(tmp_path / "noisy") == contents(tmp_path / "records")


def test_write_with_shuffled_labels_permutes_them_within_train_and_within_val(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=40, test=5)
    for path in (source / "train/dog").glob("3*.png"):  # of cats there are more
        path.unlink()
    settings: dict[str, Any] = {"val_per_class": 8, "train_per_class": None}
    clean = written(folder_data(source, seed=3, **settings), tmp_path / "clean")
    found = {}
    for name, seed in (("shuffled", 3), ("again", 3), ("other", 4)):
        data = folder_data(source, seed=seed, shuffle_labels=True, **settings)
        metrics = writer.write(data, tmp_path / name)
        records = found[name] = Records(tmp_path / name)
        assert Counter(records.labels("train").tolist()) == {0: 32, 1: 22}, "as many of each class as before"
        assert Counter(records.labels("val").tolist()) == {0: 8, 1: 8}
        wrong = sum(label != true_label(name) for name, label in by_name(records, "train").items())
        assert metrics["wrong_labels"] == described(tmp_path / name)["roles"]["train"]["wrong_labels"] == wrong
        assert 10 < wrong < 50, "chance alone decides whether a label is its image's own"
        assert_keeps_true_labels(tmp_path / name, records, ("train", "val"))
    shuffled = found["shuffled"]
    assert contents(tmp_path / "shuffled") == contents(tmp_path / "again")
    assert by_name(shuffled, "test") == by_name(clean, "test")
    assert by_name(shuffled, "val") != by_name(clean, "val")
    assert [shuffled.names(role) for role in ("train", "val")] == [clean.names(role) for role in ("train", "val")]
    common = set(shuffled.names("train")) & set(found["other"].names("train"))
    differ = [name for name in common if by_name(shuffled, "train")[name] != by_name(found["other"], "train")[name]]
    assert len(differ) > len(common) / 5, "another seed permutes otherwise"


def test_write_with_shuffled_labels_of_given_splits_permutes_otherwise_by_the_seed_alone(tmp_path: Path) -> None:
    """TFDS keeps its order whatever the seed."""
    source = cats_and_dogs(tmp_path / "source", train=30, val=20, test=1)
    one, other = (
        written(folder_data(source, val="val", seed=seed, shuffle_labels=True), tmp_path / f"seed{seed}")
        for seed in (1, 2)
    )
    for role in ("train", "val"):
        assert set(by_name(one, role)) == set(by_name(other, role))
        assert by_name(one, role) != by_name(other, role)
    assert by_name(one, "test") == by_name(other, "test")


@pytest.mark.parametrize("changes", [{"label_noise": 0.5}, {"shuffle_labels": True}], ids=["noise", "shuffled"])
def test_write_with_changed_labels_and_broken_images_keeps_each_record_its_own(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    source = cats_and_dogs(tmp_path / "source", train=20, test=1)
    for index in range(0, 12, 3):
        (source / "train/cat" / f"{index:02d}.png").write_bytes(b"broken")
    data = folder_data(source, val_per_class=3, train_per_class=10, skip_broken=4, **changes)
    records = written(data, tmp_path / "records")
    assert records.count("train") == 20
    roles = ("train", "val") if data.shuffle_labels else ("train",)
    assert_keeps_true_labels(tmp_path / "records", records, roles)


def test_write_with_label_noise_and_val_split_counts_all_of_train(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=5, val=1, test=1)
    metrics = writer.write(folder_data(source, val="val", label_noise=0.5), tmp_path / "records")
    assert metrics["wrong_labels"] == 5


def test_write_with_broken_images_skipped_keeps_the_requested_counts(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=10, test=1)
    for index in range(4):
        (source / "train" / "cat" / f"{index:02d}.png").write_bytes(b"broken")
    metrics = writer.write(folder_data(source, val_per_class=3, skip_broken=4), tmp_path / "records")
    records = Records(tmp_path / "records")
    assert Counter(records.labels("val").tolist()) == {0: 3, 1: 3}
    assert Counter(records.labels("train").tolist()) == {0: 3, 1: 7}
    assert metrics["broken"] == len(described(tmp_path / "records")["broken"]) == 4


@needs_cifar
@pytest.mark.slow
def test_write_of_tfds_reads_its_splits(tmp_path: Path) -> None:
    splits = {"train": "train[:2000]", "test": "validation[:50]", "predict": "test[:20]"}
    data = Data.model_validate({"source": "tfds", "name": CIFAR, "splits": splits, "val_per_class": 1})
    records = written(data, tmp_path / "records")
    assert [records.count(role) for role in records.roles] == [1900, 100, 50, 20]
    assert described(tmp_path / "records")["version"] == "1.2.0"
    assert set(records.labels("predict")) == {-1}
    assert pixels(records, "predict")[0].shape == (72, 72, 3)


# Duplicates and classes


def test_write_with_equal_pictures_in_two_roles_names_them(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=4, val=2, test=2)
    write_picture(source / "test" / "dog" / "copy.png", 1)
    write_picture(source / "test" / "dog" / "copy.bmp", 1)
    write_picture(source / "train" / "cat" / "within.png", 1)
    metrics = writer.write(folder_data(source, val="val"), tmp_path / "records")
    assert metrics["duplicates"] == {"train_val": 0, "train_test": 2, "val_test": 0}
    listed = described(tmp_path / "records")["duplicates"]["train_test"]["names"]
    assert {name for _, name in listed} == {"test/dog/copy.png", "test/dog/copy.bmp"}
    assert {name for name, _ in listed} <= {"train/cat/00.png", "train/cat/within.png"}


def test_write_with_unlabelled_test_counts_no_classes(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3)
    write_picture(source / "test" / "1.png", 90)
    metrics = writer.write(folder_data(source), tmp_path / "records")
    assert metrics["roles"]["test"] == {"count": 1}
    assert Records(tmp_path / "records").labels("test").tolist() == [-1]


def test_write_counts_files_that_are_no_pictures(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=1)
    for file in ("train/cat/1.heic", "train/cat/2.HEIC", "train/.DS_Store", "readme.txt"):
        (source / file).touch()
    (source / "train" / "eel").mkdir()
    metrics = writer.write(folder_data(source), tmp_path / "records")
    info = files.read_json(tmp_path / "records" / "dataset.json")
    assert info["ignored"] == metrics["ignored"] == {"suffix": {"heic": 2, "txt": 1}, "hidden": {"none": 1}}
    assert info["empty"] == ["train/eel"]
    assert metrics["empty"] == 1


# Errors


def test_write_with_too_many_broken_images_names_three(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=6, test=2)
    for index in range(4):
        (source / "train" / "cat" / f"{index:02d}.png").write_bytes(b"broken")
    message = refused(folder_data(source, skip_broken=3), tmp_path)
    assert message.startswith("data.skip_broken: expected at most 3 broken images, received 4: train/cat/")
    assert message.count("train/cat/") == 3
    assert message.endswith(f", ...; all are listed in {tmp_path}/out/broken.txt")


def test_write_with_a_broken_image_is_refused_by_default(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=2)
    path = source / "test" / "cat" / "00.png"
    path.write_bytes(path.read_bytes()[:100])
    message = refused(folder_data(source), tmp_path)
    assert message.startswith("data.skip_broken: expected at most 0 broken images, received 1: test/cat/00.png (")
    path.write_bytes(b"")
    assert "received 1: test/cat/00.png (it is empty); all are listed in" in refused(folder_data(source), tmp_path)
    path.unlink()
    path.symlink_to("away.png")
    assert "test/cat/00.png (it is a link to a missing file)" in refused(folder_data(source), tmp_path)
    assert written(folder_data(source, skip_broken=1), tmp_path / "records").count("test") == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"test": "test+train[:3]"},
            "data.splits.test: expected each example only once, received train[0:3], which data.splits.train also",
        ),
        (
            {"train": "train[:4]+train[2:]"},
            "data.splits.train: expected each example only once, received train[2:4], which data.splits.train also",
        ),
        ({"val": "nope"}, "data.splits.val: expected slices of test (2), train (6)"),
        ({"predict": "test[:0]"}, "data.splits.predict: expected at least one example, received none with 'test[:0]'"),
        (
            {"val_per_class": 3},
            "data.val_per_class: expected to leave images of class 'cat' for training, received 3 for val out of 3",
        ),
        ({"val_fraction": 0.99}, "data.val_fraction: expected to leave images of class 'cat' for training"),
        (
            {"train_per_class": 3},
            "data.train_per_class: expected at most 2, the number of images left in class 'cat', received 3",
        ),
        (
            {"train": "train[:1]", "val": "train[1:]"},
            "data.splits.train: expected images of each class, received none",
        ),
    ],
)
def test_write_with_impossible_splits_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", test=1, train=3)
    assert refused(folder_data(source, **settings), tmp_path).startswith(message)


def test_write_with_unknown_labels_outside_predict_is_refused(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=1)
    write_picture(source / "new" / "1.png", 90)
    for splits, message in (
        ({"train": "train+new"}, "data.splits.train: expected labels from 0 to 1, received -1"),
        ({"val": "new"}, "data.splits.val: expected labels from 0 to 1, received -1"),
        ({"test": "test+new"}, "data.splits.test: expected labels from 0 to 1, received -1 in 1 of 3"),
    ):
        assert message in refused(folder_data(source, **splits), tmp_path)


def test_write_with_class_missing_from_train_is_refused(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, val=1, test=1)
    write_picture(source / "train" / "eel" / "1.png", 90)
    assert refused(folder_data(source, train="train[:2]", val="val+train[2:]"), tmp_path).startswith(
        "data.splits.train: expected images of each class, received none of 'eel' (1 of 3"
    )


def test_write_with_carriage_return_in_name_is_refused(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=1)
    write_picture(source / "train" / "cat" / "a\rb.png", 1)
    message = refused(folder_data(source), tmp_path)
    assert message.startswith("data.name: expected names without carriage returns, received")


def test_write_with_all_images_of_a_role_broken_is_refused(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=3, test=1)
    for class_name in ("cat", "dog"):
        (source / "test" / class_name / "00.png").write_bytes(b"")
    assert refused(folder_data(source, skip_broken=2), tmp_path).startswith(
        "data.splits.test: expected readable images, received none"
    )
