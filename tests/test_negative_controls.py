"""The page of the default study's negative controls, from a table of its runs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from repository import ROOT

from flatmin.common.errors import InputError

sys.path.insert(0, str(ROOT / "scripts"))
import negative_controls
from negative_controls import METHODS


def row(accuracy: float) -> dict[str, str]:
    return {f"evaluate/{method}.test.accuracy": str(accuracy) for method in METHODS}


def test_describe_says_whether_chance_is_inside() -> None:
    # The mean of 1, 2 and 3 has a standard error of 1/sqrt(3), and t of two degrees of freedom is 4.3027.
    page = negative_controls.describe([row(0.1), row(0.2), row(0.3)], row(0.6), 0.75, 0.1)
    assert f"| labels permuted |{' 0.2000 [-0.0484, 0.4484] |' * 4}\n| chance inside |{' yes |' * 4}\n" in page
    assert f"| random weights |{' 0.6000 |' * 4}\n| nearest neighbour | 0.7500 |" in page
    page = negative_controls.describe([row(0.5), row(0.51)], row(0.6), 0.75, 0.1)
    assert f"| chance inside |{' **no** |' * 4}\n" in page


def test_nearest_neighbour_takes_the_closest_images_label() -> None:
    train = np.array([[[0, 0]], [[250, 250]]], np.uint8), np.array([1, 0])
    test = np.array([[[10, 0]], [[240, 255]], [[200, 255]], [[0, 90]]], np.uint8), np.array([1, 0, 1, 1])
    assert negative_controls.nearest_neighbour(train, test) == 0.75


def test_main_without_runs_is_refused(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(
        InputError, match=r"negative.csv: expected runs of permuted labels and one of .* received 0 and 0"
    ):
        negative_controls.main()
