"""Labels that may be wrong: confident learning (Northcutt, Jiang & Chuang 2021, JAIR 70, arXiv:1911.00068)."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

FOLDS = 5
SEED = 0  # of the folds
REGULARISATION = 0.03  # scikit-learn's C; of 0.01, 0.03 and 0.1 as good as the best on digits and CIFAR-100
ITERATIONS = 100
_ROUNDING = 1e-6  # of probabilities


def out_of_fold(vectors: np.ndarray, labels: np.ndarray, classes: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Probabilities of each image by a linear classifier that was fitted without it: float32 [n, classes].

    They are 0 of the classes that this classifier has not seen, since all their images are in the same fold, and of no
    others.

    Args:
        vectors: float32 [n, d], whitened activations. labels: int [n].
        groups: [n]; images of a group are in one fold.
    """
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = min(FOLDS, int(np.bincount(labels).max()), FOLDS if groups is None else len(np.unique(groups)))
    found = np.zeros((len(labels), classes), np.float32)
    with warnings.catch_warnings():
        # Classes of few images are told of by themselves.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)  # near the minimum is near enough
        for fitted, left_out in splitter(folds, shuffle=True, random_state=SEED).split(vectors, labels, groups):
            seen = np.unique(labels[fitted])
            if len(seen) == 1:  # of which no classifier can be fitted
                found[left_out, seen[0]] = 1
                continue
            model = LogisticRegression(C=REGULARISATION, max_iter=ITERATIONS)
            model.fit(vectors[fitted], labels[fitted])
            probabilities = model.predict_proba(vectors[left_out])
            found[np.ix_(left_out, seen)] = np.maximum(probabilities, np.finfo(probabilities.dtype).tiny)
    return found


class Suspects(NamedTuple):
    """Images whose label may be wrong, the most suspicious first: arrays [suspects].

    Attributes:
        position: int64, the image's. guess: int64, the class that it rather has.
        margin: float64, by how much that is the more probable one, in (-1, 1]; below 0 where a third class, of which
            the image is not confidently, is more probable than both.
    """

    position: np.ndarray
    guess: np.ndarray
    margin: np.ndarray


def suspects(probabilities: np.ndarray, labels: np.ndarray) -> Suspects:
    """The images off the diagonal of the confident joint (section 3.1), unless their own class is the most probable.

    An image counts as of a class if its probability is at least the mean one of the images with that label; of several
    such classes, as of the most probable one. An image whose own class its classifier has not seen is not judged, and
    no mean includes it.

    Args:
        probabilities: float [n, classes], out of fold. labels: int [n].
    """
    places = np.arange(len(labels))
    own, highest = (each.astype(np.float64) for each in (probabilities[places, labels], probabilities.max(axis=1)))
    judged = own > 0
    sizes = np.bincount(labels[judged], minlength=probabilities.shape[1])
    sums = np.bincount(labels, own, minlength=probabilities.shape[1])
    thresholds = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.inf)
    confident = probabilities >= thresholds - _ROUNDING
    likeliest = probabilities.argmax(axis=1)
    guess = np.where(confident.sum(axis=1) > 1, likeliest, confident.argmax(axis=1))
    margin = probabilities[places, guess] - own
    off_diagonal = judged & confident.any(axis=1) & (guess != labels) & (own < highest - _ROUNDING)
    order = np.flatnonzero(off_diagonal)
    order = order[np.argsort(-margin[order], kind="stable")]
    return Suspects(order, guess[order], margin[order])
