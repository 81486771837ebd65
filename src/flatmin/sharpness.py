"""How sharp a minimum is: loss rises, the Hessian's largest eigenvalues and trace, and the loss along lines.

Everything is of the mean loss over a fixed sample, in inference mode, as a function of the trained weights laid out
as one vector; no variable is moved. It knows no data set and no stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import scipy.linalg
import tensorflow as tf
from matplotlib.figure import Figure

from flatmin import sam
from flatmin.common import files

EIGENVALUES = 5
# How far the picture goes: along the eigenvector in units of the weights, along filters in parts of their norms.
EIGENVECTOR_POSITIONS = np.linspace(-0.3, 0.3, 17)
RANDOM_POSITIONS = np.linspace(-0.3, 0.3, 17)

Batch = tuple[Any, Any]


class Derivatives:
    """Sums over a batch of the losses, their gradient, and their Hessian times a vector: compiled once.

    Models of one architecture share it, since it takes the values of all variables as arguments.
    """

    def __init__(self, model: keras.Model, losses: Callable[[Any, tf.Tensor], tf.Tensor], example: Batch) -> None:
        """
        Args:
            losses: (labels, outputs) -> float32 [batch].
            example: (inputs, labels) of any batch size; inputs are a tensor or several.
        """
        model(example[0], training=False)
        self._model = model
        self._losses = losses
        self._shapes = [tuple(variable.shape) for variable in model.trainable_variables]
        vector = tf.TensorSpec((sum(map(_size, self._shapes)),), tf.float32)
        frozen = [tf.TensorSpec(variable.shape, variable.dtype) for variable in model.non_trainable_variables]
        batch = tf.nest.map_structure(lambda part: tf.TensorSpec((None, *part.shape[1:]), part.dtype), example)
        one, two = [vector, frozen, batch], [vector, vector, frozen, batch]
        self.loss = tf.function(self._loss, input_signature=one, autograph=False)
        self.gradient = tf.function(self._gradient, input_signature=one, autograph=False)
        self.product = tf.function(self._product, input_signature=two, autograph=False)

    def split(self, vector: Any) -> list[tf.Tensor]:
        """[n] into tensors shaped as the trained variables."""
        parts = tf.split(tf.convert_to_tensor(vector), [_size(shape) for shape in self._shapes])
        return [tf.reshape(part, shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _loss(self, weights: tf.Tensor, frozen: list[tf.Tensor], batch: Batch) -> tf.Tensor:
        return self._sum(self.split(weights), frozen, batch)

    def _sum(self, values: list[tf.Tensor], frozen: list[tf.Tensor], batch: Batch) -> tf.Tensor:
        inputs, labels = batch
        outputs, _ = self._model.stateless_call(values, frozen, inputs, training=False)
        return tf.reduce_sum(self._losses(labels, outputs))

    def _gradient(self, weights: tf.Tensor, frozen: list[tf.Tensor], batch: Batch) -> tf.Tensor:
        values = self.split(weights)
        return flat(self._gradients(values, frozen, batch))

    def _gradients(self, values: list[tf.Tensor], frozen: list[tf.Tensor], batch: Batch) -> list[tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            loss = self._sum(values, frozen, batch)
        return tape.gradient(loss, values, unconnected_gradients="zero")

    def _product(self, weights: tf.Tensor, vector: tf.Tensor, frozen: list[tf.Tensor], batch: Batch) -> tf.Tensor:
        # Reverse over reverse: the gradient of <g, vector> is the Hessian times the vector (Pearlmutter 1994).
        values = self.split(weights)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            gradients = self._gradients(values, frozen, batch)
        return flat(tape.gradient(gradients, values, self.split(vector), unconnected_gradients="zero"))


class Surface:
    """The mean loss over a sample as a function of a model's trained weights, float [n]; sums are float64."""

    def __init__(self, derivatives: Derivatives, model: keras.Model, batches: Sequence[Batch]) -> None:
        """
        Args:
            model: whose variables are read now, of the architecture that `derivatives` were made of.
            batches: (inputs, labels), each at least one example.
        """
        self.split = derivatives.split
        self.weights: np.ndarray = flat([variable.value for variable in model.trainable_variables]).numpy()
        self._frozen = [tf.convert_to_tensor(variable) for variable in model.non_trainable_variables]
        self._batches = batches
        self._count = sum(len(labels) for _, labels in batches)
        self._derivatives = derivatives

    def loss(self, weights: np.ndarray) -> float:
        return float(self._mean(self._derivatives.loss, weights))

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        return self._mean(self._derivatives.gradient, weights)

    def hessian_vector_product(self, vector: np.ndarray) -> np.ndarray:
        """The Hessian at the model's weights times `vector`, float64 [n]."""
        return self._mean(self._derivatives.product, self.weights, vector)

    def _mean(self, of_batch: Callable[..., tf.Tensor], *vectors: np.ndarray) -> np.ndarray:
        tensors = [tf.constant(vector, tf.float32) for vector in vectors]
        total = sum(of_batch(*tensors, self._frozen, batch).numpy().astype(np.float64) for batch in self._batches)
        return np.asarray(total) / self._count


