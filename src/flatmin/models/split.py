"""Splits a functional model into frozen layers and trained layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from flatmin.common.errors import InputError


def layer_index(base: keras.Model, at: str | int) -> int:
    """Return the index in `base.layers` of a layer that is given by its name or by its index.

    Raises:
        InputError: there is no such layer.
    """
    names = [layer.name for layer in base.layers]
    if isinstance(at, int) and 0 <= at < len(names):
        return at
    if at in names:
        return names.index(str(at))
    raise InputError(
        f"finetune.fine_tune_at: expected a layer of {base.name}: an index below {len(names)} or a name such as "
        f"{names[len(names) // 2]}; received {at!r}"
    )


def nodes(model: keras.Model) -> list[Any]:
    """Return a functional model's calls of layers and of operations such as `x + y`, from its input to its output."""
    return [node for depth in sorted(model._nodes_by_depth, reverse=True) for node in model._nodes_by_depth[depth]]


def split_model(model: keras.Model, layers: Sequence[keras.Layer], index: int) -> tuple[keras.Model, keras.Model]:
    """Split a functional model before `layers[index]` into two models that, one after the other, compute the same.

    The first model's outputs, the activations at the split, are all tensors that a frozen layer computes and a trained
    one uses: several, if the split is inside a residual block. An operation that is not in `layers`, such as pooling
    or `x + y`, belongs to the trained layers if it uses any of their outputs, otherwise to the frozen ones.

    Args:
        model: a functional model with one input.
        layers: the layers that `index` counts, in order; the model may have more.
        index: the first trained layer; 0 trains them all.

    Returns:
        The frozen layers and the trained layers, which share the variables of `model`.
    """
    if index == 0:
        return keras.Sequential([keras.Input(model.input.shape[1:]), keras.layers.Identity()], name="frozen"), model
    frozen_layers = {id(layer) for layer in layers[:index]}
    is_layer = {id(layer) for layer in layers}
    trained_tensors: set[int] = set()
    activations: dict[int, Any] = {}
    for node in nodes(model):
        operation = node.operation
        uses_trained = any(id(tensor) in trained_tensors for tensor in node.input_tensors)
        if id(operation) in frozen_layers or (id(operation) not in is_layer and not uses_trained):
            continue
        trained_tensors.update(id(tensor) for tensor in node.output_tensors)
        activations.update((id(tensor), tensor) for tensor in node.input_tensors if id(tensor) not in trained_tensors)
    at_split = list(activations.values())
    if len(at_split) == 1:
        at_split = at_split[0]
    return keras.Model(model.input, at_split, name="frozen"), keras.Model(at_split, model.output, name="body")
