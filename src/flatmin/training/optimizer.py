"""The recipe's Keras optimizer, and the moving averages of the weights that it keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin.common.params import Training

SGD_MOMENTUM = 0.9


def make_optimizer(recipe: Training) -> keras.optimizers.Optimizer:
    """Make the optimizer of a recipe. Under mixed_float16 it scales the loss.

    Its learning rate is a variable that the training sets: Keras would trace a schedule again for every weight.
    """
    options: dict[str, Any] = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay or None}
    if recipe.ema is not None:
        options |= {"use_ema": True, "ema_momentum": recipe.ema}
    match recipe.optimizer:
        case "adam":
            optimizer = keras.optimizers.Adam(**options)
        case "adamw":
            optimizer = keras.optimizers.AdamW(**(options | {"weight_decay": recipe.weight_decay}))
        case "sgd":
            optimizer = keras.optimizers.SGD(momentum=SGD_MOMENTUM, **options)
    if keras.config.dtype_policy().name == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def updates(optimizer: keras.optimizers.Optimizer) -> int:
    """The number of updates so far."""
    return int(tf.convert_to_tensor(optimizer.iterations))


@contextmanager
def averaged_weights(optimizer: keras.optimizers.Optimizer, variables: Sequence[Any]) -> Iterator[None]:
    """Within the block the variables hold their moving averages, if the optimizer keeps some."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not inner.use_ema or not updates(optimizer):  # before the first update the averages are zeros
        yield
        return
    weights = values(variables)
    assign(variables, inner._model_variables_moving_average)
    try:
        yield
    finally:
        assign(variables, weights)


def values(variables: Sequence[Any]) -> list[np.ndarray]:
    return [variable.numpy() for variable in variables]


def assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
