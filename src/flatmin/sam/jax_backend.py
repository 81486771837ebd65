"""JAX: gradients of functions of values, inside Keras' stateless train step or outside of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import keras
from keras import ops

from .eager_backend import all_sum, check_devices, count_examples, over_parts, replicas, shares, unconverted
from .scope import PassScope

__all__ = ["all_sum", "check_devices", "count_examples", "over_parts", "replicas", "shares", "unconverted"]

COUNTS = "int32"  # JAX has no 64 bits unless told to
FUNCTIONAL = True  # a pass is a function of values, and returns what it assigns
STRAIGHT_THROUGH = False  # a gradient goes through a layer's assignment, as in Keras' own step on JAX


def gradients(call: Callable[[Any], Any], variables: list[keras.Variable], values: Any) -> tuple[Any, list[Any]]:
    """Differentiate `call(values) -> (loss, rest)`; values None stands for those of the variables."""
    values = [variable.value for variable in variables] if values is None else values
    (_, rest), computed = jax.value_and_grad(call, has_aux=True)(values)
    return rest, computed


def without_recomputation() -> Any:
    """Nothing: JAX recomputes from the values that it was given."""
    return contextlib.nullcontext()


def cond(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """What the branch that is taken returns. Neither changes a variable."""
    if isinstance(predicate, jax.core.Tracer):
        return jax.lax.cond(predicate, then, otherwise)
    return then() if predicate else otherwise()


def branch(predicate: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Run both branches, and let each variable that they change have the value of the one that is taken."""
    scopes = []
    for run in (then, otherwise):
        with PassScope() as scope:
            run()
        scopes.append(scope)
    changed = {id(variable): variable for scope in scopes for variable, _ in scope.updates()}
    for variable in changed.values():
        one, other = (scope.get_current_value(variable) for scope in scopes)
        variable.assign(ops.where(predicate, one, other))


def apply(optimizer: keras.optimizers.Optimizer, gradients: list[Any], variables: list[keras.Variable]) -> None:
    """One update, as Keras' step on JAX makes it."""
    values = [variable.value for variable in variables]
    before = [variable.value for variable in optimizer.variables]
    after = optimizer.stateless_apply(before, gradients, values)
    for group, new in zip((variables, optimizer.variables), after, strict=True):
        for variable, value in zip(group, new, strict=True):
            variable.assign(value)


def here() -> None:
    """Where an assignment is made; there is one place."""


def outside(strategy: Any) -> Any:
    """A context in which variables are made and read as outside of a compiled function."""
    return contextlib.nullcontext()


def evaluated() -> Any:
    """A context in which tensors have values, within a compiled function too."""
    return jax.ensure_compile_time_eval()


def train(model: Any, run: Callable[[Any], Any], state: Any, data: Any) -> tuple[Any, Any]:
    """Run a step that changes variables as the stateless one that Keras' trainer calls."""
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    mapping = [pair for group, values in zip(groups, state, strict=True) for pair in zip(group, values, strict=True)]
    with keras.StatelessScope(mapping) as scope:
        logs = run(data)
    return logs, tuple([scope.get_current_value(variable) for variable in group] for group in groups)


def choose_on_the_host(model: Any) -> None:
    """Replace the model's function of a training step by two programs, of which the host takes one for each batch.

    One has the perturbed pass of `every`, and the other has not. In one program with a branch XLA would compile the
    convolutions of that pass to slow loops on a CPU (jax issue 12868). Elsewhere the branch does not wait for the host.
    """
    is_one_program = model.settings.every == 1 or model.settings.never_perturbs or jax.default_backend() != "cpu"
    if is_one_program or model.run_eagerly or not model.jit_compile:
        return
    programs = [
        jax.jit(functools.partial(model.train_step, perturbed=perturbed), donate_argnums=0)
        for perturbed in (False, True)
    ]

    def step(state: Any, data: Any) -> Any:
        with keras.StatelessScope(list(zip(model.optimizer.variables, state[2], strict=True))):
            updates = int(ops.convert_to_tensor(model.optimizer.iterations))
        return programs[updates % model.settings.every == 0](state, data)

    model.train_function = model._make_function(step)


def delegate(model: Any, method: str, state: Any, data: Any) -> tuple[Any, Any]:
    """Call the inner model's `train_step` or `test_step`, and pass the wrapper's other state on as it is."""
    inner = model.model

    def groups(of: Any) -> list[list[keras.Variable]]:
        optimizer = [model.optimizer.variables] if len(state) == 4 else []
        last = [of.metrics_variables] if len(state) > 2 else []
        return [of.trainable_variables, of.non_trainable_variables, *optimizer, *last]

    flat = {id(v): x for group, xs in zip(groups(model), state, strict=True) for v, x in zip(group, xs, strict=True)}
    result, new = getattr(inner, method)(tuple([flat[id(v)] for v in group] for group in groups(inner)), data)
    if method == "predict_step":
        new = (state[0], new)
    flat |= {id(v): x for group, xs in zip(groups(inner), new, strict=True) for v, x in zip(group, xs, strict=True)}
    outer = tuple([flat[id(v)] for v in group] for group in groups(model))
    return result, outer[1] if method == "predict_step" else outer
