"""A sharpness-aware training step: its passes, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from . import backends
from .memory import Memory
from .methods import METHODS, Gradients, Tensors, at_step, norm, scheduled_rho
from .optimizers import base_optimizer, learning_rate_range, scales_loss
from .perturb import perturbation
from .scope import PassScope
from .settings import Settings, invalid_argument

# A batch, or a part of one -> its mean loss, regularisation included, and the model's outputs.
Forward = Callable[[Any], tuple[Any, Any]]


class Outcome(NamedTuple):
    """What a step did: the first pass's loss and outputs, and scalars of this step.

    Attributes:
        loss, perturbed_loss: mean losses; without a perturbed pass they are equal.
        gradient_norm: of the first gradient, over all weights.
        perturbed: 1 in a step with a perturbed pass, else 0.
        skipped: 1 in a step that was skipped because a gradient was not finite, else 0.
    """

    loss: Any
    outputs: Any
    perturbed_loss: Any = 0.0
    gradient_norm: Any = 0.0
    perturbed: Any = 0.0
    skipped: Any = 0.0


class Step:
    """A training step: gradients, the method's formula, the optimizer.

    Both passes see the values that all variables have before the step, the second one perturbed weights in their place
    (`PassScope`). So no variable is moved and moved back, both draw the same dropout masks, and whatever a pass updates
    (BatchNorm's statistics) is the first pass's. A gradient that is not finite leaves every variable of model and
    optimizer as it was, except for a loss scale. A step that never perturbs is the optimizer's own, without this guard.

    On TensorFlow construct it under `strategy.scope()`, and call it inside `strategy.run()`. Gradients are summed over
    replicas, so the loss of a replica is its part of the global mean, which is also Keras' convention. In a function of
    JAX that is compiled, use `stateless_call`.

    Args:
        model: built; its trainable variables are trained.
        optimizer: built. It gets one gradient in each step, the final one, so clipping, weight decay and moving
            averages act once.
        memory: of an earlier step of this model and optimizer.

    Attributes:
        variables: what is kept between steps: the method's memory, and the counts of gradient evaluations and skipped
            steps.

    Example:
        >>> import keras
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="ones")])
        >>> optimizer = keras.optimizers.SGD(0.1)
        >>> optimizer.build(model.trainable_variables)
        >>> step = Step(Settings(rho=0.05), model, optimizer)
        >>> def forward(batch):
        ...     outputs = model(batch[0], training=True)
        ...     return keras.ops.mean((outputs - batch[1]) ** 2), outputs
        >>> loss, outputs = step(forward, (keras.ops.ones((4, 3)), keras.ops.zeros((4, 1))))
        >>> float(loss), step.gradient_evaluations
        (9.0, 8)
    """

    def __init__(
        self,
        settings: Settings,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        memory: Memory | None = None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.memory = Memory(model) if memory is None else memory
        self._backend = backends.load()
        self._method = METHODS[settings.method]
        self._perturbed: bool | None = None
        self._kinds = ("first",) if settings.never_perturbs else self._method.gradients
        base = base_optimizer(optimizer)
        if self._method.added and (
            base.gradient_accumulation_steps or isinstance(base, keras.optimizers.MultiOptimizer)
        ):
            expected = "an optimizer with one learning rate and no gradient_accumulation_steps (use `accumulate`)"
            raise invalid_argument("optimizer", f"{expected} with method={settings.method!r}", optimizer)
        self.add_slots()
        if settings.accumulate > 1:
            self._calls = self.memory.scalar("calls", "int32")
            self._examples = self.memory.scalar("examples", "float32")
        if settings.follows_rate:
            rates = zip(("rate_low", "rate_high"), learning_rate_range(optimizer, settings), strict=True)
            kept = [self.memory.scalar(name, "float32", rate) for name, rate in rates]
            given = (settings.rate_min, settings.rate_max)  # these count, whatever was kept or is loaded
            self._rates = [rate if own is None else own for own, rate in zip(given, kept, strict=True)]
        self._skipped = self.memory.scalar("skipped", self._backend.COUNTS)
        self._evaluations = self.memory.scalar("gradient_evaluations", self._backend.COUNTS)

    def add_slots(self) -> None:
        """Make the memory of weights that became trainable since."""
        weights = [v for v in self.model.trainable_variables if not v.overwrite_with_gradient]
        sums = [f"sum_{kind}" for kind in self._kinds] if self.settings.accumulate > 1 else []
        for name in (*self._method.memory, *sums):
            self.memory.add_slots(name, weights)

    def check_rate(self) -> None:
        """Refuse a learning rate above the highest one that is known, where rho follows it.

        Raises:
            ValueError: see above.
        """
        values = [ops.convert_to_tensor(each) for each in (self.optimizer.learning_rate, self._rates[1])]
        rate, high = (float(ops.convert_to_numpy(value)) for value in values)
        if rate > high * (1 + 1e-6):
            expected = f"the highest learning rate, since it rose from {high:g} to {rate:g}"
            raise invalid_argument("rate_max", expected, None)

    @property
    def variables(self) -> list[keras.Variable]:
        return self.memory.variables

    @property
    def gradient_evaluations(self) -> int:
        """The number of examples that went forward and backward, over all passes, replicas and steps so far.

        An example counts once in a step without a perturbed pass and twice in one with it, also in steps that were
        skipped because a gradient was not finite.
        """
        return int(ops.convert_to_numpy(self._evaluations.value))

    @property
    def skipped_steps(self) -> int:
        """The number of steps so far that were skipped because a gradient was not finite."""
        return int(ops.convert_to_numpy(self._skipped.value))

    def __call__(self, forward: Forward, batch: Any, count: Any = None) -> tuple[Any, Any]:
        """Train on one batch.

        Args:
            forward: is called with the batch, or with parts of it, in training mode.
            batch: nested tensors with the examples along the first axis; None is passed through.
            count: float32 scalar, the number of real examples on this replica. The replica's loss is then their mean,
                times their part of all replicas' real examples. None: all examples are real, and the loss is the mean
                divided by the number of replicas.

        Returns:
            the first pass's loss, and its outputs in the batch's order.
        """
        outcome = self.run(forward, batch, count)
        return outcome.loss, outcome.outputs

    def run(self, forward: Forward, batch: Any, count: Any = None, perturbed: bool | None = None) -> Outcome:
        """Train on one batch, as a call does, and say more of what happened.

        Args:
            perturbed: see `stateless_call`.
        """
        self._perturbed = perturbed
        return self._backend.unconverted(self._run)(forward, batch, count)

    def _run(self, forward: Forward, batch: Any, count: Any) -> Outcome:
        examples = self._backend.count_examples(batch)
        own = ops.cast(examples, "float32") if count is None else count
        size = self._backend.all_sum(own)
        self._count_evaluations(size)
        if self.settings.is_base_step:
            return self._base_step(forward, batch)
        fraction = 1 / self._backend.replicas() if count is None else ops.divide_no_nan(own, size)
        passes = self._passes if self.settings.num_batch_splits == 1 else self._passes_by_part
        done = passes(forward, batch, fraction)
        perturbed = 0.0 if self.settings.never_perturbs else ops.cast(self._is_perturbed_step(), "float32")
        gradients = {kind: self._backend.all_sum(done.sums.gradients[kind]) for kind in self._kinds}
        finite = ops.all(ops.stack([ops.all(ops.isfinite(each)) for each in keras.tree.flatten(gradients)]))
        self._update(finite, done, gradients, size)
        return Outcome(
            done.sums.loss,
            done.outputs,
            done.sums.perturbed_loss,
            done.sums.gradient_norm,
            perturbed,
            1.0 - ops.cast(finite, "float32"),
        )

    def _count_evaluations(self, size: Any) -> None:
        evaluations = ops.cast(size, self._backend.COUNTS)
        if not self.settings.never_perturbs:
            evaluations *= 1 + ops.cast(self._is_perturbed_step(), self._backend.COUNTS)
        self._evaluations.assign_add(evaluations)

    def _base_step(self, forward: Forward, batch: Any) -> Outcome:
        """The optimizer's own step."""
        variables = self.model.trainable_variables
        if self._backend.FUNCTIONAL:
            done, gradients = self._pass(forward, batch, variables)
            for variable, value in done.updates:
                variable.assign(value)
            loss, outputs = done.loss, done.outputs
        else:

            def call(_: Any) -> tuple[Any, Any]:
                loss, outputs = forward(batch)
                return self.optimizer.scale_loss(loss), (loss, outputs)

            (loss, outputs), gradients = self._backend.gradients(call, variables, None)
        self._backend.apply(self.optimizer, gradients, variables)
        return Outcome(loss, outputs)

    # The two passes

    def _pass(
        self, forward: Forward, batch: Any, variables: list[keras.Variable], values: Any = None, state: Any = ()
    ) -> tuple[_Pass, list[Any]]:
        """Go forward and backward; no variable changes. The gradients are of the scaled loss.

        Args:
            values: the values of `variables` to go through, or None for their own.
            state: pairs of a variable and its value.
        """
        changed: list[keras.Variable] = []

        def call(values: Any) -> tuple[Any, Any]:
            given = [*state, *([] if values is None else zip(variables, values, strict=True))]
            with PassScope(given) as scope, self._backend.without_recomputation():
                loss, outputs = forward(batch)
                scaled = self.optimizer.scale_loss(loss)
            changed[:] = [variable for variable, _ in scope.updates()]
            return scaled, (loss, outputs, [value for _, value in scope.updates()])

        (loss, outputs, updates), gradients = self._backend.gradients(call, variables, values)
        return _Pass(loss, outputs, list(zip(changed, updates, strict=True))), gradients

    def _passes(self, forward: Forward, batch: Any, fraction: Any, state: Any = ()) -> _Passes:
        """The first pass, and the perturbed one where this step has one.

        Args:
            fraction: this replica's part of the mean over all replicas.
        """
        variables = self.model.trainable_variables
        first, computed = self._pass(forward, batch, variables, state=state)
        used = [(v, gradient) for v, gradient in zip(variables, computed, strict=True) if gradient is not None]
        weights = [v for v, _ in used if not v.overwrite_with_gradient]
        overwritten = [v for v, _ in used if v.overwrite_with_gradient]
        gradients = {"first": self._unscaled([gradient for v, gradient in used if not v.overwrite_with_gradient])}
        perturbed_loss, length = first.loss, ops.divide_no_nan(norm(gradients["first"]), fraction)
        if not self.settings.never_perturbs:
            along = gradients["first"]
            if self.settings.sync_perturbation:  # here, because no replica may reduce in a branch
                along = self._backend.all_sum(along)

            def perturbed_pass() -> tuple[Any, Tensors]:
                shifts = self._perturbation(along, weights, fraction)
                return self._perturbed_pass(forward, batch, weights, shifts, state)

            perturbed_loss, gradients["perturbed"] = self._on_perturbed_steps(
                perturbed_pass,
                lambda: (first.loss, gradients["first"]),
            )
        sums = _Sums(first.loss, perturbed_loss, length, gradients, [g for v, g in used if v.overwrite_with_gradient])
        return _Passes(sums, first.outputs, first.updates, weights, overwritten)

    def _perturbed_pass(
        self, forward: Forward, batch: Any, weights: list[keras.Variable], shifts: Sequence[Any], state: Any
    ) -> tuple[Any, Tensors]:
        """The loss and the unscaled gradient at the perturbed weights."""
        values = [
            ops.cast(variable.value, variable.dtype) if shift is None else variable + shift
            for variable, shift in zip(weights, shifts, strict=True)
        ]
        done, gradients = self._pass(forward, batch, weights, values, state)
        for variable, gradient in zip(weights, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"{variable.path} has a gradient at the weights but none at the perturbed weights. Expected a "
                    "model that reads its weights as Keras variables in the step's own graph: remove tf.function from "
                    "`forward` and from the model's `call` (the step is compiled as a whole), rematerialisation, "
                    "tf.recompute_grad and TorchModuleWrapper"
                )
        return done.loss, self._unscaled(gradients)

    def _perturbation(self, along: Tensors, weights: list[keras.Variable], fraction: Any) -> list[Any]:
        """The difference between the perturbed weights and the weights."""
        settings, method = self.settings, self._method
        # A replica has its part of the mean; memory and radius are of the mean.
        if (method.direction or method.radius) and not settings.sync_perturbation:
            along = [ops.divide_no_nan(gradient, ops.cast(fraction, gradient.dtype)) for gradient in along]
        if method.direction:
            along = method.direction(settings, along, self._remembered(weights))
        step = ops.convert_to_tensor(self.optimizer.iterations)
        rho = at_step(settings.rho, step)
        if settings.follows_rate:
            low, high = (ops.convert_to_tensor(rate) for rate in self._rates)
            rho = scheduled_rho(*settings.rho_range, self.optimizer.learning_rate, low, high)
        elif radius := method.radius:
            rho = lambda length: radius(settings, length, step)  # noqa: E731
        return perturbation(along, weights, rho, settings.adaptive, settings.eta, settings.perturb)

    def _remembered(self, weights: list[keras.Variable]) -> dict[str, Tensors]:
        slots = {name: self.memory.slots(name, weights) for name in self._method.memory}
        return {name: [ops.convert_to_tensor(slot) for slot in each] for name, each in slots.items()}

    def _on_perturbed_steps(self, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        now = self._is_perturbed_step()
        if isinstance(now, bool):
            return then() if now else otherwise()
        return self._backend.cond(now, then, otherwise)

    def _is_perturbed_step(self) -> Any:
        """Whether this step has a perturbed pass: a bool where that is known before the step runs."""
        if self.settings.every == 1:
            return True
        if self._perturbed is not None:
            return self._perturbed
        return ops.equal(ops.convert_to_tensor(self.optimizer.iterations) % self.settings.every, 0)

    def _passes_by_part(self, forward: Forward, batch: Any, fraction: Any) -> _Passes:
        """`_passes` over the parts of a batch, split as `np.array_split` does, each weighted by its size."""
        found: list[_Passes] = []

        def run(part: Any, weight: Any, values: Any) -> tuple[Any, Any, Any]:
            state = [] if values is None else zip([v for v, _ in found[0].updates], values, strict=True)
            done = self._passes(forward, part, fraction, list(state))
            found.append(done)
            overwrites = done.sums.overwrites
            sums = keras.tree.map_structure(lambda each: ops.cast(weight, each.dtype) * each, tuple(done.sums[:-1]))
            after = {id(variable): value for variable, value in done.updates}
            return (*sums, overwrites), done.outputs, [after[id(variable)] for variable, _ in found[0].updates]

        def add(one: Any, other: Any) -> Any:
            sums = keras.tree.map_structure(ops.add, one[:-1], other[:-1])
            return (*sums, keras.tree.map_structure(ops.maximum, one[-1], other[-1]))

        sums, outputs, state = self._backend.over_parts(run, add, batch, int(self.settings.num_batch_splits))
        first = found[0]
        updates = [(variable, value) for (variable, _), value in zip(first.updates, state, strict=True)]
        return _Passes(_Sums(*sums), outputs, updates, first.weights, first.overwritten)

    def _unscaled(self, gradients: Sequence[Any]) -> Tensors:
        if not scales_loss(self.optimizer):
            return list(gradients)
        scale = self.optimizer.scale_loss(ops.ones(()))
        return [gradient / ops.cast(scale, gradient.dtype) for gradient in gradients]

    # The update

    def _update(self, finite: Any, done: _Passes, gradients: Gradients, size: Any) -> None:
        """Skip the step, accumulate the gradients, or let the optimizer step."""
        calls = self.settings.accumulate

        def skip() -> None:
            self._skipped.assign_add(1)
            if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
                # A gradient of NaN makes it lower the loss scale and skip, whichever pass was not finite.
                self._apply([gradient * math.nan for gradient in gradients[self._kinds[0]]], done)

        def use() -> None:
            for variable, value in done.updates:
                variable.assign(value)
            if calls == 1:
                self._apply(self._final_gradient(gradients, done.weights), done)
                return
            last = ops.convert_to_tensor(self._calls) >= calls - 1
            self._add_to_sums(gradients, done.weights, size)
            self._backend.branch(last, lambda: self._step_on_sums(done), lambda: None)

        self._backend.branch(finite, use, skip)

    def _add_to_sums(self, gradients: Gradients, weights: list[keras.Variable], size: Any) -> None:
        for kind, tensors in gradients.items():
            for sum_, gradient in zip(self.memory.slots(f"sum_{kind}", weights), tensors, strict=True):
                sum_.assign_add(ops.cast(size, gradient.dtype) * gradient)
        self._examples.assign_add(size)
        self._calls.assign_add(1)

    def _step_on_sums(self, done: _Passes) -> None:
        sums = {kind: self.memory.slots(f"sum_{kind}", done.weights) for kind in self._kinds}
        examples = ops.convert_to_tensor(self._examples)
        means = {kind: [each / ops.cast(examples, each.dtype) for each in slots] for kind, slots in sums.items()}
        self._apply(self._final_gradient(means, done.weights), done)
        for variable in [each for slots in sums.values() for each in slots] + [self._examples, self._calls]:
            variable.assign(ops.zeros(variable.shape, variable.dtype))

    def _final_gradient(self, gradients: Gradients, weights: list[keras.Variable]) -> Tensors:
        """Apply the method's formula, update its memory, and take what goes around the optimizer."""
        if self.settings.never_perturbs:
            return gradients["first"]
        method, settings, memory = self._method, self.settings, self._remembered(weights)
        if method.added:  # before the optimizer, whose averages and constraints then see all
            rate = self.optimizer.learning_rate
            for variable, added in zip(weights, method.added(settings, gradients), strict=True):
                variable.assign_sub(ops.cast(rate, added.dtype) * added)
        final, changes = method.final_gradient(settings, gradients, memory)
        if method.unperturbed_gradient and settings.every > 1:
            unperturbed = method.unperturbed_gradient(settings, gradients, memory)
            now = self._is_perturbed_step()
            final = [ops.where(now, one, other) for one, other in zip(final, unperturbed, strict=True)]
            changes = {
                name: [ops.where(now, value, old) for value, old in zip(values, memory[name], strict=True)]
                for name, values in changes.items()
            }
        for name, values in changes.items():
            for slot, value in zip(self.memory.slots(name, weights), values, strict=True):
                slot.assign(value)
        return final

    def _apply(self, gradients: Tensors, done: _Passes) -> None:
        """Let the optimizer step along gradients of the weights."""
        gradients = self._backend.shares(self.optimizer, gradients)
        if scales_loss(self.optimizer):
            gradients = [self.optimizer.scale_loss(gradient) for gradient in gradients]
        pairs = [*zip(done.weights, gradients, strict=True), *zip(done.overwritten, done.sums.overwrites, strict=True)]
        by_variable = {id(variable): gradient for variable, gradient in pairs}
        variables = self.model.trainable_variables
        self._backend.apply(self.optimizer, [by_variable.get(id(variable)) for variable in variables], variables)

    # Without side effects

    @property
    def state(self) -> tuple[list[Any], ...]:
        """Copies of the variables of model, optimizer and memory: what `stateless_call` reads and returns."""
        return tuple([ops.copy(variable.value) for variable in group] for group in self._groups())

    @state.setter
    def state(self, state: tuple[list[Any], ...]) -> None:
        for group, values in zip(self._groups(), state, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)

    def _groups(self) -> tuple[list[keras.Variable], ...]:
        return self.model.variables, self.optimizer.variables, self.memory.variables

    def stateless_call(
        self, state: Any, forward: Forward, batch: Any, count: Any = None, perturbed: bool | None = None
    ) -> tuple[Any, Any, Any]:
        """Train on one batch without changing a variable, as in a function that JAX compiles.

        Args:
            state: as `state` or the last call gave it; forward, batch and count are those of a call.
            perturbed: whether `optimizer.iterations` is a multiple of `every`, so that one program is compiled with a
                perturbed pass and one without. None: one program has a branch, in which XLA's convolutions are slow on
                a CPU.

        Returns:
            loss, outputs, and the new state.

        Raises:
            ValueError: `forward` changes a variable of another model, which would stay as it is.
            RuntimeError: on TensorFlow, whose optimizers change variables.
        """
        if keras.config.backend() == "tensorflow":
            raise RuntimeError("stateless_call: TensorFlow's optimizers change variables. Call the step in tf.function")
        groups = self._groups()
        mapping = [  # copies, because PyTorch's optimizers write into what they get
            (variable, ops.copy(value))
            for group, values in zip(groups, state, strict=True)
            for variable, value in zip(group, values, strict=True)
        ]
        with PassScope(mapping) as scope:
            outcome = self.run(forward, batch, count, perturbed)
        known = {id(variable) for variable, _ in mapping}
        for variable, _ in scope.updates():
            if id(variable) not in known:
                raise ValueError(
                    f"`forward` changes {variable.path}, which is not in the state. Expected a model that contains "
                    "every layer that `forward` calls"
                )
        new = tuple([scope.get_current_value(variable) for variable in group] for group in groups)
        return outcome.loss, outcome.outputs, new


class _Pass(NamedTuple):
    """One pass forward: its loss and outputs, and what it assigned."""

    loss: Any
    outputs: Any
    updates: list[tuple[keras.Variable, Any]]


class _Sums(NamedTuple):
    """What the parts of a batch add up to; next values of variables that have no gradient come last."""

    loss: Any
    perturbed_loss: Any
    gradient_norm: Any
    gradients: Gradients
    overwrites: Tensors


class _Passes(NamedTuple):
    """What both passes of a step gave, and the variables that the gradients and the overwrites are of."""

    sums: _Sums
    outputs: Any
    updates: list[tuple[keras.Variable, Any]]
    weights: list[keras.Variable]
    overwritten: list[keras.Variable]
