"""The metrics of evaluate against closed forms and plain references."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmin.common.params import Evaluate
from flatmin.evaluation.metrics import average_predictions, calibration_error, mean_and_deviation, scores
from flatmin.selection.calibration import fit_temperature


def log_probabilities(confidence: np.ndarray, classes: int = 4) -> np.ndarray:
    """Logits whose softmax gives class 0 this confidence and the others the rest in equal parts."""
    rest = np.repeat(((1 - confidence) / (classes - 1))[:, None], classes - 1, axis=1)
    return np.log(np.concatenate([confidence[:, None], rest], axis=1)).astype(np.float32)


def test_calibration_error_of_known_confidences_is_their_gap() -> None:
    # 75 % sure and right three times in four.
    logits = log_probabilities(np.full(8, 0.75))
    assert calibration_error(logits, np.array([0, 0, 0, 1] * 2), 15) == pytest.approx(0, abs=1e-6)
    assert calibration_error(logits, np.zeros(8, int), 15) == pytest.approx(0.25, abs=1e-6)
    certain = np.eye(3, dtype=np.float32)[[0, 1, 2]] * 1e4
    assert calibration_error(certain, np.array([0, 1, 2]), 15) == pytest.approx(0)
    assert calibration_error(certain, np.array([1, 2, 0]), 15) == pytest.approx(1)


def test_calibration_error_with_more_bins_cancels_less() -> None:
    # Over-confident at 0.9, under-confident at 0.5: one bin cancels them, two don't.
    logits = log_probabilities(np.repeat([0.9, 0.5], 10))
    labels = np.array([0] * 5 + [1] * 5 + [0] * 9 + [1])
    assert calibration_error(logits, labels, 1) == pytest.approx(0, abs=1e-6)
    assert calibration_error(logits, labels, 10) == pytest.approx(0.4, abs=1e-6)


def plain_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    error = 0.0
    for index in range(bins):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities, labels, strict=True)
            if index / bins < row.max() <= (index + 1) / bins
        ]
        if inside:
            confidence = np.mean([pair[0] for pair in inside])
            accuracy = np.mean([pair[1] for pair in inside])
            error += len(inside) / len(labels) * abs(accuracy - confidence)
    return error


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 30), st.floats(0.1, 20))
@settings(max_examples=50)
def test_calibration_error_is_that_of_a_plain_loop(seed: int, count: int, bins: int, sharpness: float) -> None:
    random = np.random.default_rng(seed)
    logits = (sharpness * random.normal(size=(count, 5))).astype(np.float32)
    labels = random.integers(0, 5, count)
    received = calibration_error(logits, labels, bins)
    assert received == pytest.approx(plain_calibration_error(logits, labels, bins), abs=1e-9)
    assert 0 <= received <= 1


def test_average_predictions_average_probabilities() -> None:
    first, second = np.random.default_rng(0).normal(scale=20, size=(2, 6, 4)).astype(np.float32)
    expected = (scipy.special.softmax(first, axis=1) + scipy.special.softmax(second, axis=1)) / 2
    np.testing.assert_allclose(scipy.special.softmax(average_predictions(first, second), axis=1), expected, atol=1e-6)


def random_logits(seed: int, count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits that favour their label; the last class has no image, but is predicted."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes - 1, count)
    logits = 2 * random.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += 2
    return logits, labels


@pytest.mark.parametrize(("count", "classes"), [(300, 12), (40, 30), (5, 3)])
def test_scores_are_those_of_scikit_learn(count: int, classes: int) -> None:
    logits, labels = random_logits(0, count, classes)
    received = scores(logits, labels, Evaluate())
    predicted, probabilities = logits.argmax(axis=1), scipy.special.softmax(logits.astype(float), axis=1)
    present = np.unique(labels)
    every = np.arange(classes)
    f1 = sklearn.metrics.f1_score(labels, predicted, labels=present, average=None, zero_division=0)
    recall = [(predicted[labels == label] == label).mean() for label in present]
    top5 = sklearn.metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=every) if classes > 5 else 1.0
    assert received == {
        "accuracy": pytest.approx(sklearn.metrics.accuracy_score(labels, predicted)),
        "balanced_accuracy": pytest.approx(np.mean(recall)),
        "macro_f1": pytest.approx(f1.mean()),
        "top5_accuracy": pytest.approx(top5),
        "loss": pytest.approx(sklearn.metrics.log_loss(labels, probabilities, labels=every), rel=1e-6),
        "ece": pytest.approx(plain_calibration_error(logits, labels, 15)),
    }


def test_scores_count_each_class_alike() -> None:
    # Class 0: 8 of 10 right, class 1: 1 of 2; class 2 has no image, though one is taken for it.
    labels = np.array([0] * 10 + [1] * 2)
    predicted = np.array([0] * 8 + [1] * 2 + [1, 2])
    received = scores(np.eye(3, dtype=np.float32)[predicted], labels, Evaluate())
    assert received["accuracy"] == pytest.approx(9 / 12)
    assert received["balanced_accuracy"] == pytest.approx((8 / 10 + 1 / 2) / 2)
    # F1 is 2 * right / (predicted + actual).
    assert received["macro_f1"] == pytest.approx((16 / 18 + 2 / 5) / 2)


def test_scores_with_a_temperature_calibrate_loss_and_ece_alone() -> None:
    logits, labels = random_logits(1, 200, 6)
    plain, calibrated = scores(logits, labels, Evaluate()), scores(logits, labels, Evaluate(), 2.5)
    of_quotient = scores(logits.astype(np.float64) / 2.5, labels, Evaluate())
    assert calibrated["calibrated_loss"] == pytest.approx(of_quotient["loss"], rel=1e-12)
    assert calibrated["calibrated_ece"] == pytest.approx(of_quotient["ece"], rel=1e-12)
    for key in plain:
        assert calibrated[key] == plain[key], key
    assert calibrated["calibrated_loss"] != plain["loss"]


def test_scores_at_the_fitted_temperature_have_the_least_loss() -> None:
    logits, labels = random_logits(2, 500, 6)
    temperature = fit_temperature(logits, labels)
    loss = {
        factor: scores(logits, labels, Evaluate(), factor * temperature)["calibrated_loss"]
        for factor in (0.8, 0.99, 1, 1.01, 1.2)
    }
    assert min(loss, key=loss.__getitem__) == 1


def test_mean_and_deviation_are_over_rows() -> None:
    rows = [{"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.7, "loss": 3.0}, {"accuracy": 0.6, "loss": 5.0}]
    means, deviations = mean_and_deviation(rows)
    assert means == pytest.approx({"accuracy": 0.6, "loss": 3.0})
    assert deviations == pytest.approx({"accuracy": 0.1, "loss": 2.0})
    assert mean_and_deviation(rows[:1]) == (rows[0], {})
    assert mean_and_deviation([rows[0]] * 3)[1] == {"accuracy": 0.0, "loss": 0.0}
