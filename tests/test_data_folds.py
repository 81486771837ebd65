"""Folds of a cross-validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import picture_folder
from test_data_groups import as_table, groups_of

from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import folds, writer
from flatmin.inputs.records import Records


def prepare(folder: Path, fold: int, count: int = 4, **data: Any) -> tuple[Records, dict[str, Any]]:
    values = {
        "source": "folder",
        "name": str(folder / "images"),
        "splits": {"train": "train", "test": None},
        "val_fraction": 0.25,
        "image_size": "original",
        "folds": count,
        "fold": fold,
        **data,
    }
    metrics = writer.write(Data.model_validate(values), folder / f"records-{fold}")
    return Records(folder / f"records-{fold}"), metrics


def test_folds_are_disjoint_stratified_and_together_all(tmp_path: Path) -> None:
    picture_folder(tmp_path / "images", classes=3, per_class=20)
    tested: list[str] = []
    for fold in range(4):
        records, metrics = prepare(tmp_path, fold)
        names = {role: records.names(role) for role in ("train", "val", "test")}
        assert sum(map(len, names.values())) == len(set().union(*names.values())) == 60
        assert np.bincount(records.labels("test")).tolist() == [5, 5, 5]
        assert np.bincount(records.labels("val")).tolist() == [4, 4, 4]
        assert metrics["left_out"] == 0
        tested += names["test"]
    assert len(set(tested)) == len(tested) == 60
    again, _ = prepare(tmp_path, 3)
    assert again.names("test") == tested[-15:]
    other, _ = prepare(tmp_path, 3, seed=1)
    assert other.names("test") != tested[-15:]


def test_folds_of_part_of_a_split_leave_the_rest_to_other_roles(tmp_path: Path) -> None:
    picture_folder(tmp_path / "images", classes=2, per_class=20)
    splits = {"train": "train[:50%]", "val": "train[50%:75%]", "predict": "train[75%:]", "test": None}
    records, _ = prepare(tmp_path, 1, splits=splits, val_fraction=None)
    assert [records.count(role) for role in ("train", "val", "test", "predict")] == [15, 10, 5, 10]


def test_folds_with_groups_are_of_whole_groups(tmp_path: Path) -> None:
    table = as_table(tmp_path)
    tested = []
    for fold in range(3):
        records, metrics = prepare(tmp_path, fold, 3, **table)
        roles = [groups_of(records, role) for role in ("train", "val", "test")]
        assert sum(map(len, roles)) == len(set().union(*roles)) == 12
        assert metrics["groups"]["test"] == len(roles[2])
        tested += sorted(roles[2])
    assert len(set(tested)) == len(tested) == 12


def test_folds_with_label_noise_change_train_alone(tmp_path: Path) -> None:
    picture_folder(tmp_path / "images", classes=2, per_class=20)
    records, metrics = prepare(tmp_path, 0, label_noise=0.2)
    assert metrics["wrong_labels"] == round(0.2 * records.count("train")) > 0
    for role in ("val", "test"):
        assert [f"class{label}" for label in records.labels(role)] == [
            name.split("/")[0] for name in records.names(role)
        ]
    wrong = [
        f"class{label}" != name.split("/")[0]
        for label, name in zip(records.labels("train"), records.names("train"), strict=True)
    ]
    assert sum(wrong) == metrics["wrong_labels"]


def test_more_folds_than_groups_or_images_of_a_class_are_refused(tmp_path: Path) -> None:
    picture_folder(tmp_path / "images", classes=2, per_class=3)
    with pytest.raises(
        InputError, match=r"^data.folds: expected at most 3, the number of images of the largest class, r"
    ):
        prepare(tmp_path, 0, 4)
    groups, labels = np.array(["a", "b", "b", "a", "a"]), np.array([0, 1, 0, 0, 1])
    with pytest.raises(InputError, match=r"^data.folds: expected at most 2, the number of groups, received 3$"):
        folds.in_fold(labels, groups, 3, 0, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"splits": {"train": "train", "val": "train[:10%]", "test": None}, "val_fraction": None},
        {"splits": {"train": "train[:60%]", "predict": "train[50%:]", "test": None}},
        {"splits": {"train": "train[:60%]+train[50%:]", "test": None}},
    ],
)
def test_folds_of_images_that_another_role_or_slice_has_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    picture_folder(tmp_path / "images", classes=2, per_class=20)
    with pytest.raises(InputError, match=r"^data.splits.*: expected each example only once, received train\["):
        prepare(tmp_path, 0, **changes)
    assert not (tmp_path / "records-0").exists()
