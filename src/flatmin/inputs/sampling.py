"""Which train images an epoch draws, and how much each class weighs."""

from __future__ import annotations

import numpy as np

from flatmin.common.params import Balance


def draw(labels: np.ndarray, sampling: Balance, random: np.random.Generator) -> np.ndarray:
    """The images of an epoch in a random order, as many as there are: int64 [n], positions.

    `none` draws each once. `balanced` draws each class equally often, to within one: the images of a rare class
    several times, those of a frequent one in part, and of a class none twice more often than another.

    Args:
        labels: int [n]; the classes are those that it has.
    """
    if sampling == "none":
        return random.permutation(len(labels))
    classes = np.unique(labels)
    quotas = np.full(len(classes), len(labels) // len(classes))
    quotas[random.permutation(len(classes))[: len(labels) % len(classes)]] += 1
    drawn = []
    for label, quota in zip(classes, quotas.tolist(), strict=True):
        members = random.permutation(np.flatnonzero(labels == label))
        drawn.append(np.resize(members, quota))
    return random.permutation(np.concatenate(drawn))


def class_weights(labels: np.ndarray, classes: int, balance: Balance) -> np.ndarray | None:
    """The weight of each class's losses, float32 [classes], with mean 1 over the images; None for equal ones.

    `balanced` weighs each class as much as any other: n / (classes * images of the class), as scikit-learn does.

    Args:
        labels: int [n], in [0, classes), each of them there.
    """
    if balance == "none":
        return None
    return (len(labels) / (classes * np.bincount(labels, minlength=classes))).astype(np.float32)
