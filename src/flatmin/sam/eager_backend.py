"""What JAX and PyTorch share: a batch has a size that Python knows, and there is one replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops


def unconverted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself."""
    return function


def count_examples(batch: Any) -> int:
    """The length of the batch's tensors."""
    return int(next(tensor for tensor in keras.tree.flatten(batch) if tensor is not None).shape[0])


def over_parts(
    run: Callable[[Any, Any, Any], tuple[Any, Any, Any]], add: Callable[[Any, Any], Any], batch: Any, splits: int
) -> tuple[Any, Any, Any]:
    """Call `run(part, weight, state)` for the parts of a batch, in order; see the module of TensorFlow."""
    size = count_examples(batch)
    sums, state, collected, start = None, None, [], 0
    for index in range(min(splits, size)):
        end = start + size // splits + (index < size % splits)
        part = keras.tree.map_structure(lambda leaf, s=start, e=end: None if leaf is None else leaf[s:e], batch)
        new, outputs, state = run(part, (end - start) / size, state)
        sums = new if sums is None else add(sums, new)
        collected.append(outputs)
        start = end
    outputs = keras.tree.map_structure(lambda *parts: ops.concatenate(parts), *collected)
    return sums, outputs, state


def replicas() -> int:
    """The number of replicas."""
    return 1


def check_devices(model: Any) -> None:
    """Refuse several devices."""
    if keras.distribution.distribution() is not None:
        raise ValueError("flatmin.sam runs on one device on this backend; expected no keras.distribution to be set")


def all_sum(tensors: Any) -> Any:
    """The sum over replicas."""
    return tensors


def shares(optimizer: keras.optimizers.Optimizer, gradients: list[Any]) -> list[Any]:
    """Each replica's share of gradients."""
    return gradients
