"""A sharpness-aware training step: its passes, and the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from .methods import METHODS, Gradients, Memory, Tensors, scheduled_rho
from .optimizers import base_optimizer, learning_rate_range
from .perturb import perturbation
from .settings import Settings, invalid_argument

# A batch, or a part of one -> its mean loss, regularisation included, and the model's outputs.
Forward = Callable[[Any], tuple[tf.Tensor, Any]]


class Step:
    """A training step: gradients, the method's formula, the optimizer.

    The perturbed pass sees the perturbed weights, and the state that the first pass began with, in place of the
    variables' values (`keras.StatelessScope`). So no variable is moved and moved back, both passes draw the same
    dropout masks, and whatever a pass updates (BatchNorm's statistics) comes from the first pass. A gradient that is
    not finite leaves every variable of model and optimizer as it was, except for a loss scale. A step that never
    perturbs is the optimizer's own, without this guard.

    Construct it under `strategy.scope()`, and call it inside `strategy.run()`. Gradients are summed over replicas, so
    the loss of a replica is its part of the global mean, which is also Keras' convention.

    Args:
        model: built; its trainable variables are trained.
        optimizer: built. It gets one gradient in each step, the final one, so clipping, weight decay and moving
            averages act once.

    Attributes:
        variables: what is kept between steps: the method's memory, and the count of gradient evaluations.
    """

    def __init__(self, settings: Settings, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.variables: list[keras.Variable] = []
        self._method = METHODS[settings.method]
        trained = model.trainable_variables
        self._kinds = ("first",) if settings.never_perturbs else self._method.gradients
        if self._method.rho_range:
            self._rates = learning_rate_range(optimizer)
            low, high = settings.rho_range
            if low < high and not self._rates[0] < self._rates[1]:
                low_name, high_name = self._method.rho_range
                raise invalid_argument(low_name, f"{high_name}, since the learning rate's range is not known", low)
        self._memory = {name: self._zeros(trained) for name in self._method.memory}
        if settings.accumulate > 1:
            self._sums = {kind: self._zeros(trained) for kind in self._kinds}
            self._examples, self._calls = self._zeros([optimizer.iterations, optimizer.iterations])
        # Every replica adds the same number, that of all replicas together.
        self._evaluations = keras.Variable(
            0, dtype="int64", trainable=False, aggregation="only_first_replica", name="sam_gradient_evaluations"
        )
        self.variables.append(self._evaluations)

    def _zeros(self, like: Sequence[keras.Variable]) -> list[keras.Variable]:
        made = [keras.Variable(tf.zeros(v.shape, v.dtype), trainable=False, name=f"sam_{v.name}") for v in like]
        self.variables += made
        return made

    @property
    def gradient_evaluations(self) -> int:
        """The number of examples that went forward and backward, over all passes, replicas and steps so far.

        An example counts once in a step without a perturbed pass and twice in one with it, also in steps that were
        skipped because a gradient was not finite.
        """
        return int(self._evaluations.numpy())

    @tf.autograph.experimental.do_not_convert
    def __call__(self, forward: Forward, batch: Any, count: tf.Tensor | None = None) -> tuple[tf.Tensor, Any]:
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
        own = size = tf.cast(count_examples(batch), "float32") if count is None else count
        if replicas() > 1:
            size = tf.distribute.get_replica_context().all_reduce("SUM", own)
        self._count_evaluations(size)
        if self.settings.is_base_step:
            with tf.GradientTape() as tape:
                loss, outputs = forward(batch)
                scaled = self.optimizer.scale_loss(loss)
            variables = self.model.trainable_variables
            self.optimizer.apply(tape.gradient(scaled, [variable.value for variable in variables]), variables)
            return loss, outputs
        before = self._state()
        passes = self._passes if self.settings.num_batch_splits == 1 else self._passes_by_part
        fraction = 1 / replicas() if count is None else tf.math.divide_no_nan(own, size)
        loss, outputs, gradients, used = passes(forward, batch, fraction)
        if replicas() > 1:
            gradients = tf.distribute.get_replica_context().all_reduce("SUM", gradients)
        self._update(gradients, used, size, before)
        return loss, outputs

    def _count_evaluations(self, size: tf.Tensor) -> None:
        evaluations = tf.cast(size, "int64")
        if not self.settings.never_perturbs:
            perturbed = 1 if self.settings.every == 1 else tf.cast(self._is_perturbed_step(), "int64")
            evaluations *= 1 + perturbed
        self._evaluations.assign_add(evaluations)

    def _state(self) -> Tensors:
        return [tf.convert_to_tensor(variable) for variable in self.model.non_trainable_variables]

    # The two passes

    def _passes(self, forward: Forward, batch: Any, fraction: Any) -> tuple[tf.Tensor, Any, Gradients, list[int]]:
        """Loss, outputs, unscaled gradients by kind, and the indices of the weights that have a gradient.

        Args:
            fraction: this replica's part of the mean over all replicas.
        """
        state = self._state()
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            loss, outputs = forward(batch)
            scaled = self.optimizer.scale_loss(loss)
        computed = tape.gradient(scaled, [variable.value for variable in variables])
        used = [index for index, gradient in enumerate(computed) if gradient is not None]
        gradients = {"first": self._unscaled([computed[index] for index in used])}
        if not self.settings.never_perturbs:
            first = along = gradients["first"]
            if self.settings.sync_perturbation and replicas() > 1:  # here, because no replica may reduce in a branch
                along = tf.distribute.get_replica_context().all_reduce("SUM", first)
            trained = [variables[index] for index in used]
            gradients["perturbed"] = self._on_perturbed_steps(
                lambda: self._perturbed_pass(
                    forward, batch, trained, self._perturbation(along, trained, used, fraction), state
                ),
                lambda: first,
            )
        return loss, outputs, {kind: gradients[kind] for kind in self._kinds}, used

    def _perturbed_pass(
        self, forward: Forward, batch: Any, trained: list[keras.Variable], shifts: Tensors, state: Tensors
    ) -> Tensors:
        """The unscaled gradient at the perturbed weights, from the same state as the first pass."""
        values = [variable + shift for variable, shift in zip(trained, shifts, strict=True)]
        mapping = zip([*trained, *self.model.non_trainable_variables], [*values, *state], strict=True)
        with tf.GradientTape() as tape:
            tape.watch(values)
            with keras.StatelessScope(state_mapping=list(mapping), collect_losses=True):
                loss, _ = forward(batch)
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, values)
        for variable, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"{variable.path} has a gradient at the weights but none at the perturbed weights. Expected a "
                    "model that reads its weights as Keras variables; rematerialisation and tf.recompute_grad don't."
                )
        return self._unscaled(gradients)

    def _perturbation(self, along: Tensors, trained: list[keras.Variable], used: list[int], fraction: Any) -> Tensors:
        """The difference between the perturbed weights and the weights."""
        settings = self.settings
        if self._method.direction:
            if not settings.sync_perturbation:  # a replica has its part of the mean; the memory is of the mean
                along = [tf.math.divide_no_nan(gradient, tf.cast(fraction, gradient.dtype)) for gradient in along]
            along = self._method.direction(settings, along, self._remembered(used))
        rho = settings.rho
        if self._method.rho_range:
            rho = scheduled_rho(*settings.rho_range, self.optimizer.learning_rate, *self._rates)
        return perturbation(along, trained, rho, settings.adaptive, settings.eta)

    def _remembered(self, used: list[int]) -> Memory:
        return {name: [variables[index] for index in used] for name, variables in self._memory.items()}

    def _on_perturbed_steps(self, then: Callable[[], Tensors], otherwise: Callable[[], Tensors]) -> Tensors:
        return then() if self.settings.every == 1 else tf.cond(self._is_perturbed_step(), then, otherwise)

    def _is_perturbed_step(self) -> tf.Tensor:
        return tf.equal(tf.convert_to_tensor(self.optimizer.iterations) % self.settings.every, 0)

    def _passes_by_part(
        self, forward: Forward, batch: Any, fraction: Any
    ) -> tuple[tf.Tensor, Any, Gradients, list[int]]:
        """`_passes` over the parts of a batch, split as `np.array_split` does, each weighted by its size.

        A loop, so that the activations of only one part are in memory.
        """
        batch = _map(tf.convert_to_tensor, batch)
        size, splits = count_examples(batch), int(self.settings.num_batch_splits)

        def run(index: Any) -> tuple[tf.Tensor, Any, Gradients, list[int]]:
            start = index * (size // splits) + tf.minimum(index, size % splits)
            end = start + size // splits + tf.cast(index < size % splits, "int32")
            part = _map(lambda tensor: tensor[start:end], batch)
            loss, outputs, gradients, used = self._passes(forward, part, fraction)
            # The last batch may leave a replica without examples.
            weight = tf.math.divide_no_nan(tf.cast(end - start, "float32"), tf.cast(size, "float32"))
            loss, gradients = tf.nest.map_structure(lambda each: tf.cast(weight, each.dtype) * each, (loss, gradients))
            return loss, outputs, gradients, used

        def add(index: tf.Tensor, sums: Any, collected: Any) -> Any:
            loss, outputs, gradients, _ = run(index)
            sums = tf.nest.map_structure(tf.add, sums, (loss, gradients))
            return index + 1, sums, tf.nest.map_structure(lambda array, o: array.write(index, o), collected, outputs)

        # The first part runs outside of the loop, to find out which weights are used and how the outputs look.
        loss, outputs, gradients, used = run(tf.constant(0))
        collected = tf.nest.map_structure(_begin_list, outputs)
        _, (loss, gradients), collected = tf.while_loop(
            lambda index, *_: index < tf.minimum(splits, size),
            add,
            (tf.constant(1), (loss, gradients), collected),
            parallel_iterations=1,
        )
        return loss, tf.nest.map_structure(lambda array: array.concat(), collected), gradients, used

    def _unscaled(self, gradients: Sequence[Any]) -> Tensors:
        dense = [tf.convert_to_tensor(gradient) for gradient in gradients]
        if not self._scales:
            return dense
        scale = self.optimizer.scale_loss(tf.ones(()))
        return [gradient / tf.cast(scale, gradient.dtype) for gradient in dense]

    @property
    def _scales(self) -> bool:
        return isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer) or bool(self.optimizer.loss_scale_factor)

    # The update

    def _update(self, gradients: Gradients, used: list[int], size: tf.Tensor, before: Tensors) -> None:
        """Skip the step, accumulate the gradients, or let the optimizer step."""
        calls = self.settings.accumulate
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in tf.nest.flatten(gradients)])
        last = tf.constant(True) if calls == 1 else tf.convert_to_tensor(self._calls) >= calls - 1

        def skip(gradients: Gradients, size: tf.Tensor, before: Tensors) -> None:
            for variable, value in zip(self.model.non_trainable_variables, before, strict=True):
                variable.assign(value)
            if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
                # A gradient of NaN makes it lower the loss scale and skip, whichever pass was not finite.
                self._apply([gradient * math.nan for gradient in gradients[self._kinds[0]]], used)

        def accumulate_gradients(gradients: Gradients, size: tf.Tensor, _: Tensors) -> None:
            for kind, tensors in gradients.items():
                for index, gradient in zip(used, tensors, strict=True):
                    self._sums[kind][index].assign_add(tf.cast(size, gradient.dtype) * gradient)
            self._examples.assign_add(size)
            self._calls.assign_add(1)

        def step(gradients: Gradients, size: tf.Tensor, before: Tensors) -> None:
            if calls > 1:
                accumulate_gradients(gradients, size, before)
                gradients = {
                    kind: [sums[index] / tf.cast(self._examples.value, sums[index].dtype) for index in used]
                    for kind, sums in self._sums.items()
                }
            self._apply(self._final_gradient(gradients, used), used)
            for variable in tf.nest.flatten([self._sums, self._examples, self._calls]) if calls > 1 else ():
                variable.assign(tf.zeros_like(variable.value))

        def choose(finite: tf.Tensor, last: tf.Tensor, run: Callable[[Callable[..., None]], None]) -> None:
            def use() -> Any:
                return run(step) if calls == 1 else tf.cond(last, lambda: run(step), lambda: run(accumulate_gradients))

            tf.cond(finite, use, lambda: run(skip))

        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            choose(finite, last, lambda branch: branch(gradients, size, before))
            return

        # The optimizer merges replicas, which a replica cannot do in its own branch, so all take the same one.
        def merged(strategy: Any, finite: Any, last: Any, *arguments: Any) -> None:
            one, other = (strategy.experimental_local_results(flag)[0] for flag in (finite, last))
            choose(one, other, lambda branch: strategy.extended.call_for_each_replica(branch, args=arguments))

        tf.distribute.get_replica_context().merge_call(merged, args=(finite, last, gradients, size, before))

    def _final_gradient(self, gradients: Gradients, used: list[int]) -> Tensors:
        """Apply the method's formula and update its memory."""
        if self.settings.never_perturbs:
            return gradients["first"]
        method, settings, memory = self._method, self.settings, self._remembered(used)

        def final() -> Tensors:
            gradient, changes = method.final_gradient(settings, gradients, memory)
            for name, values in changes.items():
                for variable, value in zip(memory[name], values, strict=True):
                    variable.assign(value)
            return gradient

        unperturbed = method.unperturbed_gradient
        if not unperturbed:
            return final()
        return self._on_perturbed_steps(final, lambda: unperturbed(settings, gradients, memory))

    def _apply(self, gradients: Tensors, used: list[int]) -> None:
        if replicas() > 1:
            # Keras clips on each replica and then sums. Clip the sum instead, and give each replica its part of it.
            clipped = base_optimizer(self.optimizer)._clip_gradients(gradients)
            gradients = [gradient / replicas() for gradient in clipped]
        if self._scales:
            gradients = [self.optimizer.scale_loss(gradient) for gradient in gradients]
        variables = self.model.trainable_variables
        by_index = dict(zip(used, gradients, strict=True))
        self.optimizer.apply([by_index.get(index) for index in range(len(variables))], variables)


def replicas() -> int:
    """The number of replicas of the current strategy."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def _map(function: Callable[[Any], Any], batch: Any) -> Any:
    return keras.tree.map_structure(lambda leaf: None if leaf is None else function(leaf), batch)


def count_examples(batch: Any) -> tf.Tensor:
    """int32 scalar: the length of the batch's tensors."""
    return tf.shape(next(tensor for tensor in keras.tree.flatten(batch) if tensor is not None))[0]


def _begin_list(first: tf.Tensor) -> tf.TensorArray:
    shape = [None, *first.shape[1:]]
    array = tf.TensorArray(first.dtype, 1, dynamic_size=True, infer_shape=False, element_shape=shape)
    return array.write(0, first)
