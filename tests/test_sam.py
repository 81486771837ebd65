"""Sharpness-aware minimization: its promises one by one, its methods against the papers, its two doors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pydantic
import pytest
import sam_reference as reference
import sam_replicas
import tensorflow as tf
from loopback import free_ports

from flatmin import params, sam
from flatmin.sam import Settings, SharpnessAwareMinimization, Step

ROOT = Path(__file__).parents[1]
RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.normal(size=(37, 6)).astype(np.float32)
LABELS = np.arange(37) % 3
CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
}


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def network() -> keras.Model:
    """Everything that can go wrong: dropout, trained BatchNorm, regularisation; always the same weights."""
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
    """Softmax regression: what `sam_reference` computes."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, dtype=dtype)])
    random = np.random.default_rng(3)
    model.set_weights([random.normal(size=(6, 3)), random.normal(size=3)])
    return model


def values(variables: Any) -> list[np.ndarray]:
    return [np.array(variable) for variable in variables]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray], atol: float = 0.0) -> None:
    for one, other in zip(found, expected, strict=True):
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
    """All variables of the network after training, wrapped or not."""
    model = network()
    fit(wrap(model), OPTIMIZERS[optimizer](), **options)
    return values(model.variables)


def sharp(**settings: Any) -> Callable[[keras.Model], keras.Model]:
    return lambda model: SharpnessAwareMinimization(model, **settings)


def gradients_at(model: keras.Model, shifts: list[Any]) -> list[tf.Tensor]:
    """The plain gradient with every weight moved by hand; the model is put back, its dropout state included."""
    before = values(model.variables)
    for variable, shift in zip(model.trainable_variables, shifts, strict=True):
        variable.assign_add(shift)
    with tf.GradientTape() as tape:
        loss = CROSS_ENTROPY(LABELS, model(INPUTS, training=True)) + sum(model.losses)
    found = tape.gradient(loss, model.trainable_variables)
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    return found


def sharp_gradient(model: keras.Model, rho: float) -> list[tf.Tensor]:
    """SAM's gradient by the book: the plain one, the shift, the plain one there."""
    clean = gradients_at(model, [tf.zeros(variable.shape) for variable in model.trainable_variables])
    norm = np.sqrt(sum(float(tf.reduce_sum(gradient**2)) for gradient in clean))
    return gradients_at(model, [rho * gradient / norm for gradient in clean])


# Promise: rho 0 is the base optimizer, bit for bit


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(optimizer: str, policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    assert_equal(fitted(sharp(rho=0.0), optimizer), fitted(lambda model: model, optimizer))  # 7 epochs of 3 steps


@pytest.mark.parametrize("method", sam.METHODS)
def test_a_tiny_rho_is_the_base_optimizer_but_for_rounding(method: str) -> None:
    # The two-pass path itself: other masks, other statistics or dropped regularisation would show.
    settings = {"alpha": 0.0} if method == "gsam" else {"sigma": 0.0} if method == "friendly" else {}
    found = fitted(sharp(rho=1e-12, method=method, **settings))
    assert_equal(found, fitted(lambda model: model), atol=1e-6)
    if method == "sam":
        assert max(np.abs(a - b).max() for a, b in zip(fitted(sharp(rho=0.05)), found, strict=True)) > 1e-3


@pytest.mark.parametrize("method", sam.METHODS)
def test_no_method_does_anything_at_rho_zero(method: str) -> None:
    assert_equal(fitted(sharp(rho=0.0, method=method)), fitted(lambda model: model))


# Promise: the two passes


def test_both_passes_see_the_same_dropout_masks() -> None:
    # The loss is linear in the kernel, so its gradient is the same at any distance unless the masks differ.
    def trained(wrap: Callable[[keras.Model], keras.Model]) -> list[np.ndarray]:
        keras.utils.set_random_seed(5)
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(1, use_bias=False)]
        )
        wrapped = wrap(model)
        wrapped.compile(keras.optimizers.SGD(0.1), lambda _, outputs: outputs)
        wrapped.fit(INPUTS, LABELS, batch_size=16, shuffle=False, verbose=0)
        return values(model.variables)

    assert_equal(trained(sharp(rho=100.0)), trained(lambda model: model), atol=1e-6)


def test_statistics_and_dropout_state_come_from_the_clean_pass_only() -> None:
    # With a learning rate of 0 the weights stay, so that every clean pass is the plain one.
    def trained(wrap: Callable[[keras.Model], keras.Model]) -> list[np.ndarray]:
        model = network()
        fit(wrap(model), keras.optimizers.SGD(0.0))
        return values(model.non_trainable_variables)

    assert_equal(trained(sharp(rho=50.0)), trained(lambda model: model), atol=1e-6)


def test_frozen_batch_normalisation_stays_as_it_is() -> None:
    model = network()
    model.layers[1].trainable = False
    before = values(model.layers[1].variables)
    fit(SharpnessAwareMinimization(model), keras.optimizers.Adam(0.01))
    assert_equal(values(model.layers[1].variables), before)


def test_regularisation_is_in_both_gradients() -> None:
    # 0.1 w^2 alone: its gradient is 0.2 w, at the worst point nearby 0.2 (w + rho w / ||w||).
    kernel = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)
    for rho in (0.0, 0.5):
        dense = keras.layers.Dense(2, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.1))
        model = keras.Sequential([keras.Input((2,)), dense])
        dense.kernel.assign(kernel)
        wrapped = SharpnessAwareMinimization(model, rho)
        wrapped.compile(keras.optimizers.SGD(1.0), lambda _, outputs: 0.0 * outputs)
        loss = wrapped.train_on_batch(np.ones((1, 2)), np.ones((1, 2)))
        np.testing.assert_allclose(np.array(dense.kernel), kernel - 0.2 * kernel * (1 + rho / 5), rtol=1e-5)
        assert float(loss) == pytest.approx(2.5)


