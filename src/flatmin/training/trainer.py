"""The training loop: steps, and after each epoch, or after equal parts of them, validation and a saved state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Metric, Plateau, Training
from flatmin.training.optimizer import assign, averaged_weights, updates, values
from flatmin.training.resume import State
from flatmin.training.schedule import Epoch, Plan, best_epoch, plateau, stops
from flatmin.training.step import Sums, TrainStep
from flatmin.training.validation import Validator
from flatmin.training.workers import Workers


class Trainer:
    """Trains layers by a recipe for as long as a plan says, and can resume after any validation."""

    def __init__(
        self,
        name: str,
        recipe: Training,
        plan: Plan,
        step: TrainStep,
        validator: Validator,
        workers: Workers,
        metric: Metric = "accuracy",
    ) -> None:
        self.name, self.recipe, self.plan, self.metric = name, recipe, plan, metric
        self._step, self._validator, self._workers = step, validator, workers
        self._layers, self._optimizer = step.layers, step.optimizer

    def train(self, state: State, watch: Callable[[list[Epoch]], None] = lambda _: None) -> list[Epoch]:
        """Run what remains; leave the weights of the best validation in the layers and return the history.

        watch: is given the history after every validation, in a worker that writes outputs.
        """
        variables = self._step.variables
        history, best = self._resume(state, variables)
        while len(history) < self.plan.validations and not self._stops(history):
            history.append(self._epoch(history))
            if self._workers.writes_outputs:
                watch(history)
            if best_epoch(history, self.metric) == len(history) - 1:
                with averaged_weights(self._optimizer, self._layers.trainable_variables):
                    best = values(self._layers.trainable_variables)
            if (
                self._step.replicated
            ):  # replicas can drift in the last bits: all take the first one's values, as a resume does
                assign(variables, values(variables))
            state.save(history, variables, best)
        assign(self._layers.trainable_variables, best)
        return history

    def _stops(self, history: Sequence[Epoch]) -> bool:
        return stops(history, self.recipe.early_stopping, self.metric)

    def _resume(self, state: State, variables: Sequence[Any]) -> tuple[list[Epoch], list[np.ndarray]]:
        """Set the variables to the last state that all workers have; return its history and best weights."""
        saved = self._workers.gather([state.epochs()])
        common = int(saved.min())
        if common and self._workers.gather([state.has(common)]).all():
            history, best = state.load(common, variables)
            console.log(f"{self.name}: resuming after epoch {history[-1]['epoch']:.6g}")
            return history, best
        if saved.any():
            console.log(f"{self.name}: starting again, since the workers have no epoch in common")
        return [], []

    def _epoch(self, history: list[Epoch]) -> Epoch:
        number = len(history)
        started = time.monotonic()
        if isinstance(self.recipe.schedule, Plateau):
            self._optimizer.learning_rate = plateau(
                history, self.recipe.schedule, self.recipe.learning_rate, self.metric
            )
        rate = self._step.rate()
        first, last = self.plan.end(number), self.plan.end(number + 1)
        updates_before, totals = updates(self._optimizer), np.zeros(Sums.SIZE)
        title = f"{self.name} {number + 1}/{self.plan.validations}"
        for batches in console.progress(self._batches(first, last), title, last - first, "batch"):
            totals += self._step(batches)
        sums = Sums(totals)
        with averaged_weights(self._optimizer, self._layers.trainable_variables):
            scores = self._validator.scores()
        if self._step.replicated:  # all take the first replica's scores, so that all make the same decisions
            scores = dict(zip(scores, self._workers.gather(list(scores.values()))[0].tolist(), strict=True))
        epoch = {"epoch": last / self.plan.steps_per_epoch, "learning_rate": rate, **sums.means(), **scores}
        self._refuse_divergence(epoch, last - first, updates(self._optimizer) - updates_before)
        console.log(
            f"{title}: loss {epoch['loss']:.4f}, val loss {epoch['val_loss']:.4f}, "
            f"val accuracy {epoch['val_accuracy']:.4f} ({time.monotonic() - started:.1f} s)"
        )
        return epoch

    def _batches(self, first: int, last: int) -> Iterator[Any]:
        """For each step from `first` on and before `last`, an iterator whose next batch is that step's."""
        while first < last:
            epoch, skipped = divmod(first, self.plan.steps_per_epoch)
            count = min(last - first, self.plan.steps_per_epoch - skipped)
            batches = iter(self._step.source.epoch(epoch, self._step.strategy, skipped))
            for _ in range(count):
                yield batches
            first += count

    def _refuse_divergence(self, epoch: Epoch, steps: int, updates: int) -> None:
        """Refuse an epoch that it makes no sense to continue from.

        Args:
            steps, updates: how many the epoch had.

        Raises:
            InputError: a metric is not finite; or no step was taken, since no gradient was finite.
        """
        received = f"{epoch['loss']:g} and val {epoch['val_loss']:g}"
        number = math.ceil(epoch["epoch"])
        finds_loss_scale = number == 1 and isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer)
        if not updates and steps >= self._step.settings.accumulate and not finds_loss_scale:
            received = f"gradients that were not, in each of {steps} batches"
        elif all(map(math.isfinite, epoch.values())):
            return
        hint = f"try a lower learning_rate than {epoch['learning_rate']:g}"
        if self._step.settings.hint:
            hint += f", or {self._step.settings.hint}"
        raise InputError(
            f"{self.name}: the training diverged in epoch {number}: expected finite losses and gradients, "
            f"received {received}; {hint}"
        )
