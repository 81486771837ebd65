"""How long a training is, its learning rates, and what follows from its history: the best epoch, early stopping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.common.params import Cosine, EarlyStopping, Metric, Plateau, Training, loss_of

# What a training did up to a validation: epoch (the epochs so far), learning_rate, loss, accuracy, and val's scores as
# val_*. Most trainings are validated after each epoch, and a history holds one for each validation.
Epoch = dict[str, float]


@dataclass(frozen=True)
class Budget:
    """What a training may take, as another one took it.

    Attributes:
        gradient_evaluations: images that go forward and backward, counted once for each pass.
        validations: how often it is validated.
    """

    gradient_evaluations: int
    validations: int

    @classmethod
    def read(cls, path: Path | str) -> Budget:
        """Read a file that `write` wrote.

        Raises:
            InputError: it is no such file.
        """
        values = files.read_json(path)
        expected = set(values) == {"gradient_evaluations", "validations"}
        if not expected or not all(type(count) is int and count > 0 for count in values.values()):
            raise InputError(f"{path}: expected gradient_evaluations and validations above 0, received {values}")
        return cls(**values)

    def write(self, path: Path | str) -> None:
        files.write_json(path, {"gradient_evaluations": self.gradient_evaluations, "validations": self.validations})


@dataclass(frozen=True)
class Plan:
    """How long a training is.

    Attributes:
        steps: batches in all.
        steps_per_epoch: batches in an epoch.
        validations: spread evenly over the steps, the last one at their end.
    """

    steps: int
    steps_per_epoch: int
    validations: int

    @classmethod
    def of_epochs(cls, epochs: int, images: int, batch_size: int) -> Plan:
        """Whole epochs, each followed by a validation."""
        per_epoch = math.ceil(images / batch_size)
        return cls(epochs * per_epoch, per_epoch, epochs)

    @classmethod
    def of_budget(cls, budget: Budget, images: int, batch_size: int) -> Plan:
        """As many gradient evaluations as the budget has, to within half a batch: one for each image of each batch."""
        per_epoch = math.ceil(images / batch_size)
        epochs, rest = divmod(budget.gradient_evaluations, images)
        steps = min(range(per_epoch + 1), key=lambda count: abs(min(count * batch_size, images) - rest))
        steps = max(1, epochs * per_epoch + steps)
        return cls(steps, per_epoch, min(budget.validations, steps))

    def end(self, validation: int) -> int:
        """The number of steps before a validation; 0 is the start, and 1 the first validation."""
        return validation * self.steps // self.validations

    @property
    def epochs(self) -> int:
        """The number of epochs, of which the last may be cut short."""
        return math.ceil(self.steps / self.steps_per_epoch)


def best_epoch(history: Sequence[Epoch], metric: Metric = "accuracy") -> int:
    """The index of the epoch with the highest metric on val; of equals the lowest val loss, then the first."""
    scores, losses = [epoch[f"val_{metric}"] for epoch in history], _losses(history, metric)
    return min(range(len(history)), key=lambda index: (-scores[index], losses[index]))


def _losses(history: Sequence[Epoch], metric: Metric) -> list[float]:
    return [epoch[f"val_{loss_of(metric)}"] for epoch in history]


def _epochs_without_improvement(losses: Sequence[float], min_delta: float) -> Iterator[int]:
    """For each epoch, the number of epochs since one whose loss was lower than the best before it by `min_delta`."""
    best, waited = math.inf, 0
    for loss in losses:
        waited += 1
        if loss < best - min_delta:
            best, waited = loss, 0
        yield waited


def stops(history: Sequence[Epoch], early_stopping: EarlyStopping | None, metric: Metric = "accuracy") -> bool:
    """Whether early stopping ends the training after these epochs."""
    if early_stopping is None or not history:
        return False
    *_, waited = _epochs_without_improvement(_losses(history, metric), early_stopping.min_delta)
    return waited >= early_stopping.patience


def cosine(update: int, updates: float, recipe: Training) -> float:
    """The learning rate of an update, the first of which is 0: a linear rise, then half a cosine down to 0.

    rate = peak / 2 (1 + cos(pi t)), t the share of the updates after the rise (arXiv:1608.03983, eq. 5). The schedule
    spans `updates` updates, and its rise the recipe's share of them, however many of the recipe's epochs they are.
    """
    warmup_epochs = recipe.schedule.warmup_epochs if isinstance(recipe.schedule, Cosine) else 0.0
    warmup = round(warmup_epochs * updates / recipe.epochs)
    if update < warmup:
        return recipe.learning_rate * update / warmup
    progress = min(1.0, (update - warmup) / max(1, round(updates) - warmup))
    return recipe.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def plateau(history: Sequence[Epoch], schedule: Plateau, rate: float, metric: Metric = "accuracy") -> float:
    """The learning rate for the epoch after `history`, by the rule of Keras' `ReduceLROnPlateau`.

    Keras starts waiting again after it lowered the rate, so every `patience` epochs in a row without a better loss
    lower it once.
    """
    for waited in _epochs_without_improvement(_losses(history, metric), schedule.min_delta):
        if waited and waited % schedule.patience == 0:
            rate = max(rate * schedule.factor, min(rate, schedule.minimum))
    return rate
