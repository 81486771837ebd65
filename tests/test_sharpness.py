"""Sharpness against closed forms of a quadratic and the dense Hessian of a small network."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import scipy.sparse.linalg
import tensorflow as tf

from flatmin import sharpness
from flatmin.sharpness import Derivatives, Surface


def symmetric(spectrum: Any, seed: int = 0) -> np.ndarray:
    """float64 [n, n] with these eigenvalues and random eigenvectors."""
    random = np.random.default_rng(seed).normal(size=(len(spectrum), len(spectrum)))
    vectors, _ = np.linalg.qr(random)
    return vectors @ np.diag(spectrum) @ vectors.T


class Quadratic(keras.Model):
    """One output for each input: w . A w / 2, whatever the input is. The Hessian is A."""

    def __init__(self, matrix: np.ndarray, start: np.ndarray) -> None:
        super().__init__()
        self.matrix = tf.constant(matrix, tf.float32)
        self.w = self.add_weight(shape=start.shape, initializer="zeros", name="w")
        self.w.assign(start)
        self.built = True

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        weights = tf.convert_to_tensor(self.w)
        return 0.5 * tf.reduce_sum(weights * tf.linalg.matvec(self.matrix, weights)) + 0.0 * inputs[:, 0]


def quadratic(matrix: np.ndarray, start: np.ndarray) -> Surface:
    batches = [(tf.zeros((3, 1)), tf.zeros(3, tf.int32)), (tf.zeros((1, 1)), tf.zeros(1, tf.int32))]
    model = Quadratic(matrix, start)
    return Surface(Derivatives(model, lambda _, outputs: outputs, batches[0]), model, batches)


def test_rise_of_quadratic_equals_closed_form() -> None:
    matrix, start = symmetric([4.0, 2.0, 1.0, -0.5]), np.array([1.0, -2.0, 0.5, 3.0])
    gradient = matrix @ start

    def rise_along(shift: np.ndarray) -> float:
        return float(gradient @ shift + shift @ matrix @ shift / 2)

    surface = quadratic(matrix, start)
    expected = rise_along(0.3 * gradient / np.linalg.norm(gradient))
    assert sharpness.rise(surface, 0.3) == pytest.approx(expected, rel=1e-5)
    # A vector counts as a bias, which ASAM doesn't scale.
    assert sharpness.rise(surface, 0.3, adaptive=True) == pytest.approx(expected, rel=1e-5)


def test_adaptive_rise_scales_kernels_by_their_weights() -> None:
    layer = keras.layers.Dense(1, use_bias=False)
    inputs, start = np.array([[1.0, -3.0, 0.5]], np.float32), np.array([[2.0], [-0.1], [0.7]], np.float32)
    layer.build((None, 3))
    layer.set_weights([start])
    model = keras.Sequential([keras.Input((3,)), layer])
    batches = [(tf.constant(inputs), tf.zeros(1, tf.int32))]
    derivatives = Derivatives(model, lambda _, outputs: 0.5 * tf.square(outputs[:, 0]), batches[0])
    output = (inputs @ start).item()
    scale = np.abs(start) + 0.01
    gradient = output * inputs.T
    shift = 0.2 * scale**2 * gradient / np.linalg.norm(scale * gradient)
    expected = 0.5 * (inputs @ (start + shift)).item() ** 2 - 0.5 * output**2
    surface = Surface(derivatives, model, batches)
    assert sharpness.rise(surface, 0.2, adaptive=True) == pytest.approx(expected, rel=1e-5)


def test_measure_of_quadratic_finds_its_largest_eigenvalues() -> None:
    spectrum = [9.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.1, -4.0, -20.0]
    result = sharpness.measure(
        quadratic(symmetric(spectrum), np.arange(9.0)), rho=0.1, adaptive_rho=0.2, steps=9, probes=2, seed=1
    )
    values = [result.metrics[f"eigenvalue_{index}"] for index in range(1, 6)]
    assert values == pytest.approx(spectrum[:5], rel=1e-4)  # the largest, not the largest by size
    assert set(result.metrics) == {
        "gradient_rise",
        "adaptive_rise",
        "trace",
        *(f"eigenvalue_{index}" for index in range(1, 6)),
    }
    rayleigh = result.eigenvector @ symmetric(spectrum) @ result.eigenvector
    assert rayleigh == pytest.approx(9.0, rel=1e-4)


def test_measure_of_three_weights_has_three_eigenvalues() -> None:
    result = sharpness.measure(
        quadratic(np.diag([3.0, 1.0, 2.0]), np.ones(3)), rho=0.1, adaptive_rho=0.2, steps=15, probes=1, seed=1
    )
    assert [result.metrics[f"eigenvalue_{index}"] for index in (1, 2, 3)] == pytest.approx([3, 2, 1], rel=1e-5)
    assert "eigenvalue_4" not in result.metrics
    assert result.metrics["trace"] == pytest.approx(6)
    assert result.trace_error == 0


def test_eigenpairs_of_large_spectrum_are_its_outliers() -> None:
    spectrum = np.concatenate([[80.0, 50.0, 45.0, 30.0, 20.0], np.linspace(-2, 3, 395)])
    matrix = symmetric(spectrum)
    values, vectors = sharpness.largest_eigenpairs(lambda vector: matrix @ vector, 400, 5, 25, 3)
    np.testing.assert_allclose(values, spectrum[:5], rtol=1e-4)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-4)
    assert np.linalg.norm(matrix @ vectors[0] - 80 * vectors[0]) < 0.05
    few, _ = sharpness.largest_eigenpairs(lambda vector: matrix @ vector, 400, 5, 6, 3)
    assert (few <= spectrum[:5] + 1e-3).all()


@pytest.mark.parametrize("spectrum", [[0.0] * 12, [7.0, 7.0, 7.0] + [0.0] * 9, [5.0] + [-1.0] * 11, [2.0] * 12])
def test_eigenpairs_of_few_distinct_eigenvalues_repeat_them(spectrum: list[float]) -> None:
    # The Krylov space ends early, and contains each eigenvalue once.
    matrix = symmetric(spectrum)
    values, vectors = sharpness.largest_eigenpairs(lambda vector: matrix @ vector, 12, 5, 12, 0)
    np.testing.assert_allclose(values, spectrum[:5], atol=1e-4)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-3)


@pytest.mark.parametrize("probes", [1, 3])
def test_trace_of_diagonal_is_exact(probes: int) -> None:
    diagonal = np.array([3.0, -1.0, 0.25, 8.0])
    estimate, error = sharpness.trace(lambda vector: diagonal * vector, 4, probes, 5)
    assert estimate == pytest.approx(diagonal.sum())
    assert error == 0


def test_trace_is_unbiased_with_known_error() -> None:
    matrix = symmetric(np.linspace(-1, 5, 30))
    result = [sharpness.trace(lambda vector: matrix @ vector, 30, 8, seed) for seed in range(300)]
    estimates, errors = np.array(result).T
    # Hutchinson's variance for random signs: twice the squares off the diagonal.
    deviation = np.sqrt(2 * (np.square(matrix).sum() - np.square(np.diag(matrix)).sum()) / 8)
    assert abs(estimates.mean() - np.trace(matrix)) < 4 * deviation / np.sqrt(300)
    assert estimates.std() == pytest.approx(deviation, rel=0.15)
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(deviation, rel=0.05)


def network(seed: int = 1) -> keras.Model:
    """Every kind of layer that is trained; about 200 weights. Curved activations, so that derivatives are smooth."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, strides=2, activation="swish"),
            keras.layers.BatchNormalization(),
            keras.layers.DepthwiseConv2D(2, activation="tanh"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(8, activation="relu6"),
            keras.layers.Dense(3),
        ]
    )
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if "seed" not in variable.path:
            variable.assign(variable + np.abs(random.normal(size=variable.shape)) * 0.5)
    return model


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def sample(size: int) -> list[tuple[tf.Tensor, tf.Tensor]]:
    random = np.random.default_rng(4)
    images = random.normal(size=(12, 6, 6, 2)).astype(np.float32)
    labels = random.integers(0, 3, 12).astype(np.int32)
    return [
        (tf.constant(images[start : start + size]), tf.constant(labels[start : start + size]))
        for start in range(0, 12, size)
    ]


