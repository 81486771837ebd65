"""The optimizer of a recipe: weight decay and moving averages against closed forms."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from flatmin import runtime
from flatmin.common.params import Finetune
from flatmin.training.optimizer import averaged_weights, make_optimizer, updates


def recipe(**changes: Any) -> Finetune:
    return Finetune.model_validate(
        {"optimizer": "sgd", "learning_rate": 0.4, "batch_size": 25, "epochs": 2, "image_size": None} | changes
    )


def built(recipe: Finetune, value: float = 1.0) -> tuple[keras.optimizers.Optimizer, keras.Variable]:
    optimizer = make_optimizer(recipe)
    weight = keras.Variable(np.full(2, value, np.float32))
    optimizer.build([weight])
    return optimizer, weight


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_make_optimizer_with_weight_decay_is_decoupled_and_times_the_learning_rate(name: str, decay: float) -> None:
    settings = recipe(optimizer=name, learning_rate=0.5, weight_decay=decay, schedule=None)
    optimizer, weight = built(settings, value=4.0)
    optimizer.apply([tf.zeros(2)], [weight])
    np.testing.assert_allclose(np.array(weight), 4 * (1 - 0.5 * decay))


def test_make_optimizer_under_mixed_float16_scales_the_loss() -> None:
    assert not isinstance(make_optimizer(recipe()), keras.optimizers.LossScaleOptimizer)
    with runtime.dtype_policy("mixed_float16"):
        assert isinstance(make_optimizer(recipe()), keras.optimizers.LossScaleOptimizer)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_averaged_weights_after_updates_are_the_moving_averages_within_the_block_only(precision: str) -> None:
    with runtime.dtype_policy(precision):
        optimizer, weight = built(recipe(ema=0.7, learning_rate=0.1))
    with averaged_weights(optimizer, [weight]):
        np.testing.assert_array_equal(weight, [1, 1])  # and not the zeros that Keras' averages are before an update
    average = np.zeros(2)
    for update in range(1, 4):
        scale = float(optimizer.scale_loss(1.0))
        optimizer.apply([scale * tf.ones(2)], [weight])
        assert updates(optimizer) == update
        average = np.array(weight) if update == 1 else 0.7 * average + 0.3 * np.array(weight)
    own = np.array(weight)
    with suppress(KeyboardInterrupt), averaged_weights(optimizer, [weight]):
        np.testing.assert_allclose(weight, average, rtol=1e-6)
        raise KeyboardInterrupt
    np.testing.assert_array_equal(weight, own)
    assert not np.allclose(own, average)


def test_averaged_weights_without_averages_are_the_weights() -> None:
    optimizer, weight = built(recipe(), 10)
    optimizer.apply([tf.ones(2)], [weight])
    own = np.array(weight)
    with averaged_weights(optimizer, [weight]):
        np.testing.assert_array_equal(weight, own)
