"""Scores of logits on labelled images, and the difference between two classifiers on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from flatmin.common.params import Evaluate
from flatmin.models.scores import score


def scores(logits: np.ndarray, labels: np.ndarray, settings: Evaluate) -> dict[str, float]:
    """Accuracy, top-5 accuracy, loss (nats) and ECE of float logits [n, classes] with int labels [n]."""
    return score(logits, labels) | {"ece": calibration_error(logits, labels, settings.ece_bins)}


def average_predictions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Logits [n, classes] whose probabilities are the mean of those of two logits."""
    return np.logaddexp(scipy.special.log_softmax(first, axis=1), scipy.special.log_softmax(second, axis=1))


def compare(logits: Mapping[str, np.ndarray], labels: np.ndarray, settings: Evaluate, seed: int) -> dict[str, Any]:
    """The test metrics of each model, and of the difference between sam and finetune.

    Args:
        logits: float32 [n, classes] by the model's name.
        labels: int [n].
    """
    metrics: dict[str, Any] = {name: {"test": scores(values, labels, settings)} for name, values in logits.items()}
    correct = {name: values.argmax(axis=1) == labels for name, values in logits.items()}
    metrics["sam_minus_finetune"] = difference(correct["sam"], correct["finetune"], settings.resamples, seed)
    return metrics


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Expected calibration error with `bins` equal bins of confidence (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    logits = logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bin_indices = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_indices, correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def difference(first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """By how much `first` is more accurate than `second` on the same images (bool [n] each: predicted correctly).

    Returns:
        accuracy: the difference, a fraction; low, high: its 95 % interval by a paired percentile bootstrap over images;
        p_value: McNemar's exact test on the images that only one predicts correctly, 1 if there are none.
    """
    gained = int((first & ~second).sum())
    lost = int((~first & second).sum())
    same = len(first) - gained - lost
    # A resample of images matters only by how many of each kind it draws, which is a multinomial.
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(first), np.array([gained, lost, same]) / len(first), size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / len(first), [0.025, 0.975])
    p_value = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {
        "accuracy": (gained - lost) / len(first),
        "low": float(low),
        "high": float(high),
        "p_value": float(p_value),
    }
