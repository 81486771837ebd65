"""Small networks, data and helpers for the tests of `flatmin.sam`, on each of Keras' backends (KERAS_BACKEND)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from flatmin.sam import Settings, SharpnessAwareMinimization, Step

BACKEND = keras.config.backend()
RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.normal(size=(36, 6)).astype(np.float32)
LABELS = np.arange(36) % 3
BATCHES = [(INPUTS[start : start + 9], LABELS[start : start + 9]) for start in (0, 5, 12, 20, 27, 3, 8, 15, 23, 1)]


@pytest.fixture
def float32_policy() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def regression(dtype: str = "float32") -> keras.Model:
    """Softmax regression, as `sam_reference` computes it."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, dtype=dtype)])
    random = np.random.default_rng(3)
    model.set_weights([random.normal(size=(6, 3)), random.normal(size=3)])
    return model


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


def values(variables: Any) -> list[np.ndarray]:
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


def distance(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """The largest difference, relative to the largest value."""
    largest = max(np.abs(value).max() for value in other)
    return float(max(np.abs(a - b).max() for a, b in zip(one, other, strict=True)) / largest)


def assert_equal(received: list[np.ndarray], expected: list[np.ndarray], atol: float = 0.0) -> None:
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def fit(model: keras.Model, optimizer: Any = None, epochs: int = 2, **options: Any) -> dict[str, list[float]]:
    """Train on the whole data, in batches of 16, 16 and 4. `compile` holds options of `compile`."""
    own = options.pop("compile", {})
    if optimizer is not None:
        model.compile(optimizer, cross_entropy(), **own)
    data = {"x": INPUTS, "y": LABELS, "batch_size": 16} | options
    return model.fit(**data, epochs=epochs, shuffle=False, verbose=0).history


def trained(wrap: Callable[[keras.Model], keras.Model], model: keras.Model, **options: Any) -> list[np.ndarray]:
    """All variables of the model after training through `wrap(model)`."""
    fit(wrap(model), keras.optimizers.SGD(0.05, momentum=0.9), **options)
    return values(model.variables)


def wrapping(**settings: Any) -> Callable[[keras.Model], keras.Model]:
    return lambda model: SharpnessAwareMinimization(model, **settings)


def train_by_wrapper(
    rate: Any, batches: Any = BATCHES, optimizer: Any = None, *, eagerly: bool = False, **settings: Any
) -> list[np.ndarray]:
    """The regression's variables after a step of `train_on_batch` on each batch."""
    model = regression()
    wrapped = SharpnessAwareMinimization(model, **settings)
    wrapped.compile(optimizer or keras.optimizers.SGD(rate), cross_entropy(), run_eagerly=eagerly)
    for batch in batches:
        wrapped.train_on_batch(*batch)
    return values(model.variables)


def train_by_step(rate: Any, batches: Any = BATCHES, optimizer: Any = None, **settings: Any) -> list[np.ndarray]:
    """The same in a loop of one's own, compiled as the backend's users do."""
    model, optimizer, loss = regression(), optimizer or keras.optimizers.SGD(rate), cross_entropy()
    optimizer.build(model.trainable_variables)
    step = Step(Settings(**settings), model, optimizer)

    def forward(batch: Any) -> tuple[Any, Any]:
        outputs = model(batch[0], training=True)
        return loss(batch[1], outputs), outputs

    if BACKEND == "jax":
        import jax

        train = jax.jit(lambda state, batch: step.stateless_call(state, forward, batch)[2])
        state = step.state
        for batch in batches:
            state = train(state, batch)
        step.state = state
        return values(model.variables)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        train = tf.function(lambda batch: step(forward, batch))
    else:
        train = lambda batch: step(forward, batch)  # noqa: E731
    for batch in batches:
        train(tuple(ops.convert_to_tensor(each) for each in batch))
    return values(model.variables)
