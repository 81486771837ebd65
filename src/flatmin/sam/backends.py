"""What a step needs of a backend: gradients, branches, parts of a batch, replicas. Its modules have equal names.

gradients(call, variables, values) -> (what `call` returns beside the loss, a gradient for each variable, or None)
cond(predicate, then, otherwise)   -> what the one that is taken returns; neither changes a variable
branch(predicate, then, otherwise) -> None; each changes variables
over_parts(run, batch, splits)     -> what `run` gives for the parts of a batch, summed and joined
without_recomputation()            -> a context that refuses what would recompute a pass at other weights
apply(optimizer, gradients, variables), count_examples(batch), replicas(), all_sum(tensor), outside(), ...

Where FUNCTIONAL is true, as on JAX, a training step takes and returns the values of variables, so there are also train,
delegate and choose_on_the_host.
"""

from __future__ import annotations

import importlib
from typing import Any

import keras

NAMES = ("tensorflow", "jax", "torch")


def load() -> Any:
    """The module of the backend that Keras runs on.

    Raises:
        RuntimeError: it has no gradients.
    """
    name = keras.config.backend()
    if name not in NAMES:
        raise RuntimeError(f"flatmin.sam: expected one of Keras' backends {', '.join(NAMES)}, found {name}")
    return importlib.import_module(f".{name}_backend", __package__)