def test_losses_that_layers_add_are_in_both_gradients() -> None:
    # The mean of w^2 over activations x w, x = 1: as above, by `add_loss` in place of a weight's regularizer.
    layer = keras.layers.Dense(1, use_bias=False, activity_regularizer=keras.regularizers.L2(1.0))
    model = keras.Sequential([keras.Input((1,)), layer])
    layer.kernel.assign([[3.0]])
    wrapped = SharpnessAwareMinimization(model, 0.5)
    wrapped.compile(keras.optimizers.SGD(0.1), lambda _, outputs: 0.0 * outputs)
    wrapped.train_on_batch(np.ones((4, 1)), np.ones((4, 1)))
    assert float(layer.kernel[0, 0]) == pytest.approx(3.0 - 0.1 * 2 * 3.5)


def test_what_is_reported_is_the_clean_pass() -> None:
    plain = fit(network(), keras.optimizers.SGD(0.0))
    found = fit(SharpnessAwareMinimization(network(), rho=50.0), keras.optimizers.SGD(0.0))
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert found["accuracy"] == plain["accuracy"]


def test_a_step_is_the_gradient_at_weights_moved_by_hand() -> None:
    model = network()
    start, expected = values(model.trainable_variables), sharp_gradient(model, 0.5)
    wrapped = SharpnessAwareMinimization(model, 0.5)
    fit(wrapped, keras.optimizers.SGD(1.0), batch_size=37, epochs=1)
    moved = [before - after for before, after in zip(start, values(model.trainable_variables), strict=True)]
    assert_equal(moved, values(expected), atol=1e-5)


# Promise: precision


@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_mixed_float16_takes_the_norm_of_unscaled_gradients(scale: float) -> None:
    # Unscaled twice, or not at all, rho is a thousand times too small or the step is nearly plain.
    def step(rho: float, optimizer: keras.optimizers.Optimizer, policy: str) -> np.ndarray:
        model = regression(policy)
        wrapped = SharpnessAwareMinimization(model, rho)
        fit(wrapped, optimizer, batch_size=37, epochs=1)
        return np.concatenate([value.ravel() for value in values(model.trainable_variables)])

    plain, expected = (step(rho, keras.optimizers.SGD(1.0), "float32") for rho in (0.0, 2.0))
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=scale)
    found = step(2.0, scaled, "mixed_float16")
    assert np.abs(expected - plain).max() > 0.03
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected - plain).max()


def test_mixed_bfloat16_is_float32_roughly() -> None:
    results = []
    for policy in ("float32", "mixed_bfloat16"):
        model = regression(policy)
        fit(SharpnessAwareMinimization(model, 2.0), keras.optimizers.SGD(1.0), batch_size=37, epochs=1)
        assert all(variable.dtype == "float32" for variable in model.variables)
        results.append(np.concatenate([value.ravel() for value in values(model.trainable_variables)]))
    assert np.abs(results[0] - results[1]).max() < 0.03


def test_a_compiled_mixed_float16_model_scales_its_loss() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    wrapped = SharpnessAwareMinimization(network())
    fit(wrapped, keras.optimizers.Adam(0.01))
    assert isinstance(wrapped.optimizer, keras.optimizers.LossScaleOptimizer)
    assert all(np.isfinite(value).all() for value in values(wrapped.model.trainable_variables))


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate": 2}, {"num_batch_splits": 3}, {"method": "friendly"}, {"method": "gsam"}], ids=str
)
@pytest.mark.parametrize("scales", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(scales: bool, settings: dict[str, Any]) -> None:
    model = network()
    wrapped = SharpnessAwareMinimization(model, **settings)
    inner = keras.optimizers.Adam(0.01, use_ema=True)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0) if scales else inner
    fit(wrapped, optimizer, epochs=2)
    assert wrapped._step is not None
    before = values([*model.variables, *inner.variables, *wrapped._step.variables])
    broken = INPUTS.copy()
    broken[3, 2] = np.inf
    wrapped.train_on_batch(broken, LABELS)
    assert_equal(values([*model.variables, *inner.variables, *wrapped._step.variables]), before)
    if scales:
        assert float(optimizer.dynamic_scale) == 4.0
    for _ in range(2):
        wrapped.train_on_batch(INPUTS, LABELS)
    assert np.abs(np.array(model.trainable_variables[0]) - before[0]).max() > 1e-5


def test_a_perturbed_gradient_alone_that_is_not_finite_skips_the_step_too() -> None:
    # The loss is finite at w = 1 and not at w + rho, which the loss scale must learn as well.
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((1,)), layer])
    inner = keras.optimizers.SGD(0.1)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    wrapped = SharpnessAwareMinimization(model, 1.0, method="gsam")
    wrapped.compile(optimizer, lambda _, outputs: outputs + tf.where(outputs > 1.5, np.inf, 0.0) * outputs)
    wrapped.train_on_batch(np.ones((2, 1)), np.ones((2, 1)))
    assert float(layer.kernel[0, 0]) == 1.0
    assert float(optimizer.dynamic_scale) == 4.0
    assert int(inner.iterations) == 0


# Promise: what touches the final update, and once


