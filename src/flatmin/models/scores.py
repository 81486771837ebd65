"""Scores of logits."""

from __future__ import annotations

import numpy as np


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, top-5 accuracy (fractions) and mean cross-entropy (nats) of float logits [n, classes]."""
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels]
    # Ties count against the prediction but for the index order that argmax has; NaN is never right.
    rank = (~(logits <= own[:, None])).sum(axis=1) + (
        (logits == own[:, None]) & (np.arange(logits.shape[1]) < labels[:, None])
    ).sum(axis=1)
    highest = logits.max(axis=1)
    log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return {
        "accuracy": float((rank == 0).mean()),
        "top5_accuracy": float((rank < 5).mean()),
        "loss": float((log_sum - own).mean()),
    }
