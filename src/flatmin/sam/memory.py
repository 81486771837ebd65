"""What a step keeps between calls, as variables that follow the weights they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

_RANDOM = "random"  # the key of a random layer's state


class _Table:
    """What must not be tracked as part of a layer: the model, and which variable holds what."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.scalars: dict[str, keras.Variable] = {}
        self.slots: dict[str, dict[int, keras.Variable]] = {}
        self.loaded: dict[str, np.ndarray] = {}  # of a file, for variables that do not exist yet
        self.initial: dict[str, float] = {}
        self.refused: ValueError | None = None


class Memory(keras.layers.Layer):
    """The state of a method: scalars, and slots that belong to one weight each.

    A slot is found by its weight, so freezing a layer or adding weights leaves the others' slots theirs. In a weights
    file a slot has its weight's position in the model. Values may be loaded before their variables exist. The file also
    has the states of the model's random layers, which Keras saves for no model, so that dropout goes on as it was.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__(name="sam_memory", trainable=False)
        self._table = _Table(model)
        self.built = True

    @property
    def weights(self) -> list[keras.Variable]:
        """None: it is state, and no part of what the model is."""
        return []

    def scalar(self, name: str, dtype: str, value: float = 0) -> keras.Variable:
        """The scalar of a name; made with `value`, or set to it, if there is none yet or it was reset."""
        is_reset = name not in self._table.initial
        self._table.initial.setdefault(name, value)
        if name in self._table.scalars and is_reset:
            self._table.scalars[name].assign(value)
        if name not in self._table.scalars:
            self._table.scalars[name] = self.add_weight(
                shape=(),
                initializer=keras.initializers.Constant(value),
                dtype=dtype,
                trainable=False,
                aggregation="only_first_replica",  # every replica assigns what is the same for all
                name=f"sam_{name}",
            )
            self._take_loaded(name, self._table.scalars[name])
        return self._table.scalars[name]

    def add_slots(self, name: str, weights: Sequence[keras.Variable]) -> None:
        """Make slots for the weights that have none of this name yet."""
        slots = self._table.slots.setdefault(name, {})
        for weight in weights:
            if id(weight) not in slots:
                slots[id(weight)] = self.add_weight(
                    shape=weight.shape,
                    initializer="zeros",
                    dtype=weight.dtype,
                    trainable=False,
                    name=f"sam_{weight.name}",
                )
                self._take_loaded(self._key(name, weight), slots[id(weight)])

    def slots(self, name: str, weights: Sequence[keras.Variable]) -> list[keras.Variable]:
        """The slots of weights."""
        slots = self._table.slots[name]
        for weight in weights:
            if id(weight) not in slots:
                raise ValueError(
                    f"{weight.path} became trainable after the step began: make the step, or compile, again"
                )
        return [slots[id(weight)] for weight in weights]

    def reset(self) -> None:
        """Forget everything, for another optimizer."""
        self._clear()
        self._table.initial = {}

    def _clear(self) -> None:
        self._table.loaded = {}
        for variable in self.variables:
            variable.assign(ops.zeros(variable.shape, variable.dtype))
        for name, value in self._table.initial.items():
            self._table.scalars[name].assign(value)

    def _key(self, name: str, weight: keras.Variable) -> str:
        position = next(i for i, each in enumerate(self._table.model.variables) if each is weight)
        return f"{name}.{position}"

    def _entries(self) -> dict[str, keras.Variable]:
        entries = dict(self._table.scalars)
        weights = {id(weight): weight for weight in self._table.model.variables}
        for name, slots in self._table.slots.items():
            entries |= {self._key(name, weights[key]): slot for key, slot in slots.items() if key in weights}
        saved = {id(weight) for weight in self._table.model.weights}
        states = [variable for key, variable in weights.items() if key not in saved]
        return entries | {f"{_RANDOM}.{position}": state for position, state in enumerate(states)}

    def _take_loaded(self, key: str, variable: keras.Variable) -> None:
        if key not in self._table.loaded:
            return
        value = self._table.loaded.pop(key)
        if tuple(value.shape) != tuple(variable.shape):
            raise ValueError(
                f"{key} of the weights file: expected shape {tuple(variable.shape)}, received {value.shape}"
            )
        variable.assign(value)

    def save_own_variables(self, store: Any) -> None:
        """Store everything for `save_weights` and `save`."""
        for key, variable in self._entries().items():
            store[key] = ops.convert_to_numpy(variable.value)
        for key, value in self._table.loaded.items():
            store[key] = value

    def load_own_variables(self, store: Any) -> None:
        """Load everything; a file that was written before training holds nothing, and everything is 0 then.

        Keras takes an error for a file of another layout, looks again, and may find nothing there. So `check_loaded`
        says what is wrong.
        """
        if self._table.refused is None:
            try:
                self._load(store)
            except ValueError as error:
                self._table.refused = error

    def check_loaded(self) -> None:
        """Raise what a file was refused for.

        Raises:
            ValueError: the file holds the state of another method, which would be forgotten, or of another model.
        """
        refused, self._table.refused = self._table.refused, None
        if refused is not None:
            raise refused

    def _load(self, store: Any) -> None:
        self._clear()
        self._table.loaded = {key: np.asarray(store[key]) for key in store.keys()}  # noqa: SIM118 - not a dict
        entries = self._entries()
        names, own = ({key.partition(".")[0] for key in each} - {_RANDOM} for each in (self._table.loaded, entries))
        if own and names and names != own:
            raise ValueError(
                f"The weights file holds the sharpness-aware state {', '.join(sorted(names))}. Expected "
                f"{', '.join(sorted(own))}: make the model with the settings that the file was written with"
            )
        for key, variable in entries.items():
            self._take_loaded(key, variable)