@pytest.mark.parametrize(
    "options",
    [
        {"clipnorm": 0.05},
        {"global_clipnorm": 0.05},
        {"clipvalue": 0.01},
        {"weight_decay": 0.1},
        {"use_ema": True, "ema_momentum": 0.5},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_optimizers_own_settings_touch_the_final_gradient_once(options: dict[str, Any]) -> None:
    # What the optimizer makes of SAM's gradient when that is handed to it by hand.
    expected, found = network(), network()
    by_hand, wrapped = (
        keras.optimizers.SGD(0.5, momentum=0.9, **options),
        keras.optimizers.SGD(0.5, momentum=0.9, **options),
    )
    gradient = sharp_gradient(expected, 0.5)
    by_hand.build(expected.trainable_variables)
    by_hand.apply(gradient, expected.trainable_variables)
    model = SharpnessAwareMinimization(found, 0.5)
    model.compile(wrapped, CROSS_ENTROPY)
    model.train_on_batch(INPUTS, LABELS)
    assert_equal(values(found.trainable_variables), values(expected.trainable_variables), atol=1e-5)
    assert_equal(values(wrapped.variables), values(by_hand.variables), atol=1e-5)


def test_counters_advance_once_a_step() -> None:
    wrapped = SharpnessAwareMinimization(network(), num_batch_splits=3)
    fit(wrapped, keras.optimizers.Adam(), epochs=2)
    assert int(wrapped.optimizer.iterations) == 6


# Promise: parts, unused weights, interrupts, sparse gradients


@pytest.mark.parametrize("size", [7, 2, 1])
def test_parts_are_weighted_by_their_size(size: int) -> None:
    # 7 in 3 are 3, 2 and 2; 2 in 3 are 1 and 1.
    results = []
    for splits in (None, 3):
        model = regression()
        wrapped = SharpnessAwareMinimization(model, 0.0, splits)
        wrapped.compile(keras.optimizers.SGD(1.0), CROSS_ENTROPY)
        loss = wrapped.train_on_batch(INPUTS[:size], LABELS[:size])
        results.append([*values(model.variables), np.array(loss)])
    assert_equal(results[1], results[0], atol=1e-6)


def test_outputs_of_parts_come_back_in_order_whatever_their_structure() -> None:
    inputs = keras.Input((6,))
    model = keras.Model(inputs, {"one": keras.layers.Dense(3)(inputs), "two": keras.layers.Dense(2)(inputs)})

    def forward(part: Any) -> tuple[tf.Tensor, Any]:
        outputs = model(part[0], training=True)
        return tf.reduce_mean(outputs["one"]) + tf.reduce_mean(outputs["two"]), outputs

    optimizer = keras.optimizers.SGD(0.0)
    optimizer.build(model.trainable_variables)
    step = Step(Settings(num_batch_splits=3), model, optimizer)
    loss, seen = step(forward, (INPUTS[:7], None))
    expected = model(INPUTS[:7])
    for name in ("one", "two"):
        np.testing.assert_allclose(seen[name], expected[name], atol=1e-6)
    assert float(loss) == pytest.approx(float(forward((INPUTS[:7], None))[0]), abs=1e-6)


class Unused(keras.Model):
    """One weight is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(3)
        self.unused = self.add_weight(shape=(2, 2), initializer="ones", name="unused")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.dense(inputs)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # which Keras says of the base optimizer too
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_batch_splits": 2}, {"accumulate": 2}, {"method": "looksam", "every": 2}, {"method": "friendly"}],
)
def test_an_unused_weight_is_left_alone(settings: dict[str, Any]) -> None:
    model = Unused()
    fit(SharpnessAwareMinimization(model, **settings), keras.optimizers.AdamW(0.01, weight_decay=0.5), epochs=2)
    assert_equal([np.array(model.unused)], [np.ones((2, 2), np.float32)])


def test_an_interrupted_step_leaves_no_perturbed_weight() -> None:
    calls = []

    class Interrupted(keras.layers.Layer):
        def call(self, inputs: tf.Tensor) -> tf.Tensor:
            calls.append(1)
            if len(calls) % 2 == 0:
                raise KeyboardInterrupt
            return inputs

    model = keras.Sequential([keras.layers.Dense(3), Interrupted()])
    model.build((None, 6))
    calls.clear()
    before = values(model.variables)

    def forward(part: Any) -> tuple[tf.Tensor, Any]:
        outputs = model(part, training=True)
        return tf.reduce_mean(outputs**2), outputs

    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    with pytest.raises(KeyboardInterrupt):
        Step(Settings(rho=5.0), model, optimizer)(forward, INPUTS)
    assert len(calls) == 2  # in the perturbed pass
    assert_equal(values(model.variables), before)


@pytest.mark.parametrize("settings", [{}, {"num_batch_splits": 2}, {"adaptive": True}, {"accumulate": 2}])
def test_an_embedding_learns_as_a_matrix_product_does(settings: dict[str, Any]) -> None:
    # The embedding's gradient is IndexedSlices with repeated indices; the product's is dense.
    words = np.array([[1, 1, 4], [0, 2, 1], [4, 4, 4], [3, 1, 0]])
    one_hot = np.eye(5, dtype=np.float32)[words]
    results = []
    for first, inputs in ((keras.layers.Embedding(5, 4), words), (keras.layers.Dense(4, use_bias=False), one_hot)):
        model = keras.Sequential([first, keras.layers.Flatten(), keras.layers.Dense(3)])
        model.build(inputs.shape)
        random = np.random.default_rng(1)
        model.set_weights([random.normal(size=variable.shape) for variable in model.weights])
        wrapped = SharpnessAwareMinimization(model, 0.5, **settings)
        wrapped.compile(keras.optimizers.SGD(0.5), CROSS_ENTROPY)
        for _ in range(4):
            wrapped.train_on_batch(inputs, np.array([0, 1, 2, 0]))
        results.append(values(model.variables))
    assert_equal(results[0], results[1], atol=1e-5)


# Ways of running


@pytest.mark.parametrize("settings", [{}, {"num_batch_splits": 3}, {"every": 2}, {"accumulate": 2}], ids=str)
def test_run_eagerly_gives_the_same(settings: dict[str, Any]) -> None:
    eager = fitted(sharp(rho=0.5, **settings), epochs=2, compile_options={"run_eagerly": True})
    assert_equal(eager, fitted(sharp(rho=0.5, **settings), epochs=2), atol=1e-5)


def test_steps_per_execution_gives_the_same() -> None:
    several = fitted(sharp(every=2), compile_options={"steps_per_execution": 3})
    assert_equal(several, fitted(sharp(every=2)), atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"every": 2}, {"accumulate": 2}, {"method": "looksam", "every": 2}], ids=str)
def test_jit_compile_gives_the_same(settings: dict[str, Any]) -> None:
    # Without dropout, whose masks XLA draws by another algorithm.
    results = []
    for jit_compile in (True, False):
        model = regression()
        wrapped = SharpnessAwareMinimization(model, 0.5, **settings)
        fit(wrapped, keras.optimizers.SGD(0.5), compile_options={"jit_compile": jit_compile})
        results.append(values(model.variables))
    assert_equal(results[0], results[1], atol=1e-5)


def test_jit_compile_with_parts_is_refused() -> None:
    wrapped = SharpnessAwareMinimization(network(), num_batch_splits=2)
    with pytest.raises(ValueError, match=r"`jit_compile`.*num_batch_splits"):
        wrapped.compile("sgd", "mse", jit_compile=True)
    wrapped.compile("sgd", "mse", jit_compile="auto")
    assert not wrapped.jit_compile


@pytest.mark.parametrize("settings", [{}, {"num_batch_splits": 3}], ids=str)
def test_sample_and_class_weights(settings: dict[str, Any]) -> None:
    class_weight = {0: 1.0, 1: 2.0, 2: 0.5}
    sample_weight = np.array([class_weight[int(label)] for label in LABELS])
    by_class = fitted(sharp(rho=0.5, **settings), class_weight=class_weight, epochs=2)
    by_sample = fitted(sharp(rho=0.5, **settings), sample_weight=sample_weight, epochs=2)
    assert_equal(by_class, by_sample, atol=1e-6)
    assert np.abs(by_class[0] - fitted(sharp(rho=0.5, **settings), epochs=2)[0]).max() > 1e-3


def test_parts_of_a_weighted_batch_are_the_weighted_batch() -> None:
    weight = np.linspace(0.1, 2.0, 7)
    results = []
    for splits in (None, 3):
        model = regression()
        wrapped = SharpnessAwareMinimization(model, 0.0, splits)
        wrapped.compile(keras.optimizers.SGD(1.0), CROSS_ENTROPY)
        wrapped.train_on_batch(INPUTS[:7], LABELS[:7], sample_weight=weight)
        results.append(values(model.variables))
    assert_equal(results[1], results[0], atol=1e-6)


@pytest.mark.parametrize("settings", [{"num_batch_splits": 2}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none", "mean_with_sample_weight"])
def test_a_loss_that_is_no_mean_is_refused_where_parts_are_averaged(reduction: str, settings: dict[str, Any]) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    with pytest.raises(ValueError, match="Invalid value received for argument `loss`"):
        SharpnessAwareMinimization(network(), **settings).compile("sgd", loss)
    SharpnessAwareMinimization(network()).compile("sgd", loss)


# Methods


BATCHES = [(INPUTS[start : start + 9], LABELS[start : start + 9]) for start in (0, 5, 12, 20, 28, 3)]


def train_regression(rates: Any, *, rho: float = 0.5, batches: Any = BATCHES, **settings: Any) -> list[np.ndarray]:
    model = regression()
    wrapped = SharpnessAwareMinimization(model, rho, **settings)
    rate = keras.optimizers.schedules.CosineDecay(0.8, len(BATCHES)) if rates is None else rates
    wrapped.compile(keras.optimizers.SGD(rate), CROSS_ENTROPY)
    for batch in batches:
        wrapped.train_on_batch(*batch)
    return values(model.variables)


COSINE = [0.4 * (1 + np.cos(np.pi * step / len(BATCHES))) for step in range(len(BATCHES))]
OF_A_METHOD: list[dict[str, Any]] = [
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
AS_IN_THE_PAPERS = {
    "gsam": {"alpha": 0.4},
    "wsam": {"gamma": 0.9},
    "looksam": {"alpha": 0.7},
    "friendly": {"sigma": 1.0, "friendly_lambda": 0.9},
}


@pytest.mark.parametrize("settings", OF_A_METHOD, ids=str)
def test_methods_are_their_papers(settings: dict[str, Any]) -> None:
    found = train_regression(None, **settings)
    expected_settings = AS_IN_THE_PAPERS.get(settings.get("method", "sam"), {}) | settings
    for name, other in (("num_batch_splits", "splits"), ("friendly_lambda", "decay")):
        if name in expected_settings:
            expected_settings[other] = expected_settings.pop(name)
    start = [value.astype(np.float64) for value in values(regression().variables)]
    expected = reference.train(start, BATCHES, COSINE, **expected_settings)
    plain = reference.train(start, BATCHES, COSINE, rho=0.0, eta=1.0)
    assert_equal(found, expected, atol=1e-4)
    assert max(np.abs(one - other).max() for one, other in zip(expected, plain, strict=True)) > 1e-2


def test_gsam_without_alpha_and_with_one_rho_is_sam() -> None:
    assert_equal(train_regression(0.5, method="gsam", alpha=0.0), train_regression(0.5), atol=1e-6)


def test_wsam_of_a_half_is_sam_and_of_nothing_is_plain() -> None:
    assert_equal(train_regression(0.5, method="wsam", gamma=0.5), train_regression(0.5), atol=1e-6)
    assert_equal(train_regression(0.5, method="wsam", gamma=0.0), train_regression(0.5, rho=0.0), atol=1e-6)


def test_looksam_at_every_step_is_sam() -> None:
    assert_equal(train_regression(0.5, method="looksam"), train_regression(0.5))


def test_friendly_without_sigma_is_sam() -> None:
    assert_equal(train_regression(0.5, method="friendly", sigma=0.0), train_regression(0.5), atol=1e-6)


def test_one_example_to_a_part_perturbs_each_by_itself() -> None:
    found = train_regression(0.5, num_batch_splits=9, batches=BATCHES[:1])
    singles = [train_regression(0.5, batches=[(x[None], y[None])]) for x, y in zip(*BATCHES[0], strict=True)]
    assert_equal(found, [np.mean(each, axis=0) for each in zip(*singles, strict=True)], atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (0.3, (0.0, 0.3)),
        (keras.optimizers.schedules.CosineDecay(0.4, 10), (0.0, 0.4)),
        (keras.optimizers.schedules.CosineDecay(0.0, 10, alpha=0.1, warmup_target=0.5, warmup_steps=3), (0.05, 0.5)),
        (keras.optimizers.schedules.PolynomialDecay(0.4, 10, 0.1), (0.1, 0.4)),
        (keras.optimizers.schedules.PiecewiseConstantDecay([5], [0.2, 0.1]), (0.1, 0.2)),
        (keras.optimizers.schedules.ExponentialDecay(0.4, 10, 0.5), (0.0, 0.4)),
    ],
)
def test_the_range_of_the_learning_rate(schedule: Any, expected: tuple[float, float]) -> None:
    assert sam.learning_rate_range(keras.optimizers.SGD(schedule)) == pytest.approx(expected)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(schedule))
    assert sam.learning_rate_range(scaled) == pytest.approx(expected)


def test_gsams_rho_follows_a_rate_that_a_callback_lowers() -> None:
    rho = sam.scheduled_rho(0.1, 0.5, 0.25, 0.0, 1.0)
    assert float(rho) == pytest.approx(0.2)
    assert float(sam.scheduled_rho(0.1, 0.5, 2.0, 0.0, 1.0)) == pytest.approx(0.5)
    assert float(sam.scheduled_rho(0.1, 0.5, 0.0, 0.0, 0.0)) == pytest.approx(0.1)


def test_perturbation_follows_the_papers() -> None:
    kernel, bias = RANDOM.normal(size=(4, 3)), RANDOM.normal(size=3)
    variables = [keras.Variable(value.astype(np.float32)) for value in (kernel, bias)]
    gradients = [RANDOM.normal(size=value.shape).astype(np.float32) for value in (kernel, bias)]
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    for found, gradient in zip(sam.perturbation(gradients, variables, 0.1), gradients, strict=True):
        np.testing.assert_allclose(np.array(found), 0.1 * gradient / norm, rtol=1e-5)
    scales = [np.abs(kernel) + 0.2, np.ones(3)]
    norm = np.sqrt(sum(((scale * gradient) ** 2).sum() for scale, gradient in zip(scales, gradients, strict=True)))
    adaptive = sam.perturbation(gradients, variables, 0.1, adaptive=True, eta=0.2)
    for found, gradient, scale in zip(adaptive, gradients, scales, strict=True):
        np.testing.assert_allclose(np.array(found), 0.1 * scale**2 * gradient / norm, rtol=1e-5)


def test_biases_of_two_dimensions_are_no_kernels() -> None:
    layer = keras.layers.LayerNormalization(axis=[1, 2])
    layer.build((None, 2, 3))
    layer.gamma.assign(np.full((2, 3), 5.0))
    gradients = [tf.ones((2, 3)), tf.zeros((2, 3))]
    for adaptive in (False, True):
        shift, _ = sam.perturbation(gradients, [layer.gamma, layer.beta], 1.0, adaptive)
        np.testing.assert_allclose(np.array(shift), np.full((2, 3), 1 / np.sqrt(6)), rtol=1e-5)


def test_the_norm_is_one_over_all_weights_an_unused_one_left_out() -> None:
    variables = [keras.Variable(np.ones(1, np.float32)) for _ in range(3)]
    shifts = sam.perturbation([tf.constant([3.0]), None, tf.constant([4.0])], variables, 1.0)
    np.testing.assert_allclose(np.array(shifts[0]), [0.6], rtol=1e-6)
    assert shifts[1] is None
    np.testing.assert_allclose(np.array(shifts[2]), [0.8], rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"adaptive": True}, {"method": "gsam"}, {"method": "looksam", "every": 2}])
def test_a_zero_gradient_is_no_nan(settings: dict[str, Any]) -> None:
    model = regression()
    before = values(model.variables)
    wrapped = SharpnessAwareMinimization(model, **settings)
    wrapped.compile(keras.optimizers.SGD(0.5), lambda _, outputs: 0.0 * outputs)
    for _ in range(3):
        wrapped.train_on_batch(INPUTS, LABELS)
    assert_equal(values(model.variables), before)


# Accumulation

COMPOSED = [*OF_A_METHOD[:2], {"every": 2}, *OF_A_METHOD[5:7], *OF_A_METHOD[9:16:2]]


@pytest.mark.parametrize("settings", COMPOSED, ids=str)
def test_accumulating_is_one_step_on_the_larger_batch_in_parts(settings: dict[str, Any]) -> None:
    settings = {key: value for key, value in settings.items() if key != "num_batch_splits"}
    small = [(INPUTS[start : start + 6], LABELS[start : start + 6]) for start in range(0, 36, 6)]
    large = [tuple(np.concatenate(each) for each in zip(*small[i : i + 3], strict=True)) for i in (0, 3)]
    waited = train_regression(0.5, accumulate=3, batches=small, **settings)
    assert_equal(waited, train_regression(0.5, num_batch_splits=3, batches=large, **settings), atol=1e-5)


def test_accumulating_at_rho_zero_is_the_plain_large_batch_and_batches_weigh_by_size() -> None:
    small = [(INPUTS[start:end], LABELS[start:end]) for start, end in ((0, 5), (5, 6), (6, 13))]
    waited = train_regression(0.5, rho=0.0, accumulate=3, batches=small)
    assert_equal(waited, train_regression(0.5, rho=0.0, batches=[(INPUTS[:13], LABELS[:13])]), atol=1e-6)


def test_nothing_moves_before_the_last_batch_of_a_step() -> None:
    before = values(regression().variables)
    assert_equal(train_regression(0.5, accumulate=3, batches=BATCHES[:2]), before)


# The first door


def test_the_first_four_arguments_are_tf_keras() -> None:
    wrapped = SharpnessAwareMinimization(network(), 0.2, 3, "sharp")
    assert (wrapped.settings.rho, wrapped.settings.num_batch_splits, wrapped.name) == (0.2, 3, "sharp")


class Subclassed(keras.Model):
    """Not built before it sees data; its `call` has no `training`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = keras.layers.Dense(8, "tanh")
        self.drop = keras.layers.Dropout(0.5, seed=1)
        self.last = keras.layers.Dense(3)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.last(self.drop(self.first(inputs)))


@pytest.mark.parametrize("kind", ["functional", "sequential", "unbuilt", "subclassed"])
def test_every_kind_of_model_learns(kind: str) -> None:
    inputs = keras.Input((6,))
    model = {
        "functional": lambda: keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dense(8, "tanh")(inputs))),
        "sequential": network,
        "unbuilt": lambda: keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)]),
        "subclassed": Subclassed,
    }[kind]()
    wrapped = SharpnessAwareMinimization(model)
    history = fit(wrapped, keras.optimizers.Adam(0.05), epochs=20, validation_data=(INPUTS, LABELS))
    assert history["loss"][-1] < history["loss"][0]
    scores = wrapped.evaluate(INPUTS, LABELS, verbose=0, return_dict=True)
    assert scores["accuracy"] == pytest.approx(history["val_accuracy"][-1])
    np.testing.assert_allclose(wrapped.predict(INPUTS, verbose=0), model.predict(INPUTS, verbose=0), atol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 1e-12])
