"""The pictures for the report: which ones, and how many at most."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fixtures import tiny_params
from PIL import Image

from flatmin.common import params
from flatmin.data import writer
from flatmin.evaluation import gallery
from flatmin.inputs import thumbnails
from flatmin.inputs.records import Records
from flatmin.inputs.thumbnails import Gallery

CLASSES = gallery.CLASSES + 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of more classes than are shown, and of more pictures; train's and test's first pictures are equal."""
    folder = tmp_path_factory.mktemp("gallery")
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in range(CLASSES):
            for index in range(gallery.EACH + 1 if label == 0 else 1):
                pixels = random.integers(0, 256, (200, 300, 3), np.uint8)
                path = folder / f"images/{split}/{label:02d}/{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if index == 0:
                    pixels = np.full((8, 8, 3), label, np.uint8)
                Image.fromarray(pixels).save(path)
    data = {
        "source": "folder",
        "name": str(folder / "images"),
        "splits": {"train": "train", "val": "val", "test": "test"},
        "image_size": "original",
    }
    settings = params.parse(tiny_params() | {"data": data})
    writer.write(settings.data, folder / "records")
    return folder


def test_add_writes_a_small_copy_once(folder: Path, tmp_path: Path) -> None:
    records = Records(folder / "records")
    shown = Gallery(records, tmp_path)
    large = records.names("train").index(next(name for name in records.names("train") if name.endswith("00/1.png")))
    name = shown.add("train", large)
    assert shown.add("train", large) == name
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with Image.open(tmp_path / name) as picture:
        assert picture.size == (thumbnails.SIDE, round(thumbnails.SIDE * 200 / 300))
        assert picture.format == "JPEG", "noise is smaller as one"
    flat = records.names("train").index(next(name for name in records.names("train") if name.endswith("01/0.png")))
    assert shown.add("train", flat).endswith(".png")


def test_classes_shown_are_all_or_those_recognised_worst() -> None:
    names = [str(label) for label in range(CLASSES)]
    assert gallery.classes_shown(names[:4], {}) == [0, 1, 2, 3]
    recall = dict.fromkeys(names, 1.0) | {names[-1]: 0.2, names[-2]: 0.5}
    shown = gallery.classes_shown(names, recall)
    assert len(shown) == gallery.CLASSES
    assert shown == [*range(gallery.CLASSES - 2), CLASSES - 2, CLASSES - 1]
    del recall[names[0]]  # test has no image of it
    assert gallery.classes_shown(names, recall)[0] == 1


def test_examples_are_at_most_a_few_of_each_class(folder: Path, tmp_path: Path) -> None:
    records = Records(folder / "records")
    found = gallery.examples(Gallery(records, tmp_path), records, [0, 1])
    assert list(found) == ["train", "val", "test"]
    assert [len(found["train"][name]) for name in ("00", "01")] == [gallery.EACH, 1]
    assert len(set(found["train"]["00"])) == gallery.EACH


def test_duplicates_are_pairs_of_equal_pictures(folder: Path, tmp_path: Path) -> None:
    records = Records(folder / "records")
    found = gallery.duplicates(Gallery(records, tmp_path), records, folder / "records/dataset.json")
    count = json.loads((folder / "records/dataset.json").read_text())["duplicates"]["train_test"]["count"]
    assert count == CLASSES
    assert len(found["train_test"]) == gallery.DUPLICATES
    for first, second in found["train_test"]:
        assert first != second
        assert (tmp_path / first).read_bytes() == (tmp_path / second).read_bytes()


def test_confused_are_the_most_frequent_pairs(folder: Path, tmp_path: Path) -> None:
    records = Records(folder / "records")
    labels = records.labels("test")
    predicted = labels.copy()
    predicted[labels == 0] = 7
    predicted[labels == 3] = 4
    most, other = gallery.confused(Gallery(records, tmp_path), records, predicted, labels)
    assert (most["actual"], most["predicted"], most["count"], most["of"]) == (
        "00",
        "07",
        gallery.EACH + 1,
        gallery.EACH + 1,
    )
    assert len(most["pictures"]) == min(gallery.IN_PAIR, gallery.EACH + 1)
    assert (other["actual"], other["predicted"], other["count"]) == ("03", "04", 1)
    assert gallery.confused(Gallery(records, tmp_path), records, labels, labels) == []
