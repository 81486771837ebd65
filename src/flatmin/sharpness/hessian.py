"""Eigenvalues and trace of a symmetric matrix that is known by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np


def largest_eigenpairs(
    product: Callable[[np.ndarray], np.ndarray], size: int, count: int, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the algebraically largest eigenvalues of a symmetric matrix by Lanczos with full reorthogonalisation.

    A fixed number of steps has a fixed cost and gives an answer for any spectrum, whereas ARPACK (scipy's `eigsh`)
    fails on the nearly singular Hessians of small samples. Except for rounding, no value exceeds the true one.

    Args:
        product: float [size] -> the matrix times that vector.
        size: number of rows of the matrix.
        count: number of eigenvalues, at most size.
        steps: number of products. It is raised to count, or lowered to size, where it is outside of these.
        seed: of the random first vector.

    Returns:
        eigenvalues, float64 [count], in falling order; eigenvectors, float32 [count, size], of norm 1.
    """
    steps = min(max(steps, count), size)
    random = np.random.default_rng(seed)
    basis = np.zeros((steps, size), np.float32)
    diagonal, off_diagonal = np.zeros(steps), np.zeros(steps)
    remainder, scale = random.normal(size=size), 0.0
    for step in range(steps):
        norm = float(np.linalg.norm(remainder))
        if step and norm <= 1e-6 * scale:
            # The space is closed under the matrix: continue with any vector outside of it.
            remainder = _outside(random.normal(size=size), basis[:step])
        if step:
            off_diagonal[step - 1] = norm
        basis[step] = remainder / np.linalg.norm(remainder)
        image = product(basis[step])
        scale = max(scale, float(np.linalg.norm(image)))
        diagonal[step] = image @ basis[step]
        remainder = _outside(image, basis[: step + 1])
    values, combinations = np.linalg.eigh(np.diag(diagonal) + np.diag(off_diagonal[:-1], -1))  # its lower triangle
    order = np.argsort(values)[::-1][:count]
    vectors = combinations[:, order].T.astype(np.float32) @ basis
    return values[order], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _outside(vector: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Remove from float64 [n] its part in the span of orthonormal rows. Twice, because rounding leaves a remainder."""
    for _ in range(2):
        vector = vector - (basis @ vector.astype(np.float32)) @ basis
    return vector


def trace(product: Callable[[np.ndarray], np.ndarray], size: int, probes: int, seed: int) -> tuple[float, float]:
    """Estimate the trace of a symmetric matrix, and the estimate's standard error (0 for one probe).

    Hutchinson's estimate (1990): the mean of z . H z over vectors z of random signs. Exact for a diagonal matrix.

    Args:
        product: float32 [size] -> the matrix times that vector.
        probes: number of random vectors.
    """
    estimates = [float(signs @ product(signs)) for signs in random_signs(size, probes, seed)]
    error = float(np.std(estimates, ddof=1)) / probes**0.5 if probes > 1 else 0.0
    return float(np.mean(estimates)), error


def random_signs(size: int, probes: int, seed: int) -> Iterator[np.ndarray]:
    """Draw the vectors of `trace`, float32 [size], one by one."""
    random = np.random.default_rng(seed)
    for _ in range(probes):
        yield random.choice(np.array([-1, 1], np.float32), size)