def surface_around(model: keras.Model, size: int = 5) -> Surface:
    batches = sample(size)
    return Surface(Derivatives(model, cross_entropy, batches[0]), model, batches)


def dense_hessian(model: keras.Model) -> np.ndarray:
    """float64 [n, n], row by row, on the whole sample at once, from the variables themselves."""
    ((images, labels),) = sample(12)
    variables = [variable.value for variable in model.trainable_variables]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            loss = tf.reduce_mean(cross_entropy(labels, model(images, training=False)))
        gradients = tf.concat([tf.reshape(part, [-1]) for part in inner.gradient(loss, variables)], 0)
    rows = outer.jacobian(gradients, variables, unconnected_gradients="zero", experimental_use_pfor=False)
    return np.concatenate([row.numpy().reshape(len(gradients), -1) for row in rows], axis=1).astype(np.float64)


@pytest.mark.slow
def test_products_and_eigenvalues_equal_dense_hessian() -> None:
    model = network()
    hessian = dense_hessian(model)
    surface = surface_around(model)
    size = len(surface.weights)
    assert hessian.shape == (size, size)
    vector = np.random.default_rng(0).normal(size=size)
    tolerance = 1e-5 * np.abs(hessian).max() * np.sqrt(size)
    np.testing.assert_allclose(surface.hessian_vector_product(vector), hessian @ vector, atol=tolerance)
    expected, _ = scipy.sparse.linalg.eigsh(hessian, k=5, which="LA")
    values, vectors = sharpness.largest_eigenpairs(surface.hessian_vector_product, size, 5, 40, 7)
    np.testing.assert_allclose(values, expected[::-1], rtol=1e-3, atol=1e-5)
    assert vectors[0] @ hessian @ vectors[0] == pytest.approx(expected[-1], rel=1e-4)
    estimate, error = sharpness.trace(surface.hessian_vector_product, size, 100, 7)
    assert abs(estimate - np.trace(hessian)) < 4 * error


