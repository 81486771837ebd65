"""The plots of evaluate: rows of the CSVs, and a picture that is the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flatmin.evaluation import plots

NAMES = ("blue", "green", "red")
LABELS = np.array([0, 0, 2, 2, 2])


def test_write_confusion_has_a_row_for_each_image(tmp_path: Path) -> None:
    plots.write_confusion(tmp_path / "confusion.csv", np.array([0, 1, 2, 2, 0]), LABELS, NAMES)
    assert (tmp_path / "confusion.csv").read_text().splitlines() == [
        "actual,predicted",
        "blue,blue",
        "blue,green",
        "red,red",
        "red,red",
        "red,blue",
    ]


def test_write_class_accuracy_leaves_out_classes_without_images(tmp_path: Path) -> None:
    predicted = {
        "finetune": [np.array([0, 1, 2, 2, 0])],
        "sam": [np.array([0, 0, 1, 1, 1]), np.array([0, 1, 2, 2, 2])],
    }
    plots.write_class_accuracy(tmp_path / "classes.csv", predicted, LABELS, NAMES)
    assert (tmp_path / "classes.csv").read_text().splitlines() == [
        "class,method,accuracy",
        "blue,finetune,0.5",
        "blue,sam,0.75",
        "red,finetune,0.666667",
        "red,sam,0.5",
    ]


def test_write_csvs_without_labels_have_a_header_only(tmp_path: Path) -> None:
    none = np.array([], int)
    plots.write_confusion(tmp_path / "confusion.csv", none, none, NAMES)
    plots.write_class_accuracy(tmp_path / "classes.csv", {"sam": [none]}, none, NAMES)
    assert (tmp_path / "confusion.csv").read_text() == "actual,predicted\n"
    assert (tmp_path / "classes.csv").read_text() == "class,method,accuracy\n"


@pytest.mark.slow
def test_draw_sharpness_of_other_losses_is_another_picture(tmp_path: Path) -> None:
    valley = plots.EIGENVECTOR_POSITIONS**2
    for name, factor in (("one", 1.0), ("same", 1.0), ("steep", 9.0)):
        losses = {"finetune": (valley, valley), "sam": (factor * valley, 0.5 * valley)}
        plots.draw_sharpness(tmp_path / name, losses)
    with Image.open(tmp_path / "one") as image:
        assert image.format == "PNG"
        assert image.size == (900, 360)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "same").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "steep").read_bytes()
