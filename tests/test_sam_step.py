"""The promises of a step, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from sam_networks import (
    BATCHES,
    INPUTS,
    LABELS,
    assert_equal,
    cross_entropy,
    fit,
    network,
    regression,
    train_by_wrapper,
    trained,
    values,
    wrapping,
)
from sam_networks import float32_policy as float32_policy

from flatmin import sam
from flatmin.sam import Settings, SharpnessAwareMinimization, Step

pytestmark = pytest.mark.usefixtures("float32_policy")

EAGERLY = {"run_eagerly": True}  # a step or two take less time than to trace them


def gradients_at(model: keras.Model, shifts: list[Any]) -> list[tf.Tensor]:
    """The plain gradient with every weight moved by hand. All variables are restored, also the dropout's state."""
    before = values(model.variables)
    for variable, shift in zip(model.trainable_variables, shifts, strict=True):
        variable.assign_add(shift)
    with tf.GradientTape() as tape:
        loss = cross_entropy()(LABELS, model(INPUTS, training=True)) + sum(model.losses)
    gradients = tape.gradient(loss, model.trainable_variables)
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    return gradients


def sam_gradient(model: keras.Model, rho: float) -> list[tf.Tensor]:
    """SAM's gradient by its definition: the plain one, the perturbation, the plain one there."""
    first = gradients_at(model, [tf.zeros(variable.shape) for variable in model.trainable_variables])
    norm = np.sqrt(sum(float(tf.reduce_sum(gradient**2)) for gradient in first))
    return gradients_at(model, [rho * gradient / norm for gradient in first])


def train_eagerly(batches: Any, rho: float = 0.5, **settings: Any) -> list[np.ndarray]:
    return train_by_wrapper(0.5, batches, rho=rho, eagerly=True, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_step_with_rho_zero_equals_base_optimizer_bit_for_bit_in_mixed_precision(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    assert_equal(trained(wrapping(rho=0.0), network()), trained(lambda model: model, network()))


@pytest.mark.parametrize("method", sam.METHODS)
def test_methods_with_rho_zero_are_the_base_optimizers_step(method: str) -> None:
    assert Settings(rho=0.0, method=method).is_base_step
    assert not Settings(rho=1e-12, method=method).is_base_step


def test_step_leaves_frozen_batch_normalisation_unchanged() -> None:
    model = network()
    model.layers[1].trainable = False
    before = values(model.layers[1].variables)
    fit(SharpnessAwareMinimization(model), keras.optimizers.Adam(0.01), epochs=1, compile=EAGERLY)
    assert_equal(values(model.layers[1].variables), before)


def test_step_has_weight_regularisation_in_both_gradients() -> None:
    # 0.1 w^2 alone: its gradient is 0.2 w, and at the perturbed weights 0.2 (w + rho w / ||w||).
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


def test_step_has_activity_regularisation_in_both_gradients() -> None:
    # The mean of w^2 over activations x w, x = 1: as above, by `add_loss` in place of a weight's regularizer.
    layer = keras.layers.Dense(1, use_bias=False, activity_regularizer=keras.regularizers.L2(1.0))
    model = keras.Sequential([keras.Input((1,)), layer])
    layer.kernel.assign([[3.0]])
    wrapped = SharpnessAwareMinimization(model, 0.5)
    wrapped.compile(keras.optimizers.SGD(0.1), lambda _, outputs: 0.0 * outputs)
    wrapped.train_on_batch(np.ones((4, 1)), np.ones((4, 1)))
    assert float(layer.kernel[0, 0]) == pytest.approx(3.0 - 0.1 * 2 * 3.5)


def test_step_equals_gradient_at_weights_moved_by_hand() -> None:
    model = network()
    start, expected = values(model.trainable_variables), sam_gradient(model, 0.5)
    wrapped = SharpnessAwareMinimization(model, 0.5)
    fit(wrapped, keras.optimizers.SGD(1.0), batch_size=36, epochs=1)
    moved = [before - after for before, after in zip(start, values(model.trainable_variables), strict=True)]
    assert_equal(moved, values(expected), atol=1e-5)


@pytest.mark.slow
def test_step_in_mixed_precision_is_close_to_float32() -> None:
    # Were the scale divided out twice, or not at all, rho would be far too small, or the step nearly plain.
    def step(rho: float, optimizer: keras.optimizers.Optimizer, policy: str) -> np.ndarray:
        model = regression(policy)
        fit(SharpnessAwareMinimization(model, rho), optimizer, batch_size=36, epochs=1, compile=EAGERLY)
        assert all(variable.dtype == "float32" for variable in model.variables)
        return np.concatenate([value.ravel() for value in values(model.trainable_variables)])

    plain, expected = (step(rho, keras.optimizers.SGD(1.0), "float32") for rho in (0.0, 2.0))
    assert np.abs(expected - plain).max() > 0.03
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4096.0)
    for optimizer, policy in ((scaled, "mixed_float16"), (keras.optimizers.SGD(1.0), "mixed_bfloat16")):
        assert np.abs(step(2.0, optimizer, policy) - expected).max() < 0.1 * np.abs(expected - plain).max(), policy


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}], ids=str)
def test_step_with_non_finite_gradient_and_no_loss_scale_changes_no_variable(settings: dict[str, Any]) -> None:
    model, optimizer = network(), keras.optimizers.Adam(0.01, use_ema=True)
    wrapped = SharpnessAwareMinimization(model, **settings)
    fit(wrapped, optimizer)
    memory = wrapped._step.variables[:-2]  # the last ones count skipped steps and gradient evaluations
    before = values([*model.variables, *optimizer.variables, *memory])
    broken = INPUTS.copy()
    broken[3, 2] = np.inf
    wrapped.train_on_batch(broken, LABELS)
    assert_equal(values([*model.variables, *optimizer.variables, *memory]), before)
    for _ in range(2):
        wrapped.train_on_batch(INPUTS, LABELS)
    assert np.abs(np.array(model.trainable_variables[0]) - before[0]).max() > 1e-5


