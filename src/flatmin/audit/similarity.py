"""How alike pictures are: by a perceptual hash, and by the cosine of whitened activations; in blocks of products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.fft

SIDE = 32  # pixels of the picture that is hashed
_FREQUENCIES = 8  # of the cosine transform that are kept, in each direction
BITS = _FREQUENCIES**2 - 1  # all but the mean brightness
BLOCK = 2048  # pictures on each side of a block of products
TOGETHER = 8192  # pairs of a block whose activations are compared at a time: equal pictures all are pairs
COMPONENTS = 256  # of the activations, at most
PER_BIT = 0.03  # of cosine, that each bit in which hashes differ asks for more
_ROUNDING = 1e-6  # of the cosine of equal activations
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
# Signs of a mirrored picture's cosine transform: odd horizontal frequencies change theirs.
_MIRRORED = np.tile((-1.0) ** np.arange(_FREQUENCIES), _FREQUENCIES)[1:].astype(np.float32)


def hashes(pixels: np.ndarray) -> np.ndarray:
    """Perceptual hashes: the signs of the lowest frequencies of the discrete cosine transform of grey values.

    Args:
        pixels: float32 [n, SIDE, SIDE, 3].

    Returns:
        float32 [n, BITS], 1 or -1.
    """
    low = scipy.fft.dctn(pixels @ _GREY, axes=(1, 2), norm="ortho")[:, :_FREQUENCIES, :_FREQUENCIES]
    return np.where(low.reshape(len(pixels), -1)[:, 1:] > 0, np.float32(1), np.float32(-1))


class Whitening(NamedTuple):
    """Principal components of activations, each of about the same variance.

    Without it activations of all pictures of a class are alike, and those of a rectifier even of all pictures.

    Attributes:
        mean: float32 [channels].
        directions: float32 [channels, components].
    """

    mean: np.ndarray
    directions: np.ndarray

    @classmethod
    def fit(cls, activations: np.ndarray) -> Whitening:
        """Fit to float [n, channels].

        Their mean variance is added to each component's, so that none is amplified that is nearly constant.
        """
        mean = activations.mean(axis=0, dtype=np.float64)
        centred = activations.astype(np.float32) - mean.astype(np.float32)
        covariance = (centred.T @ centred).astype(np.float64) / len(activations)
        variances, vectors = np.linalg.eigh(covariance)
        kept = min(COMPONENTS, len(activations) - 1, len(variances))
        variances, vectors = np.maximum(variances[::-1], 0), vectors[:, ::-1][:, :kept]
        variances = variances[:kept]
        scale = np.sqrt(variances + max(variances.mean(), np.finfo(np.float32).tiny))
        return cls(mean.astype(np.float32), (vectors / scale).astype(np.float32))

    def __call__(self, activations: np.ndarray) -> np.ndarray:
        """Float [n, channels] -> float32 [n, components]."""
        return (activations.astype(np.float32) - self.mean) @ self.directions


def unit(vectors: np.ndarray) -> np.ndarray:
    """Float32 [n, d], each divided by its length. Zeros, of pictures as all are on average, become the first axis.

    So equal pictures are alike also where there are no others.
    """
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    first = np.eye(1, vectors.shape[1], dtype=vectors.dtype).repeat(len(vectors), axis=0)
    return np.divide(vectors, length, out=first, where=length > 0)


class Pairs(NamedTuple):
    """Pairs of pictures: arrays [pairs].

    Attributes:
        first, second: int64, positions with first < second.
        cosine: float32, of their whitened activations.
        bits: int16, in which their hashes differ, the second as it is or mirrored.
    """

    first: np.ndarray
    second: np.ndarray
    cosine: np.ndarray
    bits: np.ndarray


def alike(vectors: np.ndarray, signs: np.ndarray, cosine: float, bits: int) -> Iterator[Pairs]:
    """Give all pairs of near duplicates, block by block: those whose hashes agree, and then their activations.

    Args:
        vectors: float32 [n, d] of unit length. signs: float32 [n, BITS], their hashes.
        cosine: of a pair with equal hashes, at least; PER_BIT more for each bit in which they differ.
        bits: in which the hashes of a pair differ, at most.
    """
    agreeing = BITS - 2 * bits
    mirrored = signs * _MIRRORED
    for start in range(0, len(signs), BLOCK):
        rows = slice(start, start + BLOCK)
        for other in range(start, len(signs), BLOCK):
            columns = signs[other : other + BLOCK].T
            near = np.maximum(signs[rows] @ columns, mirrored[rows] @ columns)
            firsts, seconds = np.nonzero(near >= agreeing)
            for pair in range(0, len(firsts), TOGETHER):
                first, second = firsts[pair : pair + TOGETHER], seconds[pair : pair + TOGETHER]
                differ = ((BITS - near[first, second]) / 2).astype(np.int16)
                first, second = first + start, second + other
                found = np.einsum("nd,nd->n", vectors[first], vectors[second])
                kept = (first < second) & (found >= cosine + PER_BIT * differ - _ROUNDING)
                if kept.any():
                    yield Pairs(first[kept], second[kept], found[kept], differ[kept])


def different_bits(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Bits in which hashes differ, the second as it is or of the mirrored picture: float32 [n, BITS] -> int16 [n]."""
    products = first * second
    agreeing = np.maximum(products.sum(axis=1), (products * _MIRRORED).sum(axis=1))
    return ((BITS - agreeing) / 2).astype(np.int16)
