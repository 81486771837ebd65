"""The scope of one pass: it sees given values in place of variables, and records what the pass assigns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from . import backends


class PassScope(keras.StatelessScope):
    """No variable is changed within it. Inside another scope it sees that one's values and losses.

    A layer that assigns a trained weight, as `SpectralNormalization` does, changes its value but not its gradient, as
    in Keras' own step on TensorFlow and PyTorch; on JAX the gradient goes through the assignment.
    """

    def __init__(self, mapping: Sequence[tuple[keras.Variable, Any]] = ()) -> None:
        self.state_mapping: dict[int, Any]
        super().__init__(mapping, collect_losses=True)
        self._backend = backends.load()
        self._changed: dict[int, keras.Variable] = {}

    def __enter__(self) -> PassScope:
        super().__enter__()
        if self.original_scope is not None:
            self.state_mapping = {**self.original_scope.state_mapping, **self.state_mapping}
            self.losses = list(self.original_scope.losses)
        self._place = self._backend.here()
        return self

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value within the scope. Keras takes None, for a variable outside of the mapping, for a missing weight."""
        value = super().get_current_value(variable)
        return variable._value if value is None else value

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Record an assignment."""
        variable, value = update
        if self._backend.here() is not self._place:
            raise ValueError(
                f"{variable.path} is assigned within a function of its own, as of tf.function, tf.map_fn or "
                "tf.while_loop inside the model or `forward`. Expected a model that runs in the step's own graph: "
                "remove tf.function, since the training step is compiled as a whole"
            )
        if variable.trainable and self._backend.STRAIGHT_THROUGH:
            current = ops.cast(variable.value, variable.dtype)
            value = current + ops.stop_gradient(value - current)
        self._changed[id(variable)] = variable
        super().add_update((variable, value))

    def updates(self) -> list[tuple[keras.Variable, Any]]:
        """The variables that were assigned, and their values."""
        return [(variable, self.state_mapping[key]) for key, variable in self._changed.items()]
