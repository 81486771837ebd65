"""Decisions that follow from the history of epochs: the best epoch, early stopping, the learning rate on a plateau."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from flatmin.common.params import EarlyStopping, Plateau

Epoch = dict[str, float]  # learning_rate, loss, accuracy, and val's scores as val_*


def best_epoch(history: Sequence[Epoch]) -> int:
    """The index of the epoch with the highest val accuracy; of equals the lowest val loss, then the first."""
    return min(range(len(history)), key=lambda index: (-history[index]["val_accuracy"], history[index]["val_loss"]))


def _epochs_without_improvement(losses: Sequence[float], min_delta: float) -> Iterator[int]:
    """For each epoch, the number of epochs since one whose loss was lower than the best before it by `min_delta`."""
    best, waited = math.inf, 0
    for loss in losses:
        waited += 1
        if loss < best - min_delta:
            best, waited = loss, 0
        yield waited


def stops(history: Sequence[Epoch], early_stopping: EarlyStopping | None) -> bool:
    """Whether early stopping ends the training after these epochs."""
    if early_stopping is None or not history:
        return False
    *_, waited = _epochs_without_improvement([epoch["val_loss"] for epoch in history], early_stopping.min_delta)
    return waited >= early_stopping.patience


def plateau(history: Sequence[Epoch], schedule: Plateau, rate: float) -> float:
    """The learning rate for the epoch after `history`, by the rule of Keras' `ReduceLROnPlateau`.

    Keras starts waiting again after it lowered the rate, so every `patience` epochs in a row without a better loss
    lower it once.
    """
    for waited in _epochs_without_improvement([epoch["val_loss"] for epoch in history], schedule.min_delta):
        if waited and waited % schedule.patience == 0:
            rate = max(rate * schedule.factor, min(rate, schedule.minimum))
    return rate
