"""Scores of logits on labelled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
import scipy.special
from sklearn.metrics import precision_recall_fscore_support

from flatmin.common.params import Evaluate
from flatmin.models.scores import score


def scores(
    logits: np.ndarray, labels: np.ndarray, settings: Evaluate, temperature: float | None = None
) -> dict[str, float]:
    """Scores of float logits [n, classes] with int labels [n], all but the losses as fractions.

    Returns:
        accuracy, top5_accuracy: shares of the images.
        balanced_accuracy, macro_f1: means of recall and of F1 over the classes that have images, each class alike.
        loss, ece: mean cross-entropy (nats) and expected calibration error.
        calibrated_loss, calibrated_ece: those of logits / temperature; left out without one.
    """
    plain = score(logits, labels)
    _, recall, f1, _ = precision_recall_fscore_support(
        labels, logits.argmax(axis=1), labels=np.unique(labels), average="macro", zero_division=0
    )
    found = {
        "accuracy": plain["accuracy"],
        "balanced_accuracy": float(recall),
        "macro_f1": float(f1),
        "top5_accuracy": plain["top5_accuracy"],
        "loss": plain["loss"],
        "ece": calibration_error(logits, labels, settings.ece_bins),
    }
    if temperature is not None:
        calibrated = logits.astype(np.float64) / temperature
        found["calibrated_loss"] = score(calibrated, labels)["loss"]
        found["calibrated_ece"] = calibration_error(calibrated, labels, settings.ece_bins)
    return found


def mean_and_deviation(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of each score over rows of one seed each, and its standard deviation (n - 1); of a single row none."""
    means = {key: fmean(row[key] for row in rows) for key in rows[0]}
    deviations = {key: stdev(row[key] for row in rows) for key in rows[0]} if len(rows) > 1 else {}
    return means, deviations


def average_predictions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Logits [n, classes] whose probabilities are the mean of those of two logits."""
    return np.logaddexp(scipy.special.log_softmax(first, axis=1), scipy.special.log_softmax(second, axis=1))


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Expected calibration error with `bins` equal bins of confidence (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    confidence, correct, bin_indices = confidence_bins(logits, labels, bins)
    gap = np.bincount(bin_indices, correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def confidence_bins(logits: np.ndarray, labels: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each image's highest probability, float64 [n], whether it is the label's, bool [n], and its bin, int [n]."""
    logits = logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    return confidence, correct, np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
