"""Whether a compiled loss is a mean over examples, so that parts of a batch may be averaged."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops


def is_mean(loss: Any, y: Any, outputs: Any, sample_weight: Any) -> bool:
    """Whether the loss of four examples is the mean of those of two and two. Examples are made up in the given shapes.

    Args:
        loss: (y, outputs, sample_weight) -> scalar, or None. Whatever it keeps stays as it is.
        y, outputs, sample_weight: tensors of any batch size, or without values.
    """
    leaves = [leaf for leaf in keras.tree.flatten((y, outputs, sample_weight)) if leaf is not None]
    if loss is None or not all(isinstance(getattr(leaf, "shape", None), tuple) or _has_rank(leaf) for leaf in leaves):
        return True
    random = np.random.default_rng(0)

    def made_up(leaf: Any) -> Any:
        if leaf is None:
            return None
        shape = (4, *(each or 2 for each in tuple(leaf.shape)[1:]))
        is_float = "float" in keras.backend.standardize_dtype(leaf.dtype)
        return random.uniform(0.1, 0.9, shape) if is_float else np.zeros(shape)

    def value(start: int, end: int) -> float:
        parts = [
            keras.tree.map_structure(
                lambda a, leaf: None if a is None else ops.convert_to_tensor(a[start:end], leaf.dtype), *pair
            )
            for pair in zip(examples, (y, outputs, sample_weight), strict=True)
        ]
        kept = [variable for metric in getattr(loss, "metrics", ()) for variable in metric.variables]
        with keras.StatelessScope([(variable, ops.zeros(variable.shape, variable.dtype)) for variable in kept]):
            return float(ops.convert_to_numpy(ops.cast(loss(*parts), "float32")))

    examples = [keras.tree.map_structure(made_up, each) for each in (y, outputs)]
    weight = np.array([1.0, 1.0, 9.0, 9.0])
    examples.append(
        keras.tree.map_structure(
            lambda leaf: None if leaf is None else weight.reshape(4, *[1] * (len(leaf.shape) - 1)), sample_weight
        )
    )
    whole, halves = value(0, 4), (value(0, 2) + value(2, 4)) / 2
    return not np.isfinite([whole, halves]).all() or abs(whole - halves) <= 0.01 * abs(whole) + 1e-6


def _has_rank(leaf: Any) -> bool:
    return getattr(getattr(leaf, "shape", None), "rank", None) is not None
