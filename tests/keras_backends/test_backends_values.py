"""Values of sharpness-aware steps on the backend that runs: against NumPy, and against Keras' own `fit`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import sam_reference as reference
from keras import ops
from sam_networks import (
    BATCHES,
    INPUTS,
    LABELS,
    cross_entropy,
    distance,
    fit,
    network,
    regression,
    train_by_step,
    train_by_wrapper,
    trained,
    values,
    wrapping,
)

from flatmin.sam import METHODS, Settings, SharpnessAwareMinimization, Step

pytestmark = pytest.mark.slow  # all together

# Settings, and what the reference calls them.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"adaptive": True, "eta": 0.1}, {"adaptive": True, "eta": 0.1}),
    ({"num_batch_splits": 4}, {"splits": 4}),
    ({"every": 3}, {"every": 3}),
    ({"method": "gsam"}, {"method": "gsam", "alpha": 0.4}),
    ({"method": "wsam"}, {"method": "wsam", "gamma": 0.9}),
    ({"method": "wsam-decoupled"}, {"method": "wsam", "gamma": 0.9}),  # without momentum it is the same
    ({"method": "looksam", "every": 3}, {"method": "looksam", "every": 3, "alpha": 0.7}),
    ({"method": "friendly", "num_batch_splits": 2}, {"method": "friendly", "sigma": 1.0, "decay": 0.9, "splits": 2}),
    ({"method": "lesam", "sigma": 0.3, "rho": 0.7}, {"method": "lesam", "sigma": 0.3, "rho": 0.7}),
    ({"perturb": lambda v: v.name == "kernel"}, {"scale": [1.0, 0.0]}),
    ({"perturb": lambda v: v.name == "kernel" or 0.1}, {"radii": [0.5, 0.1]}),
    ({"rho": lambda step: 0.1 * keras.ops.cast(step, "float32")}, {"rho": lambda step: 0.1 * step}),
    ({"rho": keras.optimizers.schedules.PolynomialDecay(0.8, 8, 0.2)}, {"rho": lambda s: max(0.2, 0.8 - 0.6 * s / 8)}),
]


def expected(settings: dict[str, Any], rates: list[float]) -> list[np.ndarray]:
    start = [value.astype(np.float64) for value in values(regression().variables)]
    return reference.train(start, BATCHES, rates, **settings)


@pytest.mark.parametrize("train", [train_by_wrapper, train_by_step])
@pytest.mark.parametrize(
    ("settings", "of_reference"), CASES, ids=[f"{number}-{'-'.join(case[1])}" for number, case in enumerate(CASES)]
)
def test_ten_steps_equal_numpy_reference(train: Any, settings: dict[str, Any], of_reference: dict[str, Any]) -> None:
    received = train(0.5, **({"rho": 0.5} | settings))
    assert distance(received, expected(of_reference, [0.5] * 10)) < 5e-6


@pytest.mark.parametrize(
    "settings", [{"method": "looksam"}, {"accumulate": 2}, {"optimizer": {"gradient_accumulation_steps": 2}}], ids=str
)
def test_every_counts_updates_in_fit_as_in_a_loop(settings: dict[str, Any]) -> None:
    settings = dict(settings)
    # A step that is skipped is no update, so the next one is perturbed in its place.
    options = settings.pop("optimizer", {})
    broken = [(np.where(i == 3, np.inf, x).astype(np.float32), y) for i, (x, y) in enumerate(BATCHES)]
    results = []
    for train in (train_by_wrapper, train_by_step):
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5, **options), initial_scale=8.0)
        results.append(train(None, broken, scaled, rho=0.5, every=3, **settings))
    assert distance(*results) < 1e-6
    assert distance(results[0], train_by_wrapper(0.5, [*BATCHES[:3], *BATCHES[4:]], rho=0.5, **settings)) > 1e-3


def test_step_that_is_told_whether_it_is_perturbed_equals_one_that_finds_out() -> None:
    results = []
    for told in (False, True):
        model, optimizer = regression(), keras.optimizers.SGD(0.5)
        optimizer.build(model.trainable_variables)
        step = Step(Settings(rho=0.5, method="looksam", every=2), model, optimizer)

        def forward(batch: Any, model: Any = model) -> tuple[Any, Any]:
            outputs = model(batch[0], training=True)
            return cross_entropy()(batch[1], outputs), outputs

        for number, batch in enumerate(BATCHES[:5]):
            step.run(forward, tuple(map(ops.convert_to_tensor, batch)), perturbed=number % 2 == 0 if told else None)
        results.append([*values(model.variables), np.array(step.gradient_evaluations)])
    assert distance(*results) < 1e-6


@pytest.mark.skipif(keras.config.backend() != "jax", reason="only XLA's branches are slow")
def test_fit_on_jax_compiles_a_program_without_and_one_with_the_perturbed_pass() -> None:
    traced = []

    class Traced(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            traced.append(1)
            return inputs

    model = SharpnessAwareMinimization(keras.Sequential([keras.Input((6,)), Traced(), keras.layers.Dense(3)]), every=2)
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    model.evaluate(INPUTS, LABELS, verbose=0)  # builds it
    counts = []
    for _ in range(4):
        before = len(traced)
        model.train_on_batch(INPUTS, LABELS)
        counts.append(len(traced) - before)
    assert counts[1:] == [1, 0, 0]  # the step without the perturbed pass goes through the model once


def test_gsam_with_given_rates_equals_reference() -> None:
    rates = [0.1, 0.3, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(list(range(9)), rates)
    settings: dict[str, Any] = {"method": "gsam", "alpha": 0.7, "rho_min": 0.1, "rho_max": 0.9}
    received = train_by_wrapper(schedule, rho=0.5, rate_min=0.0, rate_max=0.5, **settings)
    assert distance(received, expected(settings, rates)) < 5e-6


def test_decoupled_wsam_keeps_sharpness_out_of_momentum_and_clipping() -> None:
    optimizer = keras.optimizers.SGD(0.3, momentum=0.9, global_clipnorm=0.1)
    received = train_by_wrapper(None, optimizer=optimizer, rho=0.5, method="wsam-decoupled", gamma=0.6)
    weights = [value.astype(np.float64) for value in values(regression().variables)]
    velocity = [np.zeros_like(value) for value in weights]
    for batch in BATCHES:
        first = reference.gradient(weights, batch)
        norm = np.sqrt(reference.inner(first, first))
        perturbed = reference.gradient(reference.mix((1.0, weights), (0.5 / norm, first)), batch)
        velocity = reference.mix((0.9, velocity), (-0.3 * min(1.0, 0.1 / norm), first))
        weights = reference.mix((1.0, weights), (1.0, velocity), (-0.3 * 1.5, perturbed), (0.3 * 1.5, first))
    assert distance(received, weights) < 5e-6


@pytest.mark.parametrize("jit", [True, False])
def test_fit_with_rho_zero_equals_plain_fit_bit_for_bit(jit: bool) -> None:
    if jit and keras.config.backend() == "torch":
        pytest.skip("torch.compile needs a C++ compiler, and takes minutes")
    options = {"compile": {"jit_compile": jit}}
    plain = trained(lambda model: model, network(), **options)
    for received, value in zip(trained(wrapping(rho=0.0), network(), **options), plain, strict=True):
        np.testing.assert_array_equal(received, value)


@pytest.mark.parametrize("method", METHODS)
def test_fit_compiled_by_xla_equals_eager_fit(method: str) -> None:
    if keras.config.backend() == "torch":
        pytest.skip("no XLA")
    results = []
    for options in ({"jit_compile": True}, {"run_eagerly": True}):
        model = SharpnessAwareMinimization(regression(), 0.5, method=method, every=2)
        model.compile(keras.optimizers.SGD(0.5), cross_entropy(), **options)
        assert model.jit_compile == model.model.jit_compile == ("jit_compile" in options)
        for batch in BATCHES[:3]:
            model.train_on_batch(*batch)
        results.append(values(model.model.variables))
    assert distance(*results) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_fit_with_tiny_rho_equals_plain_fit_up_to_rounding(method: str) -> None:
    # Dropout, BatchNorm and regularisation: other masks, other statistics or a missing penalty would show.
    own = {"gsam": {"alpha": 0.0}, "friendly": {"sigma": 0.0}}.get(method, {})
    received = trained(wrapping(rho=1e-12, method=method, **own), network())
    plain = trained(lambda model: model, network())
    assert max(np.abs(a - b).max() for a, b in zip(received, plain, strict=True)) < 2e-6


def test_fit_with_rho_differs_from_plain_fit() -> None:
    assert distance(trained(wrapping(rho=0.5), network()), trained(lambda model: model, network())) > 1e-3


def test_passes_draw_the_same_dropout_masks() -> None:
    # The loss is linear in the kernel, so its gradient is the same at any distance unless the masks differ.
    def model() -> keras.Model:
        keras.utils.set_random_seed(5)
        return keras.Sequential(
            [keras.Input((6,)), keras.layers.Dropout(0.5, seed=1), keras.layers.Dense(1, use_bias=False)]
        )

    results = []
    for wrap in (wrapping(rho=100.0), lambda model: model):
        each = model()
        wrapped = wrap(each)
        wrapped.compile(keras.optimizers.SGD(0.1), lambda _, outputs: outputs)
        wrapped.fit(INPUTS, LABELS, batch_size=16, shuffle=False, verbose=0)
        results.append(values(each.variables))
    assert distance(*results) < 1e-6


def test_perturbed_pass_leaves_statistics_and_random_states() -> None:
    # With a learning rate of 0 every first pass is the plain one.
    results = []
    for wrap in (wrapping(rho=50.0), lambda model: model):
        model = network()
        fit(wrap(model), keras.optimizers.SGD(0.0))
        results.append(values(model.non_trainable_variables))
    assert distance(*results) < 1e-6


def test_loss_scale_does_not_change_the_perturbation() -> None:
    results = []
    for scale in (None, 4096.0):
        model = regression()
        inner = keras.optimizers.SGD(1.0)
        optimizer = inner if scale is None else keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale)
        fit(SharpnessAwareMinimization(model, 2.0), optimizer)
        results.append(values(model.variables))
    assert distance(*results) < 1e-5


@pytest.mark.parametrize(
    "settings", [{}, {"method": "friendly"}, {"accumulate": 2}, {"num_batch_splits": 2}, {"method": "wsam-decoupled"}]
)
def test_step_with_non_finite_gradient_changes_nothing_and_is_counted(settings: dict[str, Any]) -> None:
    model = network()
    wrapped = SharpnessAwareMinimization(model, **settings)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01), initial_scale=8.0)
    fit(wrapped, scaled, epochs=1)
    memory = wrapped._step.variables[:-2]  # the last ones count skipped steps and gradient evaluations
    before = values([*model.variables, *scaled.inner_optimizer.variables, *memory])
    broken = INPUTS.copy()
    broken[3, 2] = np.inf
    logs = wrapped.train_on_batch(broken, LABELS, return_dict=True)
    for one, other in zip(values([*model.variables, *scaled.inner_optimizer.variables, *memory]), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert float(scaled.dynamic_scale) == 4.0
    assert wrapped._step.skipped_steps == 1
    assert float(logs["sam/skipped"]) == 1


def test_metrics_are_those_of_the_passes() -> None:
    batch = BATCHES[0]
    weights = [value.astype(np.float64) for value in values(regression().variables)]
    gradient = reference.gradient(weights, batch)
    norm = np.sqrt(reference.inner(gradient, gradient))
    losses = [reference.loss(each, batch) for each in (weights, reference.mix((1, weights), (0.5 / norm, gradient)))]
    model = SharpnessAwareMinimization(regression(), 0.5, every=2)
    model.compile(keras.optimizers.SGD(0.0), cross_entropy())
    data = [np.concatenate([each, each]) for each in batch]
    # The second step is not perturbed, and does not count in loss and gap.
    logs = {key: each[0] for key, each in model.fit(*data, batch_size=9, shuffle=False, verbose=0).history.items()}
    assert logs["sam/gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert logs["sam/perturbed_loss"] == pytest.approx(losses[1], rel=1e-5)
    assert logs["sam/gap"] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    assert logs["loss"] == pytest.approx(losses[0], rel=1e-5)