def test_step_with_non_finite_perturbed_gradient_is_skipped() -> None:
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


@pytest.mark.parametrize(
    "options",
    [
        {"clipnorm": 0.05, "weight_decay": 0.1},
        {"global_clipnorm": 0.05, "use_ema": True, "ema_momentum": 0.5},
        {"clipvalue": 0.01},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_optimizer_options_act_once_on_the_final_gradient(options: dict[str, Any]) -> None:
    # What the optimizer makes of SAM's gradient when that is handed to it by hand.
    expected, model = network(), network()
    by_hand, wrapped = (
        keras.optimizers.SGD(0.5, momentum=0.9, **options),
        keras.optimizers.SGD(0.5, momentum=0.9, **options),
    )
    gradient = sam_gradient(expected, 0.5)
    by_hand.build(expected.trainable_variables)
    by_hand.apply(gradient, expected.trainable_variables)
    wrapper = SharpnessAwareMinimization(model, 0.5)
    wrapper.compile(wrapped, cross_entropy(), **EAGERLY)
    wrapper.train_on_batch(INPUTS, LABELS)
    assert_equal(values(model.trainable_variables), values(expected.trainable_variables), atol=1e-5)
    assert_equal(values(wrapped.variables), values(by_hand.variables), atol=1e-5)


def test_optimizer_iterations_advance_once_per_step() -> None:
    wrapped = SharpnessAwareMinimization(network(), num_batch_splits=3)
    fit(wrapped, keras.optimizers.Adam(), epochs=1, compile=EAGERLY)
    assert int(wrapped.optimizer.iterations) == 3


@pytest.mark.parametrize("size", [7, 2, 1])
def test_parts_of_unequal_size_are_weighted_by_size(size: int) -> None:
    # 7 in 3 are 3, 2 and 2; 2 in 3 are 1 and 1.
    results = []
    for splits in (None, 3):
        model = regression()
        wrapped = SharpnessAwareMinimization(model, 0.0, splits)
        wrapped.compile(keras.optimizers.SGD(1.0), cross_entropy(), **EAGERLY)
        loss = wrapped.train_on_batch(INPUTS[:size], LABELS[:size])
        results.append([*values(model.variables), np.array(loss)])
    assert_equal(results[1], results[0], atol=1e-6)


def test_step_with_parts_returns_nested_outputs_in_order() -> None:
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
    [{"num_batch_splits": 2}, {"accumulate": 2, "method": "friendly"}, {"method": "looksam", "every": 2}],
)
def test_step_leaves_unused_weight_unchanged(settings: dict[str, Any]) -> None:
    model = Unused()
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    fit(SharpnessAwareMinimization(model, **settings), optimizer, epochs=1, compile=EAGERLY)
    assert_equal([np.array(model.unused)], [np.ones((2, 2), np.float32)])


def test_step_interrupted_in_perturbed_pass_leaves_weights_unchanged() -> None:
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


@pytest.mark.parametrize("settings", [{"num_batch_splits": 2}, {"adaptive": True, "accumulate": 2}])
def test_step_with_embedding_equals_matrix_product(settings: dict[str, Any]) -> None:
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
        wrapped.compile(keras.optimizers.SGD(0.5), cross_entropy(), **EAGERLY)
        for _ in range(4):
            wrapped.train_on_batch(inputs, np.array([0, 1, 2, 0]))
        results.append(values(model.variables))
    assert_equal(results[0], results[1], atol=1e-5)


def test_parts_of_one_example_are_perturbed_separately() -> None:
    received = train_eagerly(BATCHES[:1], num_batch_splits=9)
    singles = [train_eagerly([(x[None], y[None])]) for x, y in zip(*BATCHES[0], strict=True)]
    assert_equal(received, [np.mean(each, axis=0) for each in zip(*singles, strict=True)], atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"adaptive": True}, {"method": "gsam"}, {"method": "looksam", "every": 2}])
