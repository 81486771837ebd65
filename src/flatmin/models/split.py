"""Splits a functional model into frozen and trained layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from flatmin.common.errors import InputError


def layer_index(base: keras.Model, at: str | int) -> int:
    """The index in `base.layers` of the layer named, or given by its index.

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
    """A functional model's calls of layers and of operations such as `x + y`, from images to output."""
    return [node for depth in sorted(model._nodes_by_depth, reverse=True) for node in model._nodes_by_depth[depth]]


def split_model(model: keras.Model, layers: Sequence[keras.Layer], index: int) -> tuple[keras.Model, keras.Model]:
    """Cut a functional model before `layers[index]` into two that make the same of an image in a row.

    The tensors that frozen layers make and trained ones use are the boundary; a cut inside a residual block has
    several. What is not in `layers`, such as pooling or `x + y`, is trained where anything it uses is.
    """
    if index == 0:
        return keras.Sequential([keras.Input(model.input.shape[1:]), keras.layers.Identity()], name="frozen"), model
    frozen_layers = {id(layer) for layer in layers[:index]}
    is_layer = {id(layer) for layer in layers}
    trained: set[int] = set()
    boundary: dict[int, Any] = {}
    for node in nodes(model):
        operation = node.operation
        uses_trained = any(id(tensor) in trained for tensor in node.input_tensors)
        if id(operation) in frozen_layers or (id(operation) not in is_layer and not uses_trained):
            continue
        trained.update(id(tensor) for tensor in node.output_tensors)
        boundary.update((id(tensor), tensor) for tensor in node.input_tensors if id(tensor) not in trained)
    tensors = list(boundary.values())
    crossing = tensors[0] if len(tensors) == 1 else tensors
    return keras.Model(model.input, crossing, name="frozen"), keras.Model(crossing, model.output, name="body")
