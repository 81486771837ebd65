"""The metrics of evaluate against closed forms and plain references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmin.common.params import Evaluate
from flatmin.evaluation.metrics import average_predictions, calibration_error, compare, difference


def answers(gained: int, lost: int, both: int = 0, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whether two models are right, for the given numbers of images of each kind."""
    first = np.repeat([True, False, True, False], [gained, lost, both, neither])
    second = np.repeat([False, True, True, False], [gained, lost, both, neither])
    order = np.random.default_rng(0).permutation(len(first))
    return first[order], second[order]


@pytest.mark.parametrize(("both", "neither"), [(20, 0), (0, 20), (13, 7)])
def test_difference_of_equal_answers_is_none(both: int, neither: int) -> None:
    received = difference(*answers(0, 0, both, neither), 1000, 1)
    assert received == {"accuracy": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}


def test_difference_with_everything_gained_is_certain() -> None:
    received = difference(*answers(10, 0), 1000, 1)
    assert received == {"accuracy": 1.0, "low": 1.0, "high": 1.0, "p_value": pytest.approx(2 * 0.5**10)}


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (1, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (9, 1, 2 * (1 + 10) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_difference_p_value_is_mcnemars_by_hand(gained: int, lost: int, p_value: float) -> None:
    received = difference(*answers(gained, lost, 30, 10), 100, 1)
    assert received["p_value"] == pytest.approx(p_value)
    assert received["accuracy"] == pytest.approx((gained - lost) / (gained + lost + 40))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_difference_p_value_is_the_binomial_tests(gained: int, lost: int, both: int) -> None:
    received = difference(*answers(gained, lost, both), 50, 1)
    tails = min(1.0, 2 * scipy.stats.binom.cdf(min(gained, lost), gained + lost, 0.5)) if gained + lost else 1.0
    assert received["p_value"] == pytest.approx(tails)
    assert 0 <= received["p_value"] <= 1
    assert received["low"] <= received["high"]
    first, second = answers(gained, lost, both)
    reversed_ = difference(second, first, 50, 1)
    assert reversed_["accuracy"] == -received["accuracy"]
    assert reversed_["p_value"] == pytest.approx(received["p_value"])


def test_difference_interval_is_the_paired_bootstrap_over_images() -> None:
    first, second = answers(40, 22, 110, 28)
    received = difference(first, second, 20_000, 1)
    gains = first.astype(int) - second.astype(int)
    drawn = np.random.default_rng(2).integers(0, len(gains), (20_000, len(gains)))
    low, high = np.quantile(gains[drawn].mean(axis=1), [0.025, 0.975])
    # One image is 0.005; quantiles of 20,000 resamples wander by less than that.
    assert received["low"] == pytest.approx(low, abs=0.0051)
    assert received["high"] == pytest.approx(high, abs=0.0051)
    deviation = gains.std() / math.sqrt(len(gains))
    assert received["high"] - received["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_difference_interval_is_chosen_by_the_seed() -> None:
    pair = answers(12, 7, 30, 20)
    assert difference(*pair, 500, 1) == difference(*pair, 500, 1)
    intervals = {tuple(difference(*pair, 25, seed).values()) for seed in range(5)}
    assert len(intervals) > 1


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


def test_compare_gives_each_models_scores_and_sam_minus_finetune() -> None:
    labels = np.array([0, 1, 2, 0])
    right = np.eye(3, dtype=np.float32)[labels]
    wrong = np.eye(3, dtype=np.float32)[(labels + 1) % 3]
    half = np.concatenate([right[:2], wrong[2:]])
    received = compare({"extract": wrong, "finetune": half, "sam": right}, labels, Evaluate(resamples=100), 1)
    assert set(received) == {"extract", "finetune", "sam", "sam_minus_finetune"}
    for name, accuracy in (("extract", 0.0), ("finetune", 0.5), ("sam", 1.0)):
        assert set(received[name]) == {"test"}
        assert set(received[name]["test"]) == {"accuracy", "top5_accuracy", "loss", "ece"}
        assert received[name]["test"]["accuracy"] == accuracy
        assert received[name]["test"]["top5_accuracy"] == 1
    assert set(received["sam_minus_finetune"]) == {"accuracy", "low", "high", "p_value"}
    assert received["sam_minus_finetune"]["accuracy"] == 0.5  # sam less finetune, not the other way round
    assert received["sam_minus_finetune"]["p_value"] == pytest.approx(0.5)


def test_average_predictions_average_probabilities() -> None:
    first, second = np.random.default_rng(0).normal(scale=20, size=(2, 6, 4)).astype(np.float32)
    expected = (scipy.special.softmax(first, axis=1) + scipy.special.softmax(second, axis=1)) / 2
    np.testing.assert_allclose(scipy.special.softmax(average_predictions(first, second), axis=1), expected, atol=1e-6)