def test_step_with_zero_gradient_changes_nothing(settings: dict[str, Any]) -> None:
    model = regression()
    before = values(model.variables)
    wrapped = SharpnessAwareMinimization(model, **settings)
    wrapped.compile(keras.optimizers.SGD(0.5), lambda _, outputs: 0.0 * outputs, **EAGERLY)
    for _ in range(3):
        wrapped.train_on_batch(INPUTS, LABELS)
    assert_equal(values(model.variables), before)


COMPOSED: list[dict[str, Any]] = [
    {"every": 2, "adaptive": True},
    {"method": "gsam", "alpha": 0.7},
    {"method": "wsam", "gamma": 0.3},
    {"method": "looksam", "every": 2},
    {"method": "friendly", "sigma": 0.5},
]


@pytest.mark.parametrize("settings", COMPOSED, ids=str)
def test_accumulate_equals_parts_of_larger_batch(settings: dict[str, Any]) -> None:
    small = [(INPUTS[start : start + 6], LABELS[start : start + 6]) for start in range(0, 36, 6)]
    large = [tuple(np.concatenate(each) for each in zip(*small[i : i + 3], strict=True)) for i in (0, 3)]
    waited = train_eagerly(small, accumulate=3, **settings)
    assert_equal(waited, train_eagerly(large, num_batch_splits=3, **settings), atol=1e-5)


def test_accumulate_at_rho_zero_equals_base_step_on_larger_batch() -> None:
    small = [(INPUTS[start:end], LABELS[start:end]) for start, end in ((0, 5), (5, 6), (6, 13))]
    waited = train_eagerly(small, 0.0, accumulate=3)
    assert_equal(waited, train_eagerly([(INPUTS[:13], LABELS[:13])], 0.0), atol=1e-6)


def test_accumulate_before_last_batch_moves_no_weight() -> None:
    before = values(regression().variables)
    assert_equal(train_eagerly(BATCHES[:2], accumulate=3), before)


@pytest.mark.parametrize(
    "settings", [{"num_batch_splits": 2}, {"accumulate": 2, "method": "looksam", "every": 2}], ids=str
)
@pytest.mark.parametrize(("policy", "atol"), [("float64", 1e-5), ("bfloat16", 0.1)])
def test_step_in_other_precision_is_close_to_float32(policy: str, atol: float, settings: dict[str, Any]) -> None:
    results = []
    for dtype in (policy, "float32"):
        model = regression(dtype)
        fit(SharpnessAwareMinimization(model, **settings), keras.optimizers.SGD(0.1), compile=EAGERLY)
        results.append([value.astype(np.float32) for value in values(model.variables)])
    assert_equal(results[0], results[1], atol)


