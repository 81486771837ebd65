"""PyTorch: autograd, and Python's own branches and loops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import torch

from .eager_backend import all_sum, check_devices, count_examples, over_parts, replicas, shares, unconverted

__all__ = ["all_sum", "check_devices", "count_examples", "over_parts", "replicas", "shares", "unconverted"]

COUNTS = "int64"
FUNCTIONAL = False  # a pass is a function of values, and returns what it assigns
STRAIGHT_THROUGH = True


def gradients(call: Callable[[Any], Any], variables: list[keras.Variable], values: Any) -> tuple[Any, list[Any]]:
    """Differentiate `call(values) -> (loss, rest)`; values None stands for those of the variables."""
    if values is None:
        sources = [variable.value for variable in variables]
    else:
        values = sources = [value.detach().requires_grad_() for value in values]
    with torch.enable_grad():
        loss, rest = call(values)
    computed = torch.autograd.grad(loss, sources, allow_unused=True)
    return keras.tree.map_structure(_detached, rest), list(computed)


def without_recomputation() -> Any:
    """A context in which checkpointing is refused: it would recompute at the variables, with their own weights."""
    return torch.autograd.graph.disable_saved_tensors_hooks(
        "A sharpness-aware step on PyTorch cannot recompute activations: the second pass would read unperturbed "
        "weights. Expected a model without keras.RematScope, keras.remat and torch.utils.checkpoint"
    )


def _detached(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    detached = leaf.detach()
    if hasattr(leaf, "_keras_mask"):
        detached._keras_mask = leaf._keras_mask
    return detached


def cond(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """What the branch that is taken returns."""
    return then() if bool(predicate) else otherwise()


def branch(predicate: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Run one of two branches, which change variables."""
    with torch.no_grad():
        cond(predicate, then, otherwise)


def apply(optimizer: keras.optimizers.Optimizer, gradients: list[Any], variables: list[keras.Variable]) -> None:
    """One update, as Keras' step on PyTorch makes it."""
    optimizer.apply(gradients, variables)


def here() -> None:
    """Where an assignment is made; there is one place."""


def outside(strategy: Any) -> Any:
    """A context in which variables are made and read as outside of a compiled function."""
    return contextlib.nullcontext()


def evaluated() -> Any:
    """A context in which tensors have values, within a compiled function too."""
    return torch.no_grad()
