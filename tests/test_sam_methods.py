"""The table of methods; the methods and the perturbation against the papers' formulas in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import sam_reference as reference
import tensorflow as tf
from sam_networks import BATCHES, RANDOM, assert_equal, cross_entropy, regression, train_by_wrapper, values
from sam_networks import float32_policy as float32_policy

from flatmin import sam

pytestmark = pytest.mark.usefixtures("float32_policy")

SIX = BATCHES[:6]
COSINE = [0.4 * (1 + np.cos(np.pi * step / len(SIX))) for step in range(len(SIX))]
# Those that test_backends_values does not have.
METHOD_SETTINGS: list[dict[str, Any]] = [
    {"adaptive": True, "every": 2},
    {"method": "gsam", "alpha": 0.7, "rho_min": 0.1, "rho_max": 0.9},
    {"method": "gsam", "rho_min": 0.05, "adaptive": True},
    {"method": "wsam", "gamma": 0.3, "num_batch_splits": 2},
    {"method": "looksam", "every": 2, "alpha": 0.3, "adaptive": True},
    {"method": "friendly", "sigma": 0.5, "friendly_lambda": 0.6},
    {"method": "friendly", "num_batch_splits": 2, "adaptive": True},
]
DEFAULTS_OF_PAPERS = {
    "gsam": {"alpha": 0.4},
    "wsam": {"gamma": 0.9},
    "looksam": {"alpha": 0.7},
    "friendly": {"sigma": 1.0, "friendly_lambda": 0.9},
}


def train(rho: float = 0.5, rate: Any = 0.5, **settings: Any) -> list[np.ndarray]:
    return train_by_wrapper(rate, SIX, rho=rho, eagerly=True, **settings)


@pytest.mark.parametrize("settings", METHOD_SETTINGS, ids=str)
def test_methods_equal_numpy_reference(settings: dict[str, Any]) -> None:
    received = train(rate=keras.optimizers.schedules.CosineDecay(0.8, len(SIX)), **settings)
    expected_settings = DEFAULTS_OF_PAPERS.get(settings.get("method", "sam"), {}) | settings
    for name, other in (("num_batch_splits", "splits"), ("friendly_lambda", "decay")):
        if name in expected_settings:
            expected_settings[other] = expected_settings.pop(name)
    start = [value.astype(np.float64) for value in values(regression().variables)]
    expected = reference.train(start, SIX, COSINE, **expected_settings)
    plain = reference.train(start, SIX, COSINE, rho=0.0, eta=1.0)
    assert_equal(received, expected, atol=1e-4)
    assert max(np.abs(one - other).max() for one, other in zip(expected, plain, strict=True)) > 1e-2


def test_gsam_with_zero_alpha_and_constant_rho_equals_sam() -> None:
    assert_equal(train(method="gsam", alpha=0.0), train(), atol=1e-6)


def test_wsam_with_gamma_half_equals_sam_and_with_zero_equals_base() -> None:
    assert_equal(train(method="wsam", gamma=0.5), train(), atol=1e-6)
    assert_equal(train(method="wsam", gamma=0.0), train(0.0), atol=1e-6)


def test_looksam_at_every_step_equals_sam() -> None:
    assert_equal(train(method="looksam"), train())


def test_friendly_with_zero_sigma_equals_sam() -> None:
    assert_equal(train(method="friendly", sigma=0.0), train(), atol=1e-6)


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
def test_learning_rate_range_of_schedule_is_its_lowest_and_highest(
    schedule: Any, expected: tuple[float, float]
) -> None:
    assert sam.learning_rate_range(keras.optimizers.SGD(schedule)) == pytest.approx(expected)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(schedule))
    assert sam.learning_rate_range(scaled) == pytest.approx(expected)


def test_scheduled_rho_follows_learning_rate_within_its_range() -> None:
    rho = sam.scheduled_rho(0.1, 0.5, 0.25, 0.0, 1.0)
    assert float(rho) == pytest.approx(0.2)
    assert float(sam.scheduled_rho(0.1, 0.5, 2.0, 0.0, 1.0)) == pytest.approx(0.5)
    assert float(sam.scheduled_rho(0.1, 0.5, 0.0, 0.0, 0.0)) == pytest.approx(0.1)


def test_perturbation_equals_the_papers_formulas() -> None:
    kernel, bias = RANDOM.normal(size=(4, 3)), RANDOM.normal(size=3)
    variables = [keras.Variable(value.astype(np.float32)) for value in (kernel, bias)]
    gradients = [RANDOM.normal(size=value.shape).astype(np.float32) for value in (kernel, bias)]
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    for shift, gradient in zip(sam.perturbation(gradients, variables, 0.1), gradients, strict=True):
        np.testing.assert_allclose(np.array(shift), 0.1 * gradient / norm, rtol=1e-5)
    scales = [np.abs(kernel) + 0.2, np.ones(3)]
    norm = np.sqrt(sum(((scale * gradient) ** 2).sum() for scale, gradient in zip(scales, gradients, strict=True)))
    adaptive = sam.perturbation(gradients, variables, 0.1, adaptive=True, eta=0.2)
    for shift, gradient, scale in zip(adaptive, gradients, scales, strict=True):
        np.testing.assert_allclose(np.array(shift), 0.1 * scale**2 * gradient / norm, rtol=1e-5)


def test_perturbation_does_not_scale_two_dimensional_biases() -> None:
    layer = keras.layers.LayerNormalization(axis=[1, 2])
    layer.build((None, 2, 3))
    layer.gamma.assign(np.full((2, 3), 5.0))
    gradients = [tf.ones((2, 3)), tf.zeros((2, 3))]
    for adaptive in (False, True):
        shift, _ = sam.perturbation(gradients, [layer.gamma, layer.beta], 1.0, adaptive)
        np.testing.assert_allclose(np.array(shift), np.full((2, 3), 1 / np.sqrt(6)), rtol=1e-5)


def test_perturbation_with_none_gradient_takes_one_norm_over_the_rest() -> None:
    variables = [keras.Variable(np.ones(1, np.float32)) for _ in range(3)]
    shifts = sam.perturbation([tf.constant([3.0]), None, tf.constant([4.0])], variables, 1.0)
    np.testing.assert_allclose(np.array(shifts[0]), [0.6], rtol=1e-6)
    assert shifts[1] is None
    np.testing.assert_allclose(np.array(shifts[2]), [0.8], rtol=1e-6)


def test_methods_table_is_the_one_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs/sam.md").read_text()
    _, _, rest = page.partition("<!-- begin methods -->\n")
    table, marker, _ = rest.partition("<!-- end methods -->")
    assert marker
    assert table == sam.methods_table()


def test_method_settings_with_two_ranges_for_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = sam.MethodSetting(default=0.5, below=1, meaning="")
    method = sam.Method(paper="", when="", settings={"alpha": alpha}, final_gradient=lambda *_: ([], {}))
    monkeypatch.setitem(sam.METHODS, "other", method)
    with pytest.raises(ValueError, match=r"^alpha: expected one range in all methods, received several \(gsam, look"):
        sam.method_settings()


def test_made_up_method_in_the_table_trains_through_step_and_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    # It perturbs against the last step's first gradient, and gives the optimizer alpha times the perturbed gradient.
    def final_gradient(settings: Any, gradients: dict[str, Any], _: Any) -> Any:
        return [settings.alpha * gradient for gradient in gradients["perturbed"]], {"last": gradients["first"]}

    method = sam.Method(
        paper="",
        when="",
        settings={"alpha": sam.MethodSetting(default=0.25, meaning="")},
        memory=("last",),
        direction=lambda settings, first, memory: [-1.0 * last for last in memory["last"]],
        final_gradient=final_gradient,
    )
    monkeypatch.setitem(sam.METHODS, "made-up", method)
    weights = [value.astype(np.float64) for value in values(regression().variables)]
    last = [np.zeros_like(value) for value in weights]
    for batch in SIX:
        norm = np.sqrt(reference.inner(last, last))
        shift = [0.0 if norm == 0 else -0.5 * value / norm for value in last]
        perturbed = reference.gradient([w + e for w, e in zip(weights, shift, strict=True)], batch)
        last = reference.gradient(weights, batch)
        weights = [w - 0.5 * 0.25 * gradient for w, gradient in zip(weights, perturbed, strict=True)]
    assert_equal(train(method="made-up"), weights, atol=1e-5)

    model, optimizer = regression(), keras.optimizers.SGD(0.5)
    optimizer.build(model.trainable_variables)
    step = sam.Step(sam.Settings(rho=0.5, method="made-up"), model, optimizer)

    def forward(part: Any) -> tuple[tf.Tensor, Any]:
        outputs = model(part[0], training=True)
        return cross_entropy()(part[1], outputs), outputs

    for batch in SIX:
        step(forward, batch)
    assert_equal(values(model.variables), weights, atol=1e-5)
    with pytest.raises(ValueError, match="`gamma`"):
        sam.Settings(method="made-up", gamma=0.5)