class HiddenWeight(keras.layers.Layer):
    """Reads its weight where no one sees: by closure over the variable's tensor."""

    def build(self, input_shape: Any) -> None:
        self.kernel = self.add_weight(shape=(input_shape[-1], 3), name="kernel")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.recompute_grad(lambda tensor: tensor @ self.kernel)(inputs)


def test_step_with_weight_hidden_from_perturbed_pass_is_an_error() -> None:
    wrapped = SharpnessAwareMinimization(keras.Sequential([keras.Input((6,)), HiddenWeight()]))
    with pytest.raises(ValueError, match=r"kernel has a gradient at the weights but none at the perturbed weights"):
        fit(wrapped, keras.optimizers.SGD(0.1), compile=EAGERLY)


def test_gsam_with_unknown_learning_rate_range_is_an_error() -> None:
    class Rising(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            return 0.01 * tf.cast(step, tf.float32)

        def get_config(self) -> dict[str, Any]:
            return {}

    wrapped = SharpnessAwareMinimization(regression(), method="gsam", rho_min=0.01)
    with pytest.raises(ValueError, match=r"`rate_max`.*the highest learning rate of Rising"):
        fit(wrapped, keras.optimizers.SGD(Rising()))


PASSES: list[tuple[dict[str, Any], int]] = [
    ({"rho": 0.0}, 20),
    ({"num_batch_splits": 3}, 40),
    ({"accumulate": 2, "every": 2}, 20 + 4 + 4 + 4 + 2),  # batches of 4, 4, 2, 4, 4 and 2
    ({"method": "gsam", "rho_min": 0.0, "rho_max": 0.0}, 20),
    ({"method": "looksam", "every": 3}, 20 + 4 + 4),
]


def counting_step(**settings: Any) -> tuple[Step, Callable[..., Any]]:
    """A step, and a function that trains with it."""
    model, optimizer = regression(), keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    step = Step(Settings(**settings), model, optimizer)

    def forward(part: Any) -> tuple[tf.Tensor, Any]:
        outputs = model(part[0], training=True)
        return cross_entropy()(part[1], outputs), outputs

    return step, lambda *arguments: step(forward, *arguments)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(("settings", "expected"), PASSES, ids=str)
def test_gradient_evaluations_are_examples_times_passes(settings: dict[str, Any], expected: int, counted: bool) -> None:
    step, train = counting_step(**settings)
    assert step.gradient_evaluations == 0
    train = tf.function(train, reduce_retracing=True) if "accumulate" in settings else train
    for _ in range(2):
        for start, end in ((0, 4), (4, 8), (8, 10)):
            batch = tf.constant(INPUTS[start:end]), tf.constant(LABELS[start:end])
            train(batch, tf.constant(float(end - start))) if counted else train(batch)
    assert step.gradient_evaluations == expected


@pytest.mark.parametrize("settings", [{"rho": 0.0}, {}, {"accumulate": 2}], ids=str)
def test_gradient_evaluations_count_real_examples_only(settings: dict[str, Any]) -> None:
    step, train = counting_step(**settings)
    train((tf.constant(INPUTS[:4]), tf.constant(LABELS[:4])), tf.constant(3.0))
    assert step.gradient_evaluations == 3 * (1 if settings == {"rho": 0.0} else 2)


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"num_batch_splits": 2}], ids=str)
def test_gradient_evaluations_count_skipped_steps(settings: dict[str, Any]) -> None:
    step, train = counting_step(**settings)
    before = values(step.model.variables)
    train((tf.constant(np.full((4, 6), np.inf, np.float32)), tf.constant(LABELS[:4])))
    assert_equal(values(step.model.variables), before)
    assert step.gradient_evaluations == 8


def test_gradient_evaluations_survive_a_resume_by_variables() -> None:
    batch = tf.constant(INPUTS[:4]), tf.constant(LABELS[:4])
    step, train = counting_step(method="friendly")
    train(batch)
    resumed, train = counting_step(method="friendly")
    for variable, value in zip(resumed.variables, values(step.variables), strict=True):
        variable.assign(value)
    train(batch)
    assert resumed.gradient_evaluations == 2 * step.gradient_evaluations > 0
