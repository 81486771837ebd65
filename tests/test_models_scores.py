"""Scores against plain references."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st

from flatmin.models.scores import score


def plain_accuracies(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Accuracy and top-5 accuracy by sorting; among equal logits the lower index comes first."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return (logits.argmax(axis=1) == labels).mean(), (order == labels[:, None]).any(axis=1).mean()


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(2, 12), st.floats(0.01, 100))
def test_score_random_logits_equals_reference(seed: int, count: int, classes: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    logits = (scale * random.normal(size=(count, classes))).astype(np.float32)
    labels = random.integers(0, classes, count)
    received = score(logits, labels)
    assert set(received) == {"accuracy", "balanced_accuracy", "top5_accuracy", "loss", "balanced_loss"}
    assert all(type(value) is float for value in received.values())
    assert (received["accuracy"], received["top5_accuracy"]) == pytest.approx(plain_accuracies(logits, labels))
    log_probabilities = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    losses = -log_probabilities[np.arange(count), labels]
    assert received["loss"] == pytest.approx(losses.mean(), abs=1e-9)
    right = logits.argmax(axis=1) == labels
    for key, values in (("balanced_accuracy", right), ("balanced_loss", losses)):
        of_classes = [values[labels == label].mean() for label in np.unique(labels)]
        assert received[key] == pytest.approx(np.mean(of_classes), abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(6, 12))
def test_score_ties_go_to_lower_index(seed: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.integers(0, 3, (20, classes)).astype(np.float32)
    labels = random.integers(0, classes, 20)
    received = score(logits, labels)
    assert (received["accuracy"], received["top5_accuracy"]) == pytest.approx(plain_accuracies(logits, labels))


def test_score_equal_logits_is_chance() -> None:
    received = score(np.zeros((10, 10), np.float32), np.arange(10))
    loss = pytest.approx(np.log(10))
    shares = {"accuracy": 0.1, "balanced_accuracy": 0.1, "top5_accuracy": 0.5}
    assert received == shares | {"loss": loss, "balanced_loss": loss}


def test_score_fewer_than_six_classes_has_top5_accuracy_one() -> None:
    for classes in (2, 3, 4, 5):
        logits = np.random.default_rng(0).normal(size=(30, classes))
        assert score(logits, np.arange(30) % classes)["top5_accuracy"] == 1


def test_score_large_logits_does_not_overflow() -> None:
    received = score(np.array([[3e38, -3e38], [0, 1e4]], np.float32), np.array([0, 0]))
    assert received["loss"] == pytest.approx(5000)


def test_score_nan_logits_has_no_finite_loss_and_accuracy_zero() -> None:
    received = score(np.full((2, 3), np.nan, np.float32), np.array([0, 1]))
    assert not np.isfinite(received["loss"])
    assert received["accuracy"] == 0
