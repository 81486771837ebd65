"""Tables of what the scores sum up: each class, how right a confidence is, and what abstaining gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.special
from sklearn.metrics import precision_recall_fscore_support

from flatmin.evaluation.metrics import confidence_bins

CLASSES = ("class", "images", "precision", "recall", "f1")
RELIABILITY = ("calibrated", "bin", "images", "confidence", "accuracy")
COVERAGE = ("model", "coverage", "threshold", "accuracy")
SHARES = np.arange(1, 51) / 50  # of the images that are answered
Row = list[str | int]


def classes(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Iterator[Row]:
    """The rows of CLASSES: predictions and labels are int [n]. A class never predicted has precision 0."""
    scores = precision_recall_fscore_support(labels, predicted, labels=np.arange(len(names)), zero_division=0)
    for name, precision, recall, f1, images in zip(names, *scores, strict=True):
        yield [name, int(images), *(f"{value:.6g}" for value in (precision, recall, f1))]


def reliability(logits: np.ndarray, labels: np.ndarray, temperature: float, bins: int) -> Iterator[Row]:
    """The rows of RELIABILITY: mean confidence and accuracy of the images in each bin of confidence that has any.

    Args:
        logits: float [n, classes]. labels: int [n].
        temperature: `calibrated` is 1 in the rows of logits / temperature.
        bins: the number of equal bins in [0, 1].
    """
    for calibrated, divisor in enumerate((1.0, temperature)):
        confidence, correct, index = confidence_bins(logits.astype(np.float64) / divisor, labels, bins)
        for number in np.unique(index):
            here = index == number
            means = (f"{confidence[here].mean():.6g}", f"{correct[here].mean():.6g}")
            yield [calibrated, int(number), int(here.sum()), *means]


def coverage(model: str, logits: np.ndarray, labels: np.ndarray, temperature: float) -> Iterator[Row]:
    """The rows of COVERAGE of a model: the accuracy on the share of images of which it is most confident.

    `threshold` is the least calibrated probability of an image that is answered.
    """
    probabilities = scipy.special.softmax(logits.astype(np.float64) / temperature, axis=1)
    confidence = probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    correct = np.cumsum((probabilities.argmax(axis=1) == labels)[order])
    for count in np.unique(np.maximum(1, np.rint(SHARES * len(labels)).astype(int))):
        values = (count / len(labels), confidence[order[count - 1]], correct[count - 1] / count)
        yield [model, *(f"{value:.6g}" for value in values)]
