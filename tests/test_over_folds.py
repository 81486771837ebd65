"""The table of means over folds."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest
from repository import ROOT

from flatmin.common import files
from flatmin.common.errors import InputError

sys.path.append(str(ROOT / "scripts"))
import over_folds

GAINS = (0.01, 0.03, 0.02, -0.01)
HEADER = ["name", "status", "data.folds", "data.fold", "sam.rho", *over_folds.METHODS.values()]
HEADER += over_folds.GAINS.values()


def write(path: Path, folds: tuple[int, ...] = (0, 1, 2, 3), status: str = "succeeded") -> Path:
    """Two settings, each with a run for each fold; SAM's gain differs by rho."""
    rows = [
        [f"run-{rho}-{fold}", status, 4, fold, rho, 0.5, 0.6, 0.7, 0.8, rho * GAINS[fold], 0.1]
        for rho in (1, 2)
        for fold in reversed(folds)
    ]
    files.write_csv(path, HEADER, rows)
    return path


def test_interval_is_wider_than_that_of_independent_folds_by_the_correction() -> None:
    mean, half = over_folds.interval(GAINS)
    assert mean == pytest.approx(0.0125)
    # Student's t with 3 degrees of freedom, 3.182; 1 / k + 1 / (k - 1) in place of 1 / k.
    assert half == pytest.approx(3.1824 * statistics.stdev(GAINS) * (1 / 4 + 1 / 3) ** 0.5, rel=1e-4)


def test_table_has_a_row_for_each_setting_over_its_folds_and_says_what_the_interval_is(tmp_path: Path) -> None:
    lines = over_folds.table(write(tmp_path / "folds.csv")).splitlines()
    assert lines[2].startswith("| sam.rho 1 | 4 | 50.0 | 60.0 | 70.0 | 80.0 | +1.25 (")
    assert lines[3].startswith("| sam.rho 2 | 4 | 50.0 | 60.0 | 70.0 | 80.0 | +2.50 (")
    assert "folds share training images" in lines[5]


def test_table_that_lacks_a_fold_or_has_none_is_refused(tmp_path: Path) -> None:
    expected = r"folds.csv: sam.rho 1: expected the folds 0 to 3 once each, received 0, 1, 3$"
    with pytest.raises(InputError, match=expected):
        over_folds.table(write(tmp_path / "folds.csv", (0, 1, 3)))
    with pytest.raises(InputError, match=r"expected succeeded runs with data.fold and data.folds, received 0 runs"):
        over_folds.table(write(tmp_path / "folds.csv", status="failed"))