def test_a_model_whose_call_has_no_training_is_trained_as_keras_does(rho: float) -> None:
    # Keras leaves dropout off then.
    results = []
    for wrap in (sharp(rho=rho), lambda model: model):
        keras.utils.set_random_seed(2)
        model = Subclassed()
        fit(wrap(model), keras.optimizers.SGD(0.5), epochs=2)
        results.append(values(model.trainable_variables))
    assert_equal(results[0], results[1], atol=0.0 if rho == 0 else 1e-6)


def test_losses_and_metrics_by_the_names_of_outputs() -> None:
    inputs = keras.Input((6,))
    histories = []
    for wrap in (sharp(rho=1e-12), lambda model: model):
        keras.utils.set_random_seed(2)
        outputs = [keras.layers.Dense(1, name=name)(inputs) for name in ("one", "two")]
        model = wrap(keras.Model(inputs, outputs))
        model.compile("sgd", {"one": "mse", "two": "mae"}, {"one": 1.0, "two": 0.5}, {"one": ["mae"]})
        labels = {"one": LABELS, "two": LABELS}
        histories.append(model.fit(INPUTS, labels, epochs=2, shuffle=False, verbose=0).history)
    assert histories[0].keys() == histories[1].keys()
    for key in histories[0]:
        assert histories[0][key] == pytest.approx(histories[1][key], rel=1e-5)


