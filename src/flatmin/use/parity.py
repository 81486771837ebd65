"""Compares an exported file's answers with those of the trained classifier, on the same pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from flatmin.evaluation import comparison

FLOOR = 1e-6  # smaller probabilities count as this one where logarithms are compared: int8 has none between


def compare(logits: np.ndarray, exported: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Compare answers, which are the classes of the largest probability.

    Args:
        logits: the trained classifier's, divided by its temperature: float [n, classes].
        exported: the file's probabilities: float [n, classes].
        labels: int [n].

    Returns:
        images; differ, differ_share: how many answers differ; log_probability_difference: the largest over pictures
        and classes; trained, exported: the accuracy of each, a fraction, with its 95 % interval (Wilson); difference:
        by how much the file is more accurate, as `comparison.difference` has it, with McNemar's p-value.
    """
    trained = scipy.special.softmax(logits.astype(np.float64), axis=1)
    answers = trained.argmax(axis=1), exported.argmax(axis=1)
    differ = int((answers[0] != answers[1]).sum())
    logarithms = [np.log(np.maximum(each.astype(np.float64), FLOOR)) for each in (trained, exported)]
    correct = [answer == labels for answer in answers]
    return {
        "images": len(labels),
        "differ": differ,
        "differ_share": differ / len(labels),
        "log_probability_difference": float(np.abs(logarithms[0] - logarithms[1]).max()),
        "trained": _accuracy(correct[0]),
        "exported": _accuracy(correct[1]),
        "difference": comparison.difference(correct[1], correct[0]),
    }


def _accuracy(correct: np.ndarray) -> dict[str, float]:
    found = scipy.stats.binomtest(int(correct.sum()), len(correct))
    low, high = found.proportion_ci(comparison.LEVEL, method="wilson")
    return {"accuracy": float(correct.mean()), "low": float(low), "high": float(high)}


def table(parity: dict[str, Any]) -> list[str]:
    """The comparison as rows of a Markdown table, one for each figure."""
    gain, size = parity["difference"], parity["bytes"]
    return [
        f"| on {parity['images']:,} val images | trained | {parity['format']} |",
        "|---|---|---|",
        f"| accuracy (95 % interval) | {with_interval(parity['trained'])} | {with_interval(parity['exported'])} |",
        f"| difference in points (95 % interval) | | {100 * gain['accuracy']:+.2f} "
        f"({100 * gain['low']:+.2f} to {100 * gain['high']:+.2f}), McNemar p {gain['p_value']:.2g} |",
        f"| answers that differ | | {parity['differ']} ({100 * parity['differ_share']:.2f} %) |",
        f"| largest difference of log-probabilities | | {parity['log_probability_difference']:.2g} |",
        f"| size in MB | | {size / 1e6:.2f} |",
        f"| milliseconds an image, one at a time | | {parity['milliseconds']:.1f} ({parity['machine']}) |",
    ]


def with_interval(score: dict[str, float]) -> str:
    """An accuracy with its interval."""
    return f"{score['accuracy']:.4f} ({score['low']:.4f} to {score['high']:.4f})"