@dataclass(frozen=True)
class Sharpness:
    """metrics: what `measure` lists. trace_error: the trace's standard error. eigenvector: the first, float [n]."""

    metrics: dict[str, float]
    trace_error: float
    eigenvector: np.ndarray


def measure(surface: Surface, *, rho: float, adaptive_rho: float, steps: int, probes: int, seed: int) -> Sharpness:
    """The figures of a minimum, in units of the loss (and of the weights, to the power of -2, for the curvature).

    `gradient_rise` and `adaptive_rise` are `rise`'s within rho and adaptive_rho, `eigenvalue_1` to `eigenvalue_5`
    the Hessian's largest after so many Lanczos steps, `trace` its trace from so many probes. Equal seeds draw equal
    vectors, so that two models are compared on the same.
    """
    product, size = surface.hessian_vector_product, len(surface.weights)
    values, vectors = largest_eigenpairs(product, size, min(EIGENVALUES, size), steps, seed)
    estimate, error = trace(product, size, probes, seed)
    metrics = {
        "gradient_rise": rise(surface, rho),
        "adaptive_rise": rise(surface, adaptive_rho, adaptive=True),
        **{f"eigenvalue_{index + 1}": float(value) for index, value in enumerate(values)},
        "trace": estimate,
    }
    return Sharpness(metrics, error, vectors[0])


def rise(surface: Surface, rho: float, adaptive: bool = False) -> float:
    """L(w + e) - L(w) with SAM's e, the step along the gradient to the distance rho (arXiv:2010.01412, eq. 2).

    Adaptive: distance in units of the weights' own sizes (ASAM, arXiv:2102.11600, eq. 3).
    """
    gradients = surface.split(surface.gradient(surface.weights).astype(np.float32))
    shifts = sam.perturbation(gradients, surface.split(surface.weights), rho, adaptive)
    return surface.loss(surface.weights + flat(shifts).numpy()) - surface.loss(surface.weights)


