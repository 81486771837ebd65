"""Groups of images that no two roles share."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import groups, writer
from flatmin.inputs.records import Records

SIZES = [3, 5, 8, 2, 6, 4, 7, 1, 9, 5, 4, 6]  # images of each person


def people() -> list[tuple[str, str, str]]:
    """Name, class and group of each image: a person has images of both classes."""
    return [
        (f"{('cat', 'dog')[index % 3 % 2]}/p{person:02d}_{index}.png", ("cat", "dog")[index % 3 % 2], f"p{person:02d}")
        for person, size in enumerate(SIZES)
        for index in range(size)
    ]


def write_images(folder: Path) -> None:
    for number, (name, _, _) in enumerate(people()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)


def as_folder(folder: Path) -> dict[str, Any]:
    write_images(folder / "images")
    return {"source": "folder", "name": str(folder / "images"), "group": r"(p\d+)_"}


def as_table(folder: Path) -> dict[str, Any]:
    write_images(folder)
    with (folder / "table.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "person"])
        rows.writerows(people())
    return {"source": "table", "name": str(folder / "table.csv"), "group": "person"}


def prepare(folder: Path, data: dict[str, Any]) -> tuple[Records, dict[str, Any]]:
    """Write records; their reader and the metrics."""
    settings = Data.model_validate({"image_size": "original", **data})
    metrics = writer.write(settings, folder / "records")
    return Records(folder / "records"), metrics


def groups_of(records: Records, role: str) -> set[str]:
    found = records.groups(role)
    assert found is not None
    return set(found)


@pytest.mark.parametrize("source", [as_folder, as_table])
@pytest.mark.parametrize(
    "splits",
    [
        {"train": "train[:60%]", "val": "train[60%:80%]", "test": "train[80%:]"},
        {"train": "train[:80%]", "test": "train[80%:]"},
    ],
)
def test_percent_slices_and_val_take_whole_groups_near_the_sizes(
    tmp_path: Path, source: Callable[[Path], dict[str, Any]], splits: dict[str, str]
) -> None:
    val = {} if "val" in splits else {"val_fraction": 0.25}
    records, metrics = prepare(tmp_path, source(tmp_path) | {"splits": splits, **val})
    roles = {role: groups_of(records, role) for role in ("train", "val", "test")}
    assert sum(len(each) for each in roles.values()) == len(set().union(*roles.values())) == len(SIZES)
    assert metrics["groups"] == {role: len(each) for role, each in roles.items()}
    total = sum(SIZES)
    for role, share in {"train": 0.6, "val": 0.2, "test": 0.2}.items():
        assert abs(records.count(role) - share * total) <= max(SIZES) / 2 + 1, role
        cats = (records.labels(role) == 0).mean()
        assert abs(cats - records.labels("train").mean()) < 1
        assert 0.4 < cats < 0.95
    # Every image of a person is in the role of that person.
    for role, each in roles.items():
        assert records.count(role) == sum(size for person, size in enumerate(SIZES) if f"p{person:02d}" in each)


def test_carving_depends_on_the_seed_and_nothing_else(tmp_path: Path) -> None:
    data = as_folder(tmp_path) | {"splits": {"train": "train[:80%]", "test": "train[80%:]"}, "val_fraction": 0.2}
    chosen = []
    for seed in (1, 1, 2, 3):
        records, _ = prepare(tmp_path, data | {"seed": seed})
        chosen.append((frozenset(groups_of(records, "val")), frozenset(groups_of(records, "test"))))
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


def test_train_per_class_keeps_what_val_and_test_are(tmp_path: Path) -> None:
    data = as_folder(tmp_path) | {"splits": {"train": "train[:80%]", "test": "train[80%:]"}, "val_fraction": 0.2}
    records, _ = prepare(tmp_path, data)
    before = {role: records.names(role) for role in ("val", "test")}
    few, _ = prepare(tmp_path, data | {"train_per_class": 3})
    assert {role: few.names(role) for role in ("val", "test")} == before
    assert np.bincount(few.labels("train")).tolist() == [3, 3]


def test_records_without_groups_have_no_column_and_metrics_say_unknown(tmp_path: Path) -> None:
    data = as_folder(tmp_path) | {"group": None, "splits": {"train": "train[:80%]", "test": "train[80%:]"}}
    records, metrics = prepare(tmp_path, data | {"val_fraction": 0.2})
    assert records.groups("train") is None
    assert metrics["groups"] == "unknown"
    assert json.loads((tmp_path / "records/dataset.json").read_text())["groups"] is None
    assert "group" not in (tmp_path / "records/train/index.csv").read_text().splitlines()[0].split(",")


def refused(folder: Path, data: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        prepare(folder, data)
    assert "\n" not in str(error.value)
    assert not (folder / "records").exists()
    return str(error.value)


def test_slice_by_numbers_that_divides_a_group_is_refused(tmp_path: Path) -> None:
    data = as_folder(tmp_path) | {"splits": {"train": "train[:40]", "val": "train[40:50]", "test": "train[50:]"}}
    assert "data.group: expected each group in one role, received 'p" in refused(tmp_path, data)


def test_given_splits_that_share_a_group_are_refused(tmp_path: Path) -> None:
    for split, person in (("train", 1), ("train", 2), ("val", 3), ("test", 2)):
        for name in ("cat", "dog"):
            path = tmp_path / "images" / split / name / f"p{person}_0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    data = {"source": "folder", "name": str(tmp_path / "images"), "group": r"p\d"}
    expected = "expected each group in one role, received 'p2' in train and test"
    assert expected in refused(tmp_path, data)
    data["group"] = r"/p\d_"
    for path in (tmp_path / "images/test").rglob("p2*"):
        path.rename(path.with_name("p4_0.png"))
    assert prepare(tmp_path, data)[1]["groups"] == {"train": 2, "val": 1, "test": 1}


def test_fewer_groups_than_roles_are_refused(tmp_path: Path) -> None:
    for index in range(40):
        path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"p{index // 20}_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    data = {"source": "folder", "name": str(tmp_path / "images"), "group": r"p\d"}
    three = {"splits": {"train": "train[:50%]", "val": "train[50%:75%]", "test": "train[75%:]"}}
    assert "expected at least 3 groups in train, one for each role, received 2" in refused(tmp_path, data | three)
    carved = {"splits": {"train": "train[:50%]", "test": "train[50%:]"}, "val_fraction": 0.5}
    assert "expected at least 2 groups in train's split" in refused(tmp_path, data | carved)


def test_path_without_a_group_and_row_without_one_are_refused(tmp_path: Path) -> None:
    splits = {"splits": {"train": "train[:80%]", "test": "train[80%:]"}, "val_fraction": 0.2}
    data = as_folder(tmp_path) | splits
    assert "data.group: expected a pattern that finds a group in each path" in refused(
        tmp_path, data | {"group": r"x\d+"}
    )
    table = as_table(tmp_path) | splits
    path = tmp_path / "table.csv"
    path.write_text(path.read_text().replace("cat,p00", "cat,"))
    assert "data.group: line 2: expected a group, received none for 'cat/p00_0.png'" in refused(tmp_path, table)
    assert "data.group: expected one column 'patient' in" in refused(tmp_path, table | {"group": "patient"})


def test_snap_takes_the_nearest_cuts_and_never_the_same_one() -> None:
    possible = np.array([10, 20, 90])
    assert groups.snap([50, 60], possible, "x") == {50: 20, 60: 90}
    assert groups.snap([88, 89, 91], possible, "x") == {88: 10, 89: 20, 91: 90}
    assert groups.snap([14], possible, "x") == {14: 10}
    assert groups.snap([], possible, "x") == {}


def test_in_order_of_any_first_part_has_the_classes_in_proportion() -> None:
    random = np.random.default_rng(0)
    names = np.array([f"g{number}" for number in random.integers(0, 200, 4000)])
    labels = random.choice(3, 4000, p=[0.7, 0.2, 0.1])
    order = groups.in_order(names, labels, 5)
    assert sorted(order) == list(range(4000))
    assert len(groups.ends(names[order])) == len(np.unique(names)) - 1, "a group is in several places"
    for share in (0.1, 0.3, 0.8):
        part = labels[order[: int(share * 4000)]]
        assert np.bincount(part) / len(part) == pytest.approx(np.bincount(labels) / 4000, abs=0.03)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("percent", "nearest"), [(10, 10), (20, 20), (50, 60), (80, 100)])
def test_slice_and_val_beside_large_groups_are_as_near_as_groups_allow(
    tmp_path: Path, seed: int, percent: int, nearest: int
) -> None:
    """Groups of 50, 50, 10, 5 and 5 images; in some of their orders there is no cut between 20 and 70."""
    names = np.repeat(["p0", "p1", "p2", "p3", "p4"], [50, 50, 10, 5, 5])
    labels = np.arange(120) % 2
    assert groups.carve(names, labels, percent / 100, seed).sum() == nearest
    for index, name in enumerate(names):
        path = tmp_path / "images" / ("cat", "dog")[labels[index]] / f"{name}_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    splits = {"train": f"train[{percent}%:]", "test": f"train[:{percent}%]"}
    data = {"source": "folder", "name": str(tmp_path / "images"), "group": r"p\d", "seed": seed}
    source = writer.open_source(Data.model_validate({**data, "splits": splits, "val_fraction": 0.1}))
    assert len(source.labels(splits["test"])) == nearest
