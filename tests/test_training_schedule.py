"""Decisions from the history: against Keras' own callbacks."""

from __future__ import annotations

from types import SimpleNamespace

import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmin.common.params import EarlyStopping, Plateau
from flatmin.training import schedule

# Multiples of 1/16, as are the differences asked for below: nothing is rounded, here or in Keras.
LOSSES = st.lists(st.integers(0, 48).map(lambda value: value / 16), min_size=1, max_size=30)


class Trained:
    """The part of a model that Keras' callbacks use."""

    def __init__(self) -> None:
        self.optimizer = SimpleNamespace(learning_rate=0.1)
        self.stop_training = False


def history(losses: list[float]) -> list[dict[str, float]]:
    return [{"val_loss": loss, "val_accuracy": 0.0} for loss in losses]


@given(LOSSES)
def test_plateau_after_any_losses_is_keras_rule(losses: list[float]) -> None:
    callback = keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=2, min_delta=0.125, min_lr=0.02)
    model = Trained()
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
    rule = Plateau(name="plateau", factor=0.5, patience=2, min_delta=0.125, minimum=0.02)
    assert schedule.plateau(history(losses), rule, 0.1) == pytest.approx(float(model.optimizer.learning_rate))


@given(LOSSES)
def test_stops_after_any_losses_is_keras_rule(losses: list[float]) -> None:
    callback = keras.callbacks.EarlyStopping(monitor="val_loss", patience=3, min_delta=0.125)
    model = Trained()
    callback.set_model(model)
    callback.on_train_begin()
    setting = EarlyStopping(patience=3, min_delta=0.125)
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
        assert schedule.stops(history(losses[: epoch + 1]), setting) == model.stop_training
        if model.stop_training:
            break
    assert not schedule.stops(history(losses), None)


def test_stops_before_the_first_epoch_is_false() -> None:
    assert not schedule.stops([], EarlyStopping(patience=1))


def test_best_epoch_of_equal_accuracies_has_the_lowest_loss_then_is_the_first() -> None:
    epochs = [
        {"val_accuracy": accuracy, "val_loss": loss} for accuracy, loss in ((0.5, 1), (0.7, 2), (0.7, 1.5), (0.7, 1.5))
    ]
    assert schedule.best_epoch(epochs) == 2
