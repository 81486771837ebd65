"""Tables of classes, of confidence, and of abstaining, on numbers that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from flatmin.evaluation import tables

# Two classes: right and sure, right and less so, wrong and less so, wrong and unsure.
LABELS = np.array([0, 1, 1, 0])
LOGITS = np.log(np.array([[0.95, 0.05], [0.15, 0.85], [0.82, 0.18], [0.45, 0.55]]))


def test_classes_precision_recall_and_f1_by_class() -> None:
    rows = list(tables.classes(LOGITS.argmax(axis=1), LABELS, ["cat", "dog", "none"]))
    assert rows[0] == ["cat", 2, "0.5", "0.5", "0.5"]
    assert rows[1] == ["dog", 2, "0.5", "0.5", "0.5"]
    assert rows[2] == ["none", 0, "0", "0", "0"]


def test_reliability_gives_the_bins_before_and_after_the_temperature() -> None:
    rows = list(tables.reliability(LOGITS, LABELS, temperature=1e6, bins=10))
    before = [[row[1], row[2], float(row[3]), float(row[4])] for row in rows if row[0] == 0]
    assert before == [[5, 1, 0.55, 0.0], [8, 2, 0.835, 0.5], [9, 1, 0.95, 1.0]]
    ((_, _, images, confidence, accuracy),) = [row for row in rows if row[0] == 1]
    assert (images, float(accuracy)) == (4, 0.5)
    assert float(confidence) == pytest.approx(0.5, abs=1e-4)


def test_coverage_answers_the_most_confident_first() -> None:
    rows = list(tables.coverage("sam@1", LOGITS, LABELS, temperature=1.0))
    assert [row[0] for row in rows] == ["sam@1"] * 4
    found = [[float(value) for value in row[1:]] for row in rows]
    assert found == [[0.25, 0.95, 1.0], [0.5, 0.85, 1.0], [0.75, 0.82, 0.666667], [1.0, 0.55, 0.5]]
