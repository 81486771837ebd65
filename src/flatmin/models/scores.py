"""Scores of a classifier's logits."""

from __future__ import annotations

import numpy as np


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute accuracy and top-5 accuracy (fractions) and the mean cross-entropy (nats).

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
    return {
        "accuracy": float((rank == 0).mean()),
        "top5_accuracy": float((rank < 5).mean()),
        "loss": float((log_sum - label_logits).mean()),
    }
