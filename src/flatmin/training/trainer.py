"""The training loop: epochs of steps, each followed by validation and a saved state."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Plateau, Training
from flatmin.training.optimizer import assign, averaged_weights, updates, values
from flatmin.training.resume import State
from flatmin.training.schedule import Epoch, best_epoch, plateau, stops
from flatmin.training.step import TrainStep
from flatmin.training.validation import Validator
from flatmin.training.workers import Workers


class Trainer:
    """Trains layers by a recipe, and can resume after any epoch."""

    def __init__(self, name: str, recipe: Training, step: TrainStep, validator: Validator, workers: Workers) -> None:
        self.name, self.recipe = name, recipe
        self._step, self._validator, self._workers = step, validator, workers
        self._layers, self._optimizer = step.layers, step.optimizer

    def train(self, state: State) -> list[Epoch]:
        """Run the remaining epochs; leave the best epoch's weights in the layers and return every epoch's metrics."""
        variables = self._step.variables
        history, best = self._resume(state, variables)
        while len(history) < self.recipe.epochs and not stops(history, self.recipe.early_stopping):
            history.append(self._epoch(history))
            if best_epoch(history) == len(history) - 1:
                with averaged_weights(self._optimizer, self._layers.trainable_variables):
                    best = values(self._layers.trainable_variables)
            if (
                self._step.replicated
            ):  # replicas can drift in the last bits: all take the first one's values, as a resume does
                assign(variables, values(variables))
            state.save(history, variables, best)
        assign(self._layers.trainable_variables, best)
        return history

    def _resume(self, state: State, variables: Sequence[Any]) -> tuple[list[Epoch], list[np.ndarray]]:
        """Set the variables to the last state that all workers have; return its history and best weights."""
        saved = self._workers.gather([state.epochs()])
        common = int(saved.min())
        if common and self._workers.gather([state.has(common)]).all():
            console.log(f"{self.name}: resuming after epoch {common}")
            return state.load(common, variables)
        if saved.any():
            console.log(f"{self.name}: starting again, since the workers have no epoch in common")
        return [], []

    def _epoch(self, history: list[Epoch]) -> Epoch:
        number = len(history)
        started = time.monotonic()
        if isinstance(self.recipe.schedule, Plateau):
            self._optimizer.learning_rate = plateau(history, self.recipe.schedule, self.recipe.learning_rate)
        rate = float(tf.convert_to_tensor(self._optimizer.learning_rate))
        batches = iter(self._step.source.epoch(number, self._step.strategy))
        updates_before, totals = updates(self._optimizer), np.zeros(3)
        title = f"{self.name} {number + 1}/{self.recipe.epochs}"
        for _ in console.progress(range(self._step.steps), title, unit="batch"):
            totals += self._step(batches)
        loss, correct, count = totals
        with averaged_weights(self._optimizer, self._layers.trainable_variables):
            scores = self._validator.scores()
        if self._step.replicated:  # all take the first replica's scores, so that all make the same decisions
            scores = dict(zip(scores, self._workers.gather(list(scores.values()))[0].tolist(), strict=True))
        epoch = {"learning_rate": rate, "loss": loss / count, "accuracy": correct / count} | scores
        self._refuse_divergence(epoch, number + 1, updates(self._optimizer) - updates_before)
        console.log(
            f"{title}: loss {epoch['loss']:.4f}, val loss {epoch['val_loss']:.4f}, "
            f"val accuracy {epoch['val_accuracy']:.4f} ({time.monotonic() - started:.1f} s)"
        )
        return epoch

    def _refuse_divergence(self, epoch: Epoch, number: int, updates: int) -> None:
        """Refuse an epoch that it makes no sense to continue from.

        Raises:
            InputError: a metric is not finite; or no step was taken, since no gradient was finite.
        """
        received = f"{epoch['loss']:g} and val {epoch['val_loss']:g}"
        finds_loss_scale = number == 1 and isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer)
        if not updates and self._step.steps >= self._step.settings.accumulate and not finds_loss_scale:
            received = f"gradients that were not, in each of {self._step.steps} batches"
        elif all(map(math.isfinite, epoch.values())):
            return
        hint = f"try a lower learning_rate than {epoch['learning_rate']:g}"
        if self._step.settings.hint:
            hint += f", or {self._step.settings.hint}"
        raise InputError(
            f"{self.name}: the training diverged in epoch {number}: expected finite losses and gradients, "
            f"received {received}; {hint}"
        )
