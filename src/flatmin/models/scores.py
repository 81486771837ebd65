"""Scores of a classifier's logits."""

from __future__ import annotations

import numpy as np


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute accuracy and top-5 accuracy (fractions) and the mean cross-entropy (nats).

    `balanced_` are means over the classes that have images, each class alike.

    Args:
        logits: float [n, classes].
        labels: int [n], in [0, classes).
    """
    logits = logits.astype(np.float64)
    label_logits = logits[np.arange(len(labels)), labels]
    # Among equal logits the lower index ranks first, as in argmax. A NaN is never right.
    rank = (~(logits <= label_logits[:, None])).sum(axis=1) + (
        (logits == label_logits[:, None]) & (np.arange(logits.shape[1]) < labels[:, None])
    ).sum(axis=1)
    highest = logits.max(axis=1)
    log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    right, losses = rank == 0, log_sum - label_logits
    return {
        "accuracy": float(right.mean()),
        "balanced_accuracy": _mean_over_classes(right, labels),
        "top5_accuracy": float((rank < 5).mean()),
        "loss": float(losses.mean()),
        "balanced_loss": _mean_over_classes(losses, labels),
    }


def _mean_over_classes(values: np.ndarray, labels: np.ndarray) -> float:
    sizes = np.bincount(labels)
    return float((np.bincount(labels, values)[sizes > 0] / sizes[sizes > 0]).mean())
