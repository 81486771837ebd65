"""Small networks, data and helpers for the tests of `flatmin.sam`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from flatmin.sam import SharpnessAwareMinimization

RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.normal(size=(37, 6)).astype(np.float32)
LABELS = np.arange(37) % 3
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
}


@pytest.fixture
def float32_policy() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def network() -> keras.Model:
    """Dropout, trained BatchNorm and regularisation, always with the same weights."""
    keras.utils.set_random_seed(5)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, kernel_regularizer=keras.regularizers.L2(0.1)),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("tanh"),
            keras.layers.Dropout(0.5, seed=3),
            keras.layers.Dense(3, dtype="float32"),
        ]
    )


def regression(dtype: str = "float32") -> keras.Model:
    """Softmax regression, as `sam_reference` computes it."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, dtype=dtype)])
    random = np.random.default_rng(3)
    model.set_weights([random.normal(size=(6, 3)), random.normal(size=3)])
    return model


def values(variables: Any) -> list[np.ndarray]:
    return [np.array(variable) for variable in variables]


def assert_equal(received: list[np.ndarray], expected: list[np.ndarray], atol: float = 0.0) -> None:
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def fit(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    batch_size: int = 16,
    epochs: int = 7,
    compile_options: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, list[float]]:
    model.compile(optimizer, CROSS_ENTROPY, metrics=["accuracy"], **(compile_options or {}))
    data = {"x": INPUTS, "y": LABELS} | options
    return model.fit(**data, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0).history


def fitted(wrap: Callable[[keras.Model], keras.Model], optimizer: str = "momentum", **options: Any) -> list[np.ndarray]:
    """All variables of the network after `wrap(network)` was trained."""
    model = network()
    fit(wrap(model), OPTIMIZERS[optimizer](), **options)
    return values(model.variables)


def wrapping(**settings: Any) -> Callable[[keras.Model], keras.Model]:
    return lambda model: SharpnessAwareMinimization(model, **settings)


def gradients_at(model: keras.Model, shifts: list[Any]) -> list[tf.Tensor]:
    """The plain gradient with every weight moved by hand. All variables are restored, also the dropout's state."""
    before = values(model.variables)
    for variable, shift in zip(model.trainable_variables, shifts, strict=True):
        variable.assign_add(shift)
    with tf.GradientTape() as tape:
        loss = CROSS_ENTROPY(LABELS, model(INPUTS, training=True)) + sum(model.losses)
    gradients = tape.gradient(loss, model.trainable_variables)
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    return gradients


def sam_gradient(model: keras.Model, rho: float) -> list[tf.Tensor]:
    """SAM's gradient by its definition: the plain one, the perturbation, the plain one there."""
    first = gradients_at(model, [tf.zeros(variable.shape) for variable in model.trainable_variables])
    norm = np.sqrt(sum(float(tf.reduce_sum(gradient**2)) for gradient in first))
    return gradients_at(model, [rho * gradient / norm for gradient in first])


BATCHES = [(INPUTS[start : start + 9], LABELS[start : start + 9]) for start in (0, 5, 12, 20, 28, 3)]


def train_regression(rates: Any, *, rho: float = 0.5, batches: Any = BATCHES, **settings: Any) -> list[np.ndarray]:
    model = regression()
    wrapped = SharpnessAwareMinimization(model, rho, **settings)
    rate = keras.optimizers.schedules.CosineDecay(0.8, len(BATCHES)) if rates is None else rates
    wrapped.compile(keras.optimizers.SGD(rate), CROSS_ENTROPY)
    for batch in batches:
        wrapped.train_on_batch(*batch)
    return values(model.variables)


METHOD_SETTINGS: list[dict[str, Any]] = [
    {},
    {"adaptive": True, "eta": 0.1},
    {"num_batch_splits": 4},
    {"every": 3},
    {"adaptive": True, "every": 2},
    {"method": "gsam"},
    {"method": "gsam", "alpha": 0.7, "rho_min": 0.1, "rho_max": 0.9},
    {"method": "gsam", "alpha": 0.7, "num_batch_splits": 2},
    {"method": "gsam", "rho_min": 0.05, "adaptive": True},
    {"method": "wsam"},
    {"method": "wsam", "gamma": 0.3, "num_batch_splits": 2},
    {"method": "looksam", "every": 3},
    {"method": "looksam", "every": 2, "alpha": 0.3, "adaptive": True},
    {"method": "friendly"},
    {"method": "friendly", "sigma": 0.5, "friendly_lambda": 0.6},
    {"method": "friendly", "num_batch_splits": 2, "adaptive": True},
]
