"""Measures of sharpness: loss rises, the Hessian's largest eigenvalues and trace, and the loss along lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import keras
import numpy as np
from keras import ops

from flatmin import sam

from .hessian import largest_eigenpairs, random_signs, trace
from .surface import Surface, flattened

EIGENVALUES = 5


@dataclass(frozen=True)
class Sharpness:
    """The result of `measure`.

    Attributes:
        metrics: see `measure`.
        trace_error: the standard error of the trace, from the random vectors.
        eigenvector: of the largest eigenvalue, float32 [n].
        errors: the standard errors of the metrics over the images (`Surface.standard_error`). Those of eigenvalues and
            trace take the vectors as given, which is right to first order. NaN where there is one batch.
    """

    metrics: dict[str, float]
    trace_error: float
    eigenvector: np.ndarray
    errors: dict[str, float] = field(default_factory=dict)


def measure(
    surface: Surface, *, rho: float, adaptive_rho: float, steps: int, probes: int, seed: int, errors: bool = False
) -> Sharpness:
    """Measure how sharp a minimum is.

    Metrics: `gradient_rise` and `adaptive_rise`, the loss rises within rho and adaptive_rho, in units of the loss;
    `eigenvalue_1` to `eigenvalue_5`, the largest eigenvalues of the Hessian, and `trace`, its trace, in units of the
    loss divided by squared weights.

    Args:
        surface: the loss around the minimum.
        rho, adaptive_rho: the distances of the two loss rises (`rise`).
        steps: number of Lanczos steps (`largest_eigenpairs`).
        probes: number of random vectors for the trace (`trace`).
        seed: equal seeds draw equal vectors, so that two models are compared on the same ones.
        errors: also compute the standard errors over the images, which takes half as long again.
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
    over_images = _errors(surface, rho, adaptive_rho, vectors, probes, seed) if errors else {}
    return Sharpness(metrics, error, vectors[0], over_images)


def _errors(
    surface: Surface, rho: float, adaptive_rho: float, vectors: np.ndarray, probes: int, seed: int
) -> dict[str, float]:
    base = surface.losses_by_batch(surface.weights)
    by_batch = {
        name: surface.losses_by_batch(surface.weights + _along_gradient(surface, radius, adaptive)) - base
        for name, radius, adaptive in (("gradient_rise", rho, False), ("adaptive_rise", adaptive_rho, True))
    }
    by_batch |= {f"eigenvalue_{i + 1}": surface.curvature_by_batch(vector) for i, vector in enumerate(vectors)}
    signs = random_signs(len(surface.weights), probes, seed)
    by_batch["trace"] = np.mean([surface.curvature_by_batch(vector) for vector in signs], axis=0)
    return {name: surface.standard_error(values) for name, values in by_batch.items()}


def rise(surface: Surface, rho: float, adaptive: bool = False) -> float:
    """L(w + e) - L(w) with SAM's e, a step of length rho along the gradient (arXiv:2010.01412, eq. 2).

    Adaptive: the length is relative to the size of each weight (ASAM, arXiv:2102.11600, eq. 3).
    """
    shift = _along_gradient(surface, rho, adaptive)
    return surface.loss(surface.weights + shift) - surface.loss(surface.weights)


def _along_gradient(surface: Surface, rho: float, adaptive: bool) -> np.ndarray:
    gradients = surface.split(surface.gradient(surface.weights).astype(np.float32))
    return flattened(sam.perturbation(gradients, surface.split(surface.weights), rho, adaptive))


def adaptive_sharpness(surface: Surface, rho: float) -> float:
    """L(w + e) - L(w) with e = rho T^2 g / ||T g||, T = |w| for every weight (Kwon et al. 2021, arXiv:2102.11600).

    The highest loss, to first order, where no weight changes by more than its own size allows. It is the same for two
    networks of one function that differ in the scales of their layers, which `rise` and eigenvalues are not.
    """
    gradient, scale = surface.gradient(surface.weights), np.abs(surface.weights.astype(np.float64))
    norm = float(np.linalg.norm(scale * gradient))
    shift = rho * scale**2 * gradient / norm if norm else np.zeros_like(gradient)
    return surface.loss((surface.weights + shift).astype(np.float32)) - surface.loss(surface.weights)


def relative_flatness(surface: Surface, probes: int, seed: int) -> tuple[float, float]:
    """Estimate relative flatness, summed over the kernels, and the estimate's standard error (0 for one probe).

    For a kernel with columns w_s, one for each neuron: the sum over s, s' of <w_s, w_s'> Tr H_ss', H_ss' the block of
    the Hessian of w_s and w_s' (Petzka et al. 2021, arXiv:2001.00939, definition 3). It does not change when a layer is
    scaled and the next one scaled back. Estimated by products with a x (b W) for vectors a, b of random signs.
    """
    random = np.random.default_rng(seed)
    parts = [np.asarray(ops.convert_to_numpy(part)) for part in surface.split(surface.weights)]
    kernels = [i for i, variable in enumerate(surface.variables) if sam.is_kernel(variable)]
    estimates = []
    for _ in range(probes):
        total = 0.0
        for index in kernels:
            matrix = parts[index].reshape(-1, parts[index].shape[-1])
            a, b = random.choice(np.array([-1, 1], np.float32), (2, len(matrix)))
            vectors = [np.zeros(part.size, np.float32) for part in parts]
            vectors[index] = np.outer(a, b @ matrix).reshape(-1)
            vector = np.concatenate(vectors)
            total += float(vector @ surface.hessian_vector_product(vector))
        estimates.append(total)
    error = float(np.std(estimates, ddof=1)) / probes**0.5 if probes > 1 else 0.0
    return float(np.mean(estimates)), error


def filter_normalised(variables: Sequence[keras.Variable], seed: int) -> np.ndarray:
    """Draw a random direction, float32 [n], in which every filter has the norm of the weights' filter.

    d <- d / ||d|| ||w|| for each filter (Li et al. 2018, arXiv:1712.09913, section 4), so that one unit is as large a
    step to any network. The direction is 0 for biases and normalisation weights.
    """
    random = np.random.default_rng(seed)
    parts = []
    for variable in variables:
        weights = ops.convert_to_numpy(ops.cast(variable.value, "float32"))
        direction = random.normal(size=weights.shape).astype(np.float32)
        # Keras' last axis counts the filters; where that is 1, as in depthwise kernels, the one before it does.
        axes = tuple(range(weights.ndim - (2 if weights.ndim > 2 and weights.shape[-1] == 1 else 1)))
        norms = [np.sqrt(np.square(values).sum(axes, keepdims=True)) for values in (weights, direction)]
        parts.append(direction * (norms[0] / norms[1]) if weights.ndim > 1 else np.zeros_like(weights))
    return np.concatenate([part.reshape(-1) for part in parts])


def line(surface: Surface, direction: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The loss at weights + position x direction, float64 as `positions`."""
    return np.array([surface.loss(surface.weights + position * direction) for position in positions])