def test_loss_and_gradient_equal_model_in_inference_mode() -> None:
    model = network()
    ((images, labels),) = sample(12)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(cross_entropy(labels, model(images, training=False)))
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    surface = surface_around(model)
    assert surface.loss(surface.weights) == pytest.approx(float(loss), rel=1e-6)
    expected = np.concatenate([gradient.numpy().reshape(-1) for gradient in gradients])
    np.testing.assert_allclose(surface.gradient(surface.weights), expected, atol=1e-6)


def measured(model: keras.Model, size: int = 5) -> tuple[Any, ...]:
    surface = surface_around(model, size)
    result = sharpness.measure(surface, rho=0.05, adaptive_rho=0.5, steps=12, probes=3, seed=2)
    losses = sharpness.line(surface, result.eigenvector, np.linspace(-1, 1, 5))
    return result.metrics, result.trace_error, result.eigenvector.tolist(), losses.tolist()


@pytest.mark.slow
def test_measure_with_equal_seeds_is_equal_and_moves_no_variable() -> None:
    tf.config.experimental.enable_op_determinism()
    model = network()
    before = [variable.numpy() for variable in model.variables]
    assert measured(model) == measured(model)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 12])
def test_measure_does_not_depend_on_batch_size(size: int) -> None:
    model = network()
    metrics, _, _, losses = measured(model)
    other_metrics, _, _, other_losses = measured(model, size)
    assert other_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-3)


@pytest.mark.slow
def test_derivatives_shared_by_two_models_compile_once() -> None:
    batches = sample(5)
    first, second = network(1), network(2)
    derivatives = Derivatives(first, cross_entropy, batches[0])
    for model in (first, second):
        shared, own = Surface(derivatives, model, batches), surface_around(model)
        assert shared.loss(shared.weights) == own.loss(own.weights)
        np.testing.assert_array_equal(
            shared.hessian_vector_product(shared.weights), own.hessian_vector_product(own.weights)
        )
    assert derivatives.loss.experimental_get_tracing_count() == 1


def test_product_of_model_with_several_inputs_and_unused_weights_is_exact() -> None:
    left, right = keras.Input((2,)), keras.Input((3,))
    outputs = keras.layers.Dense(3)(keras.layers.Concatenate()([left, right]))
    model = keras.Model([left, right], outputs)
    batches = [([tf.ones((4, 2)), tf.ones((4, 3))], tf.zeros(4, tf.int32))]
    surface = Surface(Derivatives(model, lambda _, logits: logits[:, 0] ** 2, batches[0]), model, batches)
    product = surface.hessian_vector_product(np.ones(18))
    kernel = product[:15].reshape(5, 3)
    np.testing.assert_allclose(kernel, np.repeat([[12.0, 0, 0]], 5, axis=0), rtol=1e-6)
    np.testing.assert_allclose(product[15:], [12, 0, 0], rtol=1e-6)


def test_filter_normalised_direction_has_the_norms_of_the_filters() -> None:
    model = network()
    direction = sharpness.filter_normalised(model.trainable_variables, 3)
    ends = np.cumsum([int(np.prod(variable.shape)) for variable in model.trainable_variables])
    kinds = set()
    for variable, part in zip(model.trainable_variables, np.split(direction, ends[:-1]), strict=True):
        weights, part = variable.numpy(), part.reshape(variable.shape)
        kinds.add(weights.ndim)
        if weights.ndim == 1:
            assert not part.any()
        elif weights.shape[-1] == 1:  # the depthwise kernel [2, 2, 4, 1]
            for channel in range(weights.shape[2]):
                norm = np.linalg.norm(weights[:, :, channel])
                assert np.linalg.norm(part[:, :, channel]) == pytest.approx(norm, rel=1e-5)
        else:
            for index in range(weights.shape[-1]):
                norm = np.linalg.norm(weights[..., index])
                assert np.linalg.norm(part[..., index]) == pytest.approx(norm, rel=1e-5)
    assert kinds == {1, 2, 4}
    assert not np.array_equal(direction, sharpness.filter_normalised(model.trainable_variables, 4))


def test_line_through_quadratic_is_a_parabola() -> None:
    matrix = symmetric([4.0, 1.0])
    surface = quadratic(matrix, np.zeros(2))
    vector = sharpness.measure(surface, rho=0.1, adaptive_rho=0.1, steps=2, probes=1, seed=0).eigenvector
    positions = np.array([-1.0, 0.0, 0.5])
    np.testing.assert_allclose(sharpness.line(surface, vector, positions), 2 * positions**2, atol=1e-5)


def test_package_imports_nothing_of_flatmin_but_sam() -> None:
    package = Path(__file__).parents[1] / "src/flatmin/sharpness"
    imported = set()
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert {name for name in imported if name.startswith("flatmin")} == {"flatmin.sam"}
    assert not any(name.startswith("matplotlib") for name in imported)