def test_inputs_reach_the_model_as_they_come() -> None:
    # In float16 100,000 would be infinite.
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Rescaling(1e-5, dtype="float32")])
    assert SharpnessAwareMinimization(model).predict(np.full((1, 1), 1e5), verbose=0)[0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("method", [{}, {"method": "looksam", "every": 2}], ids=str)
@pytest.mark.parametrize("waits", [{}, {"num_batch_splits": 2}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize(("policy", "atol"), [("float64", 1e-5), ("bfloat16", 0.1)])
def test_other_precisions_are_float32_roughly(policy: str, atol: float, waits: dict[str, Any], method: Any) -> None:
    results = []
    for dtype in (policy, "float32"):
        model = regression(dtype)
        fit(SharpnessAwareMinimization(model, **waits, **method), keras.optimizers.SGD(0.1), epochs=2)
        results.append([value.astype(np.float32) for value in values(model.variables)])
    assert_equal(results[0], results[1], atol)


class Unseen(keras.layers.Layer):
    """Reads its weight where no one sees: by closure over the variable's tensor."""

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight(shape=(input_shape[-1], 3), name="kernel")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.recompute_grad(lambda tensor: tensor @ self.kernel)(inputs)


def test_a_weight_that_the_perturbed_pass_does_not_see_is_an_error() -> None:
    wrapped = SharpnessAwareMinimization(keras.Sequential([keras.Input((6,)), Unseen()]))
    with pytest.raises(ValueError, match=r"kernel has a gradient where the weights are but none at the perturbed"):
        fit(wrapped, keras.optimizers.SGD(0.1))


def test_masked_outputs_in_parts_are_refused() -> None:
    layers = [keras.Input((None,)), keras.layers.Embedding(5, 4, mask_zero=True)]
    wrapped = SharpnessAwareMinimization(keras.Sequential(layers), num_batch_splits=2)
    wrapped.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"`num_batch_splits`.*masked outputs"):
        wrapped.fit(np.ones((4, 3), np.int32), np.zeros((4, 3, 4)), verbose=0)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_a_model_without_trained_weights_is_kerass_affair() -> None:
    model = network()
    model.trainable = False
    before = values(model.trainable_variables)
    fit(SharpnessAwareMinimization(model, num_batch_splits=2, method="gsam"), keras.optimizers.SGD(0.1))
    assert_equal(values(model.trainable_variables), before)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_weights_saved_before_training_load_after_it(tmp_path: Path) -> None:
    model = regression()
    wrapped = SharpnessAwareMinimization(model, method="friendly")
    wrapped.compile(keras.optimizers.Adam(), CROSS_ENTROPY)
    wrapped.save_weights(tmp_path / "start.weights.h5")
    start = values(model.variables)
    fit(wrapped, keras.optimizers.Adam(), epochs=1)
    wrapped.load_weights(tmp_path / "start.weights.h5")
    assert_equal(values(model.variables), start)
    assert all((np.array(variable) == 0).all() for variable in wrapped._step.variables)


def test_gsam_needs_to_know_where_the_learning_rate_goes() -> None:
    class Rising(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            return 0.01 * tf.cast(step, tf.float32)

        def get_config(self) -> dict[str, Any]:
            return {}

    wrapped = SharpnessAwareMinimization(regression(), method="gsam", rho_min=0.01)
    with pytest.raises(ValueError, match="learning rate's range is not known"):
        fit(wrapped, keras.optimizers.SGD(Rising()))


def test_saving_saves_no_wrapper(tmp_path: Path) -> None:
    model = network()
    wrapped = SharpnessAwareMinimization(model)
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "checkpoint.keras")
    fit(wrapped, keras.optimizers.Adam(0.01), epochs=1, callbacks=[checkpoint])
    wrapped.model.save(tmp_path / "inner.keras")
    for name in ("checkpoint.keras", "inner.keras"):
        loaded = keras.models.load_model(tmp_path / name)
        assert type(loaded) is keras.Sequential
        assert_equal(values(loaded.weights), values(model.weights))


@pytest.mark.parametrize("settings", [{"method": "friendly"}, {"method": "looksam", "every": 2}, {"accumulate": 2}])
def test_a_training_backed_up_goes_on_as_if_nothing_had_happened(tmp_path: Path, settings: dict[str, Any]) -> None:
    # Without dropout, whose state Keras does not back up for any model.
    class Killed(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    def train(*callbacks: keras.callbacks.Callback) -> list[np.ndarray]:
        model = regression()
        wrapped = SharpnessAwareMinimization(model, 0.5, **settings)
        fit(wrapped, keras.optimizers.Adam(0.05), epochs=4, callbacks=list(callbacks))
        return values(model.variables)

    with pytest.raises(KeyboardInterrupt):
        train(keras.callbacks.BackupAndRestore(tmp_path / "backup"), Killed())
    assert_equal(train(keras.callbacks.BackupAndRestore(tmp_path / "backup")), train(), atol=1e-6)


def test_learning_rate_callbacks_and_early_stopping_work() -> None:
    wrapped = SharpnessAwareMinimization(network())
    callbacks = [
        keras.callbacks.ReduceLROnPlateau(monitor="loss", min_delta=100.0, patience=1, factor=0.5),
        keras.callbacks.EarlyStopping(monitor="loss", min_delta=100.0, patience=3),
    ]
    history = fit(wrapped, keras.optimizers.SGD(0.1), epochs=10, callbacks=callbacks)
    assert len(history["loss"]) == 4
    assert float(wrapped.optimizer.learning_rate) < 0.1


def test_compiled_again_it_begins_anew() -> None:
    model = network()
    wrapped = SharpnessAwareMinimization(model, method="friendly")
    fit(wrapped, keras.optimizers.Adam(0.01), epochs=1)
    first = wrapped._step
    fit(wrapped, keras.optimizers.SGD(0.01), epochs=1)
    assert wrapped._step is not first


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"rho": -0.1}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"rho": float("inf")}, "rho"),
        ({"rho": "0.1"}, "rho"),
        ({"rho": True}, "rho"),
        ({"adaptive": "false"}, "adaptive"),
        ({"method": "esam"}, "method"),
        ({"every": 0}, "every"),
        ({"every": 1.5}, "every"),
        ({"num_batch_splits": 0}, "num_batch_splits"),
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": True}, "accumulate"),
        ({"eta": -1.0}, "eta"),
        ({"alpha": 0.1}, "alpha"),
        ({"method": "wsam", "alpha": 0.1}, "alpha"),
        ({"gamma": 0.5}, "gamma"),
        ({"method": "wsam", "gamma": 1.0}, "gamma"),
        ({"rho_min": 0.1}, "rho_min"),
        ({"rho_max": 0.1}, "rho_max"),
        ({"method": "gsam", "rho_min": 0.2, "rho_max": 0.1}, "rho_min"),
        ({"method": "gsam", "rho_min": 0.2}, "rho_min"),
        ({"method": "gsam", "alpha": float("nan")}, "alpha"),
        ({"sigma": 1.0}, "sigma"),
        ({"method": "friendly", "sigma": -1.0}, "sigma"),
        ({"friendly_lambda": 0.5}, "friendly_lambda"),
        ({"method": "friendly", "friendly_lambda": 1.0}, "friendly_lambda"),
        ({"sync_perturbation": True, "num_batch_splits": 2}, "sync_perturbation"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(
        ValueError, match=f"Invalid value received for argument `{name}`. Expected .* Received: {name}="
    ):
        SharpnessAwareMinimization(network(), **settings)


@pytest.mark.parametrize("method", sam.METHODS)
def test_the_params_of_the_pipeline_are_these_settings(method: str) -> None:
    own = {"alpha": 0.5, "gamma": 0.5, "rho_min": 0.04, "rho_max": 0.06, "sigma": 0.5, "friendly_lambda": 0.5}
    for name, value in own.items():
        try:
            Settings(method=method, **{name: value})  # type: ignore[arg-type]
        except ValueError:
            with pytest.raises(pydantic.ValidationError, match=f"no value with method {method}"):
                params.Sam.model_validate({"method": method, name: value})
        else:
            assert params.Sam.model_validate({"method": method, name: value})
    assert Settings(**params.Sam.model_validate({"method": method}).settings()) == Settings(method=method)


def test_numpys_numbers_are_numbers() -> None:
    numbers: dict[str, Any] = {"rho": np.float32(0.5), "every": np.int64(2), "gamma": np.float16(0.5)}
    settings = Settings(method="wsam", **numbers)
    assert (settings.rho, settings.every, settings.gamma) == (0.5, 2, 0.5)


def test_it_stands_alone() -> None:
    imported = set(re.findall(r"^(?:from|import) ([\w.]+)", (ROOT / "src/flatmin/sam.py").read_text(), re.MULTILINE))
    assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {"keras", "tensorflow"}


# Several replicas


Case = tuple[str, dict[str, Any], dict[str, Any]]  # its kind, its settings, and the reference's
ON_DEVICES: list[Case] = [
    ("loop", {}, {}),
    ("loop", {"sync_perturbation": True}, {"synchronised": True}),
    ("loop", {"num_batch_splits": 2, "adaptive": True}, {"splits": 2, "adaptive": True}),
    ("loop", {"method": "friendly"}, {"sigma": 1.0, "decay": 0.9}),
    ("loop", {"method": "friendly", "sync_perturbation": True}, {"sigma": 1.0, "decay": 0.9, "synchronised": True}),
    ("loop", {"method": "looksam", "every": 2}, {"alpha": 0.7, "every": 2}),
    ("loop", {"method": "gsam"}, {"alpha": 0.4}),
    ("loop", {"accumulate": 3}, {"splits": 3}),
    ("loop", {"optimizer": {"global_clipnorm": 0.05}}, {"clip": 0.05}),
    ("loop", {"broken": 2}, {}),
    ("loop", {"broken": 2, "optimizer": {"initial_scale": 8.0}}, {}),
    ("counted", {"first": [6], "method": "friendly"}, {"sigma": 1.0, "decay": 0.9, "replicas": [6]}),
    ("counted", {"first": [8, 6], "accumulate": 3, "rho": 0.0}, {"rho": 0.0, "replicas": 1}),
    ("fit", {}, {}),
    ("fit", {"method": "wsam", "sync_perturbation": True}, {"gamma": 0.9, "synchronised": True}),
]
ON_WORKERS: list[Case] = [("loop", {}, {}), ("loop", {"sync_perturbation": True}, {"synchronised": True})]


# 41 images in batches of eight: the second device has none of the last one.
EMPTY: Case = ("fit", {"images": 41, "num_batch_splits": 2}, {})


def start_replicas(folder: Path, cases: list[Case], **environment: str) -> subprocess.Popen[str]:
    folder.mkdir()
    listed = json.dumps([(kind, {"rho": 0.5, **settings}) for kind, settings, _ in cases])
    return subprocess.Popen(
        [sys.executable, f"{ROOT}/tests/sam_replicas.py", str(folder), listed],
        env=os.environ | {"PYTHONPATH": f"{ROOT}/src"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas") / "devices"
    finish(start_replicas(folder, [*ON_DEVICES, EMPTY]))
    return folder


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("replicas") / str(index) for index in range(2)]
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(len(folders))]}
    processes = []
    for index, folder in enumerate(folders):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        processes.append(start_replicas(folder, ON_WORKERS, TF_CONFIG=json.dumps(config)))
    for process in processes:
        finish(process)
    return folders


