"""The temperature that makes a classifier's confidence fit val."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

# A temperature is sought in between: on a val set without an error the loss falls as it goes to 0, and with logits that
# tell nothing as it grows.
LOWEST = 1 / 20
HIGHEST = 20.0


def is_bound(temperature: float) -> bool:
    """Whether a fitted temperature is one of the bounds, so that val does not say what it should be."""
    return not LOWEST * 1.001 < temperature < HIGHEST / 1.001


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T in [LOWEST, HIGHEST] with the least mean cross-entropy of logits / T (Guo et al. 2017, section 4.2).

    The cross-entropy is convex in 1 / T, so it has one minimum.

    Args:
        logits: float [n, classes]. labels: int [n].
    """
    logits = logits.astype(np.float64)
    of_labels = logits[np.arange(len(labels)), labels]

    def loss(log_temperature: float) -> float:
        inverse = math.exp(-log_temperature)
        return float((logsumexp(inverse * logits, axis=1) - inverse * of_labels).mean())

    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x)
