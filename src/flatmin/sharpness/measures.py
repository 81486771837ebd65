"""Measures of sharpness: loss rises, the Hessian's largest eigenvalues and trace, and the loss along lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np

from flatmin import sam

from .hessian import largest_eigenpairs, trace
from .surface import Surface, flattened

EIGENVALUES = 5


@dataclass(frozen=True)
class Sharpness:
    """The result of `measure`.

    Attributes:
        metrics: see `measure`.
        trace_error: the standard error of the trace.
        eigenvector: of the largest eigenvalue, float32 [n].
    """

    metrics: dict[str, float]
    trace_error: float
    eigenvector: np.ndarray


def measure(surface: Surface, *, rho: float, adaptive_rho: float, steps: int, probes: int, seed: int) -> Sharpness:
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
    """L(w + e) - L(w) with SAM's e, a step of length rho along the gradient (arXiv:2010.01412, eq. 2).

    Adaptive: the length is relative to the size of each weight (ASAM, arXiv:2102.11600, eq. 3).
    """
    gradients = surface.split(surface.gradient(surface.weights).astype(np.float32))
    shifts = sam.perturbation(gradients, surface.split(surface.weights), rho, adaptive)
    return surface.loss(surface.weights + flattened(shifts).numpy()) - surface.loss(surface.weights)


def filter_normalised(variables: Sequence[keras.Variable], seed: int) -> np.ndarray:
    """Draw a random direction, float32 [n], in which every filter has the norm of the weights' filter.

    d <- d / ||d|| ||w|| for each filter (Li et al. 2018, arXiv:1712.09913, section 4), so that one unit is as large a
    step to any network. The direction is 0 for biases and normalisation weights.
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
