"""Sharpness-aware minimization in NumPy, written from the papers for softmax regression trained by SGD, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Weights = list[np.ndarray]  # kernel [features, classes] and bias [classes]
Batch = tuple[np.ndarray, np.ndarray]  # float [n, features] and int [n]


def gradient(weights: Weights, batch: Batch) -> Weights:
    """The gradient of the mean cross-entropy."""
    inputs, labels = batch
    logits = inputs @ weights[0] + weights[1]
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    probabilities[np.arange(len(labels)), labels] -= 1
    return [inputs.T @ probabilities / len(labels), probabilities.mean(axis=0)]


def loss(weights: Weights, batch: Batch) -> float:
    """Mean cross-entropy."""
    logits = batch[0] @ weights[0] + weights[1]
    highest = logits.max(axis=1, keepdims=True)
    log_sum = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
    return float((log_sum - logits[np.arange(len(batch[1])), batch[1]]).mean())


def inner(one: Weights, other: Weights) -> float:
    return float(sum((a * b).sum() for a, b in zip(one, other, strict=True)))


def mix(*terms: tuple[float, Weights]) -> Weights:
    return [
        sum(factor * part for (factor, _), part in zip(terms, parts, strict=True))
        for parts in zip(*(weights for _, weights in terms), strict=True)
    ]


def perturbed_weights(weights: Weights, direction: Weights, rho: float, adaptive: bool, eta: float) -> Weights:
    scales = [np.abs(weights[0]) + eta if adaptive else np.ones_like(weights[0]), np.ones_like(weights[1])]
    scaled = [scale * part for scale, part in zip(scales, direction, strict=True)]
    norm = np.sqrt(inner(scaled, scaled))
    return [w + rho * scale * part / norm for w, scale, part in zip(weights, scales, scaled, strict=True)]


def parts(batch: Batch, splits: int | list[int]) -> Iterator[tuple[float, Batch]]:
    for inputs, labels in zip(*(np.array_split(array, splits) for array in batch), strict=True):
        if len(labels):
            yield len(labels) / len(batch[1]), (inputs, labels)


def train(
    weights: Weights,
    batches: Sequence[Batch],
    rates: Sequence[float],
    *,
    method: str = "sam",
    rho: Any = 0.5,
    scale: Sequence[float] = (1.0, 1.0),
    radii: Sequence[float] | None = None,
    adaptive: bool = False,
    eta: float = 0.01,
    every: int = 1,
    splits: int = 1,
    alpha: float = 0.0,
    gamma: float = 0.0,
    rho_min: float | None = None,
    rho_max: float | None = None,
    sigma: float = 0.0,
    decay: float = 0.0,
    replicas: int | list[int] = 1,
    synchronised: bool = False,
    clip: float | None = None,
) -> Weights:
    """Train with one step on each batch, and return the weights.

    rates: the learning rates of the steps. gsam's rho follows them between 0 and the highest.
    rho: a number, or a function of the step.
    scale: kernel's and bias' part in the perturbation, 0 or 1.
    radii: kernel's and bias' own rho.
    replicas: their number, each with an equal part of a batch; or the positions where a batch is split.
    clip: the final gradient's largest norm.
    """
    average: Weights = [np.zeros_like(w) for w in weights]
    orthogonal: Any = None
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
        radius = rho(step) if callable(rho) else rho
        if method == "gsam":
            low, high = (rho if value is None else value for value in (rho_min, rho_max))
            radius = low + (high - low) * rate / max(rates)
        whole = gradient(weights, batch)
        first, perturbed = mix((0.0, whole)), mix((0.0, whole))
        for weight, part in parts(batch, splits * replicas):
            part_gradient = gradient(weights, part)
            direction = whole if synchronised else part_gradient
            if method == "friendly":
                direction = mix((1.0, direction), (-sigma, mix((decay, average), (1 - decay, direction))))
            direction = [factor * each for factor, each in zip(scale, direction, strict=True)]
            norm = np.sqrt(inner(direction, direction))
            if method == "lesam":
                radius = min(sigma / (norm + 1e-12), rho)
            moved = perturbed_weights(weights, direction, radius, adaptive, eta)
            if radii:
                moved = [w + r * d / norm for w, r, d in zip(weights, radii, direction, strict=True)]
            first = mix((1.0, first), (weight, part_gradient))
            perturbed = mix((1.0, perturbed), (weight, gradient(moved, part)))
        average = mix((decay, average), (1 - decay, first))
        final = perturbed
        if method == "gsam":
            along = inner(first, perturbed) / inner(perturbed, perturbed)
            final = mix((1.0, perturbed), (-alpha, mix((1.0, first), (-along, perturbed))))
        elif method == "wsam":
            final = mix(((1 - 2 * gamma) / (1 - gamma), first), (gamma / (1 - gamma), perturbed))
        elif step % every:
            final = first
            if method == "looksam":
                final = mix(
                    (1.0, first), (alpha * np.sqrt(inner(first, first) / inner(orthogonal, orthogonal)), orthogonal)
                )
        elif method == "looksam":
            cosine = inner(first, perturbed) / np.sqrt(inner(first, first) * inner(perturbed, perturbed))
            unit = mix((1 / np.sqrt(inner(first, first)), first))
            orthogonal = mix((1.0, perturbed), (-np.sqrt(inner(perturbed, perturbed)) * cosine, unit))
        shrink = 1.0 if clip is None else min(1.0, clip / np.sqrt(inner(final, final)))
        weights = mix((1.0, weights), (-rate * shrink, final))
    return weights