def largest_eigenpairs(
    product: Callable[[np.ndarray], np.ndarray], size: int, count: int, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The algebraically largest eigenvalues of a symmetric matrix by Lanczos, with full reorthogonalisation.

    A fixed number of steps has a fixed cost and gives an answer for any spectrum, where ARPACK (scipy's `eigsh`) fails
    on the nearly singular Hessians of small samples. Values are never above the true ones (but for rounding).

    Args:
        product: float [size] -> the matrix times it. count: at most size. steps: products taken; count to size of them.

    Returns:
        values, float64 [count], falling; vectors, float32 [count, size], of norm 1.
    """
    steps = min(max(steps, count), size)
    random = np.random.default_rng(seed)
    basis = np.zeros((steps, size), np.float32)
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    remainder, scale = random.normal(size=size), 0.0
    for step in range(steps):
        norm = float(np.linalg.norm(remainder))
        if step and norm <= 1e-6 * scale:
            # The space is closed under the matrix: go on with any vector outside.
            remainder = _outside(random.normal(size=size), basis[:step])
        if step:
            beside[step - 1] = norm
        basis[step] = remainder / np.linalg.norm(remainder)
        image = product(basis[step])
        scale = max(scale, float(np.linalg.norm(image)))
        diagonal[step] = image @ basis[step]
        remainder = _outside(image, basis[: step + 1])
    values, combinations = scipy.linalg.eigh_tridiagonal(diagonal, beside[:-1])
    order = np.argsort(values)[::-1][:count]
    vectors = combinations[:, order].T.astype(np.float32) @ basis
    return values[order], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _outside(vector: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """float64 [n] without its part in the span of orthonormal rows; twice, since once leaves what rounding adds."""
    for _ in range(2):
        vector = vector - (basis @ vector.astype(np.float32)) @ basis
    return vector


def trace(product: Callable[[np.ndarray], np.ndarray], size: int, probes: int, seed: int) -> tuple[float, float]:
    """The trace of a symmetric matrix and its standard error, 0 for one probe.

    Hutchinson's estimate (1990): the mean of z . H z over vectors z of random signs. Exact for a diagonal matrix.
    """
    random = np.random.default_rng(seed)
    found = []
    for _ in range(probes):
        signs = random.choice(np.array([-1, 1], np.float32), size)
        found.append(float(signs @ product(signs)))
    error = float(np.std(found, ddof=1)) / probes**0.5 if probes > 1 else 0.0
    return float(np.mean(found)), error


def filter_normalised(variables: Sequence[keras.Variable], seed: int) -> np.ndarray:
    """A random direction, float32 [n], whose filters have the norms of the weights' filters.

    d <- d / ||d|| ||w|| for each filter (Li et al. 2018, arXiv:1712.09913, section 4), so that the unit is what the
    network itself takes for a large step. Biases and normalisation weights stay where they are.
    """
    random = np.random.default_rng(seed)
    parts = []
    for variable in variables:
        weights = np.asarray(variable, np.float32)
        direction = random.normal(size=weights.shape).astype(np.float32)
        # Keras' last axis counts the filters; where that is 1, as in depthwise kernels, the one before it does.
        axes = tuple(range(weights.ndim - (2 if weights.ndim > 2 and weights.shape[-1] == 1 else 1)))
        norms = [np.sqrt(np.square(values).sum(axes, keepdims=True)) for values in (weights, direction)]
        parts.append(direction * (norms[0] / norms[1]) if weights.ndim > 1 else np.zeros_like(weights))
    return np.concatenate([part.reshape(-1) for part in parts])


def line(surface: Surface, direction: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The loss at weights + position x direction, float64 as `positions`."""
    return np.array([surface.loss(surface.weights + position * direction) for position in positions])


def draw(along: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path | str) -> None:
    """Write a PNG of the loss along two directions.

    Args:
        along: for each model its losses at `EIGENVECTOR_POSITIONS` and at `RANDOM_POSITIONS`.
    """
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    panels = (
        ("along the top eigenvector of the Hessian", "distance in weight space", EIGENVECTOR_POSITIONS),
        ("along a random filter-normalised direction", "distance (1 = the norm of each filter)", RANDOM_POSITIONS),
    )
    for column, (axis, (title, unit, positions)) in enumerate(zip(figure.subplots(1, 2), panels, strict=True)):
        for name, losses in along.items():
            axis.plot(positions, losses[column], label=name, linewidth=1.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(unit)
        axis.set_ylabel("mean train loss (nats)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    with files.atomic_write(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})


def flat(tensors: Sequence[Any]) -> tf.Tensor:
    """Tensors as one float32 [n], in their order."""
    return tf.concat([tf.reshape(tf.cast(tensor, tf.float32), [-1]) for tensor in tensors], axis=0)


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