def assert_reference(file: Path, case: Case) -> None:
    kind, settings, of_reference = case
    found = np.load(file)
    assert found["same"]  # on both replicas, bit for bit
    inputs, labels = sam_replicas.data()
    batches = [
        (x, y) for index, (x, y) in enumerate(zip(inputs, labels, strict=True)) if index != settings.get("broken")
    ]
    if waits := settings.get("accumulate"):
        batches = [(np.concatenate(inputs[i : i + waits]), np.concatenate(labels[i : i + waits])) for i in (0, 3)]
    start = [value.astype(np.float64) for value in values(sam_replicas.network().variables)]
    losses = []
    weights = start
    for number, batch in enumerate(batches):
        losses.append(reference.loss(weights, batch))
        settings_of_reference = {"method": settings.get("method", "sam"), "replicas": 2} | of_reference
        weights = reference.train(start, batches[: number + 1], [0.5] * (number + 1), **settings_of_reference)
    assert_equal([found["kernel"], found["bias"]], weights, atol=1e-4)
    if not waits:
        reported = found["losses"][np.isfinite(found["losses"])]
        np.testing.assert_allclose(reported, [np.mean(losses)] if kind == "fit" else losses, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ON_DEVICES)), ids=[str(case[:2]) for case in ON_DEVICES])
def test_two_devices_are_the_reference(devices: Path, number: int) -> None:
    assert_reference(devices / f"{number}.npz", ON_DEVICES[number])


@pytest.mark.slow
def test_a_device_without_images_costs_no_step(devices: Path) -> None:
    found = np.load(devices / f"{len(ON_DEVICES)}.npz")
    assert found["steps"] == 6
    assert np.isfinite(found["losses"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ON_WORKERS)), ids=[str(case[:2]) for case in ON_WORKERS])
def test_two_workers_are_the_reference(workers: list[Path], number: int) -> None:
    for folder in workers:
        assert_reference(folder / f"{number}.npz", ON_WORKERS[number])
    one, other = (np.load(folder / f"{number}.npz") for folder in workers)
    assert all(np.array_equal(one[key], other[key]) for key in one.files)


def test_fit_on_several_workers_is_refused() -> None:
    wrapped = SharpnessAwareMinimization(network())
    wrapped._distribute_strategy = tf.distribute.MultiWorkerMirroredStrategy.__new__(
        tf.distribute.MultiWorkerMirroredStrategy
    )
    with pytest.raises(ValueError, match=r"several workers.*flatmin\.sam\.Step"):
        wrapped.fit(INPUTS, LABELS)
