"""The CIFAR-100 study's results: its records give the committed files, and wrong records are refused."""

from __future__ import annotations

import csv
import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from flatmin.common import files
from flatmin.common.errors import InputError

STUDY = ROOT / "studies/cifar100"
sys.path.append(str(STUDY))
results: Any = importlib.import_module("results")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A copy of the study's folder."""
    return Path(shutil.copytree(STUDY, tmp_path / "study"))


def edit(table: Path, change: Callable[[list[dict[str, str]]], None]) -> None:
    """Rewrite a table's rows."""
    with table.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), list(reader.fieldnames or [])
    change(rows)
    files.write_csv(table, columns, [[row[column] for column in columns] for row in rows])


def test_difference_of_three_seeds_has_the_interval_of_students_t() -> None:
    first = {seed: {"test accuracy": value} for seed, value in ((1, 0.71), (2, 0.72), (3, 0.73), (4, 0.9))}
    second = {seed: {"test accuracy": value} for seed, value in ((1, 0.70), (2, 0.70), (3, 0.70))}
    # 1, 2 and 3 points: their mean has a standard error of 1/sqrt(3), and t of two degrees of freedom is 4.3027.
    assert results.difference(first, second) == "+2.00 [-0.48, +4.48]"
    assert results.difference({1: first[1]}, second) == "+1.00"
    assert results.difference({4: first[4]}, second) == ""


def set_cells(row: int, **cells: str) -> Callable[[list[dict[str, str]]], None]:
    def change(rows: list[dict[str, str]]) -> None:
        rows[row].update(cells)

    return change


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("sweep", set_cells(0, results_version="2"), r"expected results version 1, received 2$"),
        ("sweep", set_cells(-1, **{"sam.every": "4"}), r"expected SAM with finetune of twice its epochs, .*every 4$"),
        ("sweep", set_cells(-1, **{"sam.every": ""}), r"sam.every: expected the grid to set it, as it sets sam.epochs"),
        ("sweep", set_cells(-1, seed="42"), r"expected one run of seed 42, received two of EfficientNetLite0, 72 px"),
    ],
)
def test_write_wrong_table_is_refused_and_nothing_written(
    study: Path, table: str, change: Callable[[list[dict[str, str]]], None], message: str
) -> None:
    edit(study / f"grids/{table}.csv", change)
    before = {path: path.read_bytes() for path in study.glob("*.*")}
    with pytest.raises(InputError, match=message) as caught:
        results.write(study)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in study.glob("*.*")} == before


def test_write_two_tables_with_one_run_are_refused(study: Path) -> None:
    shutil.copy(study / "grids/long.csv", study / "grids/other.csv")
    with pytest.raises(InputError, match=r"expected it in one table, received two: long, other$"):
        results.write(study)
