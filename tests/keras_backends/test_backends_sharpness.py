"""Sharpness on the backend that runs, against explicit Hessians by central differences of gradients."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops
from sam_networks import INPUTS, LABELS, cross_entropy, fit, network, regression

from flatmin import sharpness
from flatmin.sharpness import Derivatives, Surface

pytestmark = pytest.mark.slow  # all together

L = keras.layers


def losses(labels: Any, outputs: Any) -> Any:
    return keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)


def surface_of(model: keras.Model, inputs: np.ndarray, size: int = 6, dtype: str = "float32") -> Surface:
    labels = LABELS[: len(inputs)].astype("int32")
    batches = [
        (ops.convert_to_tensor(inputs[i : i + size], dtype), ops.convert_to_tensor(labels[i : i + size]))
        for i in range(0, len(inputs), size)
    ]
    return Surface(Derivatives(model, losses, batches[0]), model, batches)


def conv() -> tuple[keras.Model, np.ndarray, str]:
    layers = [L.Conv2D(3, 2, activation="swish"), L.BatchNormalization(), L.GlobalAveragePooling2D(), L.Dense(3)]
    return keras.Sequential([keras.Input((4, 4, 2)), *layers]), np.random.default_rng(1).normal(size=(12, 4, 4, 2)), ""


def embedding() -> tuple[keras.Model, np.ndarray, str]:
    layers = [L.Embedding(7, 4), L.Flatten(), L.Dense(3)]
    return keras.Sequential([keras.Input((3,), dtype="int32"), *layers]), np.arange(36).reshape(12, 3) % 7, "int32"


def attention() -> tuple[keras.Model, np.ndarray, str]:
    inputs = keras.Input((4, 3))
    outputs = L.Dense(3)(L.GlobalAveragePooling1D()(L.MultiHeadAttention(2, 3)(inputs, inputs)))
    return keras.Model(inputs, outputs), np.random.default_rng(1).normal(size=(12, 4, 3)), ""


def recurrent() -> tuple[keras.Model, np.ndarray, str]:
    layers = [L.SimpleRNN(4, unroll=True), L.Dense(3)]
    return keras.Sequential([keras.Input((4, 3)), *layers]), np.random.default_rng(1).normal(size=(12, 4, 3)), ""


@pytest.mark.parametrize("make", [conv, embedding, attention, recurrent])
def test_products_equal_explicit_hessian(make: Any) -> None:
    keras.utils.set_random_seed(2)
    model, inputs, dtype = make()
    surface = surface_of(model, inputs, dtype=dtype or "float32")
    random = np.random.default_rng(0)
    scale = 0.0
    for _ in range(3):
        one, other = (random.normal(size=surface.weights.size).astype(np.float32) for _ in range(2))
        one /= np.linalg.norm(one)
        product = surface.hessian_vector_product(one)
        step = 3e-3
        ends = [surface.gradient(surface.weights + sign * step * one) for sign in (1, -1)]
        explicit = (ends[0] - ends[1]) / (2 * step)
        scale = max(scale, np.abs(explicit).max())
        np.testing.assert_allclose(product, explicit, atol=2e-2 * scale)
        assert product @ other == pytest.approx(surface.hessian_vector_product(other) @ one, rel=1e-3, abs=1e-4 * scale)


def test_mixed_precision_is_close_to_float32() -> None:
    values = []
    for policy in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(2)
        layers = [L.Dense(5, "tanh", dtype=policy), L.Dense(3, dtype="float32")]
        surface = surface_of(keras.Sequential([keras.Input((6,)), *layers]), INPUTS)
        values.append(sharpness.largest_eigenpairs(surface.hessian_vector_product, surface.weights.size, 1, 8, 0)[0][0])
    assert values[1] == pytest.approx(values[0], rel=0.1)


def relu_network(factor: float) -> keras.Model:
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((6,)), L.Dense(8, "relu"), L.Dense(5, "relu"), L.Dense(3)])
    first, second = model.layers[0], model.layers[1]
    first.set_weights([factor * each for each in first.get_weights()])
    second.set_weights([second.get_weights()[0] / factor, second.get_weights()[1]])
    return model


def test_invariant_measures_do_not_change_when_layers_are_rescaled() -> None:
    results = []
    for factor in (1.0, 10.0):
        surface = surface_of(relu_network(factor), INPUTS)
        eigenvalue = sharpness.largest_eigenpairs(surface.hessian_vector_product, surface.weights.size, 1, 12, 0)[0][0]
        flatness, error = sharpness.relative_flatness(surface, probes=4, seed=1)
        assert error > 0
        results.append((sharpness.adaptive_sharpness(surface, 0.1), flatness, eigenvalue))
    for index in (0, 1):
        assert results[1][index] == pytest.approx(results[0][index], rel=1e-4)
        assert abs(results[0][index]) > 1e-3
    assert results[1][2] > 2 * results[0][2]


def test_relative_flatness_of_a_linear_layer_equals_its_definition() -> None:
    # The loss sum_s c_s (w_s . x)^2 has Hessian blocks H_ss = 2 c_s x x^T, so the sum is 2 |x|^2 sum_s c_s |w_s|^2.
    layer = L.Dense(3, use_bias=False)
    model = keras.Sequential([keras.Input((4,)), layer])
    x, c = np.array([[1.0, -2.0, 0.5, 1.5]], np.float32), np.array([1.0, 2.0, 3.0], np.float32)
    batch = (ops.convert_to_tensor(x), ops.zeros(1, "int32"))
    derivatives = Derivatives(model, lambda _, outputs: ops.sum(ops.convert_to_tensor(c) * outputs**2, axis=1), batch)
    surface = Surface(derivatives, model, [batch])
    kernel = np.array(ops.convert_to_numpy(layer.kernel.value))
    expected = 2 * (x**2).sum() * (c * (kernel**2).sum(axis=0)).sum()
    estimate, error = sharpness.relative_flatness(surface, probes=400, seed=0)
    assert abs(estimate - expected) < 4 * error
    assert error < 0.15 * expected


def test_standard_errors_over_images_cover_the_spread_of_samples() -> None:
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((6,)), L.Dense(3)])
    random = np.random.default_rng(5)
    options: dict[str, Any] = {"rho": 0.1, "adaptive_rho": 0.5, "steps": 6, "probes": 2, "seed": 1}
    # One surface over many images says what a sample of 36 gives on average; its spread is what the errors estimate.
    samples = [random.normal(size=(36, 6)).astype(np.float32) for _ in range(12)]
    measured = [sharpness.measure(surface_of(model, each, 3), errors=True, **options) for each in samples]
    for name in ("gradient_rise", "eigenvalue_1", "trace"):
        spread = np.std([each.metrics[name] for each in measured], ddof=1)
        stated = np.mean([each.errors[name] for each in measured])
        assert 0.4 < stated / spread < 2.5, name
    assert np.isnan(sharpness.measure(surface_of(model, samples[0], 36), errors=True, **options).errors["trace"])


def test_losses_that_are_not_one_for_each_example_are_refused() -> None:
    model, batch = regression(), (ops.convert_to_tensor(INPUTS), ops.convert_to_tensor(LABELS))
    surface = Surface(Derivatives(model, cross_entropy(), batch), model, [batch])
    with pytest.raises(ValueError, match=r"`losses`.*one loss for each example.*shape \(\)"):
        surface.loss(surface.weights)


def test_loss_of_a_model_with_several_labels_is_the_mean_over_examples() -> None:
    inputs = keras.Input((6,))
    model = keras.Model(inputs, [L.Dense(3)(inputs), L.Dense(1)(inputs)])

    def both(labels: Any, outputs: Any) -> Any:
        return losses(labels[0], outputs[0]) + ops.mean((labels[1] - outputs[1]) ** 2, axis=-1)

    batch = (ops.convert_to_tensor(INPUTS), (ops.convert_to_tensor(LABELS), ops.convert_to_tensor(INPUTS[:, :1])))
    surface = Surface(Derivatives(model, both, batch), model, [batch])
    expected = float(ops.convert_to_numpy(ops.mean(both(batch[1], model(batch[0])))))
    assert surface.loss(surface.weights) == pytest.approx(expected, rel=1e-5)


def test_surface_stays_where_it_was_made_when_the_model_trains_on() -> None:
    model = network()
    surface = surface_of(model, INPUTS)
    before = surface.loss(surface.weights)
    fit(model, keras.optimizers.SGD(0.1))
    assert surface.loss(surface.weights) == before
