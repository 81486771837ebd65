"""Sharpness-aware minimization for Keras 3: steps along the gradient of the worst point nearby.

Two doors to one step. `SharpnessAwareMinimization` wraps a model for `compile` and `fit`; `Step` is for a loop of
one's own. Stands alone: it knows Keras and TensorFlow, no data set and no stage.

    model = SharpnessAwareMinimization(keras.applications.ResNet50(), rho=0.05)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(images, labels)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import keras
import tensorflow as tf

Tensors = list[Any]
Gradients = dict[str, Tensors]  # the clean pass's, the perturbed pass's, or both
# Part of a batch -> its mean loss, regularisation included, and the model's outputs.
Forward = Callable[[Any], tuple[tf.Tensor, Any]]

# A number; None until it is given the method's default.
Setting = Any

# The methods, and the settings that some have and others don't, with the papers' defaults.
DEFAULTS: dict[str, dict[str, float]] = {
    "sam": {},
    "gsam": {"alpha": 0.4},
    "wsam": {"gamma": 0.9},
    "looksam": {"alpha": 0.7},
    "friendly": {"sigma": 1.0, "friendly_lambda": 0.9},
}
METHODS = tuple(DEFAULTS)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a step does. Every None takes the paper's default.

    Args:
        rho: how far the worst point nearby is looked for, >= 0; 0 is the base optimizer and nothing else.
        method: one of `METHODS`; `gap_direction` and the like have their formulas.
        adaptive: measure that distance relative to each weight (`perturbation`); rho is about ten times as large then.
        eta: added to |w| there, >= 0.
        every: the first step and each `every`-th after it are sharpness-aware, the others plain (LookSAM: reuse).
        num_batch_splits: m-sharpness (Foret 2021, section 4.1): each part of the batch has its own perturbation.
        accumulate: average the gradients of so many calls before the optimizer steps.
        sync_perturbation: one perturbation from all replicas' gradient; else each replica has its own.
        alpha: gsam: how strongly the surrogate gap is descended; looksam: how much of the orthogonal part is reused.
        gamma: wsam: the weight of sharpness, in [0, 1); 0 is the base optimizer, 0.5 is sam.
        rho_min, rho_max: gsam: rho goes between them with the learning rate; rho by default.
        sigma, friendly_lambda: friendly: how much of the gradient's moving average is taken off; its decay, in [0, 1).

    Raises:
        ValueError: a value is impossible, the method unknown, or a setting is another method's.
    """

    rho: Setting = 0.05
    method: str = "sam"
    adaptive: bool = False
    eta: Setting = 0.01
    every: int = 1
    num_batch_splits: Setting = None
    accumulate: int = 1
    sync_perturbation: bool = False
    alpha: Setting = None
    gamma: Setting = None
    rho_min: Setting = None
    rho_max: Setting = None
    sigma: Setting = None
    friendly_lambda: Setting = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise _invalid("method", f"one of {', '.join(METHODS)}", self.method)
        self._fill()
        for name in ("rho", "eta", "alpha", "rho_min", "rho_max", "sigma"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value < math.inf):
                raise _invalid(name, "a finite number >= 0", value)
        for name in ("gamma", "friendly_lambda"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value < 1):
                raise _invalid(name, "a number in [0, 1)", value)
        for name in ("adaptive", "sync_perturbation"):
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, "True or False", getattr(self, name))
        for name in ("every", "accumulate", "num_batch_splits"):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1):
                raise _invalid(name, "an integer >= 1", value)
        if self.rho_min is not None and self.rho_max is not None and self.rho_min > self.rho_max:
            raise _invalid("rho_min", f"at most rho_max, {self.rho_max}", self.rho_min)
        if self.sync_perturbation and self.num_batch_splits > 1:
            raise _invalid("sync_perturbation", "False with num_batch_splits, which gives each part its own", True)

    def _fill(self) -> None:
        """Set what is None to the default, after refusing what belongs to another method."""
        for name, default in (("rho", 0.05), ("eta", 0.01), ("num_batch_splits", 1)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        own = dict(DEFAULTS[self.method])
        if self.method == "gsam":
            own |= {"rho_min": self.rho, "rho_max": self.rho}
        for name in ("alpha", "gamma", "rho_min", "rho_max", "sigma", "friendly_lambda"):
            value = getattr(self, name)
            if name not in own and value is not None:
                raise _invalid(name, f"None: it is no setting of method={self.method!r}", value)
            object.__setattr__(self, name, own.get(name) if value is None else value)

    @property
    def flat(self) -> bool:
        """Whether nothing is ever perturbed."""
        return (self.rho_max if self.method == "gsam" else self.rho) == 0

    @property
    def plain(self) -> bool:
        """Whether the step is exactly the base optimizer's."""
        return self.flat and self.num_batch_splits == 1 and self.accumulate == 1


def _invalid(name: str, expected: str, received: Any) -> ValueError:
    return ValueError(
        f"Invalid value received for argument `{name}`. Expected {expected}. Received: {name}={received!r}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def perturbation(
    gradients: Sequence[tf.Tensor | None],
    variables: Sequence[keras.Variable],
    rho: float | tf.Tensor,
    adaptive: bool = False,
    eta: float = 0.01,
) -> list[tf.Tensor | None]:
    """The step to the worst point within rho, to first order; one norm over all weights.

    e = rho g / ||g||_2 (Foret et al. 2021, arXiv:2010.01412, eq. 2). Adaptive: e = rho T^2 g / ||T g||_2 with
    T = |w| + eta for kernels and 1 for biases and normalisation weights: those of fewer than two dimensions, or called
    bias, gamma or beta (Kwon et al. 2021, arXiv:2102.11600, eq. 3). Zero where all gradients are zero.

    Args:
        gradients: unscaled, shaped as `variables`; None stays None.
    """
    scales = [
        tf.abs(tf.convert_to_tensor(variable)) + eta if adaptive and _is_kernel(variable) else None
        for variable in variables
    ]
    dense = [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]
    scaled = [
        gradient if gradient is None or scale is None else gradient * scale
        for gradient, scale in zip(dense, scales, strict=True)
    ]
    norm = tf.linalg.global_norm([gradient for gradient in scaled if gradient is not None])
    factor = tf.math.divide_no_nan(tf.cast(rho, norm.dtype), norm)
    return [
        gradient if gradient is None else gradient * factor if scale is None else gradient * scale * factor
        for gradient, scale in zip(scaled, scales, strict=True)
    ]


def _is_kernel(variable: Any) -> bool:
    return len(variable.shape) > 1 and getattr(variable, "name", "") not in ("bias", "gamma", "beta")


def tied_rho(rho_min: float, rho_max: float, rate: Any, low: float, high: float) -> tf.Tensor:
    """GSAM's radius: rho_min + (rho_max - rho_min) (rate - low) / (high - low) (Zhuang et al. 2022, algorithm 1).

    Args:
        rate: the learning rate now. low, high: where the schedule goes between; outside, the nearer end is taken.
    """
    share = tf.math.divide_no_nan(tf.cast(rate, "float32") - low, high - low)
    return rho_min + (rho_max - rho_min) * tf.clip_by_value(share, 0.0, 1.0)


def friendly_direction(gradients: Tensors, averages: Tensors, sigma: float, decay: float) -> tuple[Tensors, Tensors]:
    """What F-SAM perturbs along, and the new moving averages (Li et al. 2024, arXiv:2403.12350, algorithm 1).

    m_t = lambda m_{t-1} + (1 - lambda) g_t with m_{-1} = 0; d_t = g_t - sigma m_t.
    """
    averages = [decay * average + (1 - decay) * g for average, g in zip(averages, gradients, strict=True)]
    return [g - sigma * average for g, average in zip(gradients, averages, strict=True)], averages


def gap_direction(clean: Tensors, perturbed: Tensors, alpha: float) -> Tensors:
    """GSAM's gradient: the perturbed one less alpha of the clean one's component orthogonal to it.

    g_p - alpha g_orthogonal (Zhuang et al. 2022, arXiv:2203.08065, algorithm 1 and eq. 8).
    """
    return [p - alpha * o for p, o in zip(perturbed, orthogonal(clean, perturbed), strict=True)]


def weighted_direction(clean: Tensors, perturbed: Tensors, gamma: float) -> Tensors:
    """WSAM's gradient: (1 - 2 gamma) / (1 - gamma) g + gamma / (1 - gamma) g_p (Yue et al. 2023, arXiv:2305.15817).

    That is the gradient of loss + gamma / (1 - gamma) sharpness, given to the optimizer as one (the paper's coupled
    variant; its decoupled one leaves the sharpness out of the optimizer's moments and of clipping).
    """
    return [(1 - 2 * gamma) / (1 - gamma) * c + gamma / (1 - gamma) * p for c, p in zip(clean, perturbed, strict=True)]


def look_direction(clean: Tensors, orthogonal_part: Tensors, alpha: float) -> Tensors:
    """LookSAM's gradient between its sharpness-aware steps: g + alpha ||g|| / ||g_v|| g_v.

    g_v is the last perturbed gradient's component orthogonal to the clean one (Liu et al. 2022, arXiv:2203.02714,
    algorithm 1), with one norm over all weights.
    """
    norm, norm_of_part = tf.linalg.global_norm(clean), tf.linalg.global_norm(orthogonal_part)
    factor = tf.math.divide_no_nan(alpha * norm, norm_of_part)
    return [c + factor * part for c, part in zip(clean, orthogonal_part, strict=True)]


def orthogonal(vector: Tensors, to: Tensors) -> Tensors:
    """The component of `vector` orthogonal to `to`, each one vector over all weights."""

    def product(one: Tensors, other: Tensors) -> tf.Tensor:
        return tf.add_n([tf.reduce_sum(a * b) for a, b in zip(one, other, strict=True)])

    along = tf.math.divide_no_nan(product(vector, to), product(to, to))
    return [v - along * t for v, t in zip(vector, to, strict=True)]


def learning_rate_range(optimizer: keras.optimizers.Optimizer) -> tuple[float, float]:
    """The lowest and highest rate of the optimizer's schedule, to which GSAM ties rho.

    Where a schedule does not say, the lowest is 0 and the highest that of step 0; a rate that is no schedule is the
    highest itself, so that callbacks which lower it lower rho.
    """
    match schedule := base_optimizer(optimizer)._learning_rate:
        case keras.optimizers.schedules.CosineDecay():
            peak = schedule.initial_learning_rate if schedule.warmup_target is None else schedule.warmup_target
            return peak * schedule.alpha, float(peak)
        case keras.optimizers.schedules.PolynomialDecay():
            return float(schedule.end_learning_rate), float(schedule.initial_learning_rate)
        case keras.optimizers.schedules.PiecewiseConstantDecay():
            return float(min(schedule.values)), float(max(schedule.values))
        case keras.optimizers.schedules.LearningRateSchedule():
            return 0.0, float(schedule(0))
    return 0.0, float(tf.convert_to_tensor(base_optimizer(optimizer).learning_rate))


def base_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer, without what scales its loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


class Step:
    """A training step: gradients, the method's formula, the optimizer.

    The perturbed pass sees its weights, and the clean pass's starting state, in place of the variables' values
    (`keras.StatelessScope`): no variable is moved and moved back, both passes draw the same dropout masks, and what a
    pass updates (BatchNorm's statistics) comes from the clean one. A gradient that is not finite leaves every variable
    of model and optimizer as it was, a loss scale aside; with nothing perturbed the step is the optimizer's own and has
    no such guard.

    Make it where the model's and the optimizer's variables are made, within the strategy's scope; call it in a
    replica's context. Gradients are summed over replicas, so a loss is its replica's share of the global mean, which is
    Keras' convention too.

    Args:
        model: built; its trainable variables are trained.
        optimizer: built; it sees the final gradient alone and once, so clipping, weight decay and averages do too.

    Attributes:
        variables: what the method remembers between steps.
    """

    def __init__(self, settings: Settings, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        self.settings = settings
        self.model = model
        self.optimizer = optimizer
        self.variables: list[keras.Variable] = []
        trained = model.trainable_variables
        # The gradients that the final one is made from.
        self._kinds = ["clean", "perturbed"]
        if settings.flat:
            self._kinds.remove("perturbed")
        elif settings.method == "sam":
            self._kinds.remove("clean")
        if settings.method == "gsam":
            self._rates = learning_rate_range(optimizer)
            if settings.rho_min < settings.rho_max and not self._rates[0] < self._rates[1]:
                raise _invalid("rho_min", "rho_max, since the learning rate's range is not known", settings.rho_min)
        self._averages = self._zeros(trained if settings.method == "friendly" else [])
        self._orthogonal = self._zeros(trained if settings.method == "looksam" else [])
        if settings.accumulate > 1:
            self._sums = {kind: self._zeros(trained) for kind in self._kinds}
            self._examples, self._calls = self._zeros([optimizer.iterations, optimizer.iterations])

    def _zeros(self, like: Sequence[keras.Variable]) -> list[keras.Variable]:
        made = [keras.Variable(tf.zeros(v.shape, v.dtype), trainable=False, name=f"sam_{v.name}") for v in like]
        self.variables += made
        return made

    @tf.autograph.experimental.do_not_convert
    def __call__(self, forward: Forward, batch: Any, count: tf.Tensor | None = None) -> tuple[tf.Tensor, Any]:
        """Train on one batch.

        Args:
            forward: called with the batch, or with parts of it, in training mode.
            batch: nested tensors, the examples along the first axis; None is let through.
            count: float32 scalar: how many of the examples are real, where a replica's loss is its mean over these
                times their share of all replicas'. Without it all are, and the loss is the mean over R replicas.

        Returns:
            the clean pass's loss, and its outputs in the batch's order.
        """
        if self.settings.plain:
            with tf.GradientTape() as tape:
                loss, outputs = forward(batch)
                scaled = self.optimizer.scale_loss(loss)
            variables = self.model.trainable_variables
            self.optimizer.apply(tape.gradient(scaled, [variable.value for variable in variables]), variables)
            return loss, outputs
        before = self._state()
        passes = self._passes if self.settings.num_batch_splits == 1 else self._passes_by_part
        own = size = tf.cast(_examples(batch), "float32") if count is None else count
        if _replicas() > 1:
            size = tf.distribute.get_replica_context().all_reduce("SUM", own)
        share = 1 / _replicas() if count is None else tf.math.divide_no_nan(own, size)
        loss, outputs, gradients, used = passes(forward, batch, share)
        if _replicas() > 1:
            gradients = tf.distribute.get_replica_context().all_reduce("SUM", gradients)
        self._update(gradients, used, size, before)
        return loss, outputs

    def _state(self) -> Tensors:
        return [tf.convert_to_tensor(variable) for variable in self.model.non_trainable_variables]

    # The two passes

    def _passes(self, forward: Forward, batch: Any, share: Any) -> tuple[tf.Tensor, Any, Gradients, list[int]]:
        """Loss, outputs, the gradients by kind, unscaled, and the indices of the weights that have them.

        share: of the mean over all replicas, what this one's loss is.
        """
        state = self._state()
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            loss, outputs = forward(batch)
            scaled = self.optimizer.scale_loss(loss)
        found = tape.gradient(scaled, [variable.value for variable in variables])
        used = [index for index, gradient in enumerate(found) if gradient is not None]
        gradients = {"clean": self._unscaled([found[index] for index in used])}
        if not self.settings.flat:
            clean = direction = gradients["clean"]
            if self.settings.sync_perturbation and _replicas() > 1:  # here, since no replica may reduce in a branch
                direction = tf.distribute.get_replica_context().all_reduce("SUM", clean)
            trained = [variables[index] for index in used]
            gradients["perturbed"] = self._if_sharp(
                lambda: self._perturbed(forward, batch, trained, self._shifts(direction, trained, used, share), state),
                lambda: clean,
            )
        return loss, outputs, {kind: gradients[kind] for kind in self._kinds}, used

    def _perturbed(
        self, forward: Forward, batch: Any, trained: list[keras.Variable], shifts: Tensors, state: Tensors
    ) -> Tensors:
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
                    f"{variable.path} has a gradient where the weights are but none at the perturbed ones. Expected a "
                    "model that reads its weights as Keras variables; rematerialisation and tf.recompute_grad don't."
                )
        return self._unscaled(gradients)

    def _shifts(self, direction: Tensors, trained: list[keras.Variable], used: list[int], share: Any) -> Tensors:
        """From where the weights are to the worst point nearby."""
        settings = self.settings
        if settings.method == "friendly":
            if not settings.sync_perturbation:  # a replica's share of the mean, beside averages of the mean
                direction = [tf.math.divide_no_nan(gradient, tf.cast(share, gradient.dtype)) for gradient in direction]
            averages = [self._averages[index] for index in used]
            direction, _ = friendly_direction(direction, averages, settings.sigma, settings.friendly_lambda)
        rho = settings.rho
        if settings.method == "gsam":
            rho = tied_rho(settings.rho_min, settings.rho_max, self.optimizer.learning_rate, *self._rates)
        return perturbation(direction, trained, rho, settings.adaptive, settings.eta)

    def _if_sharp(self, then: Callable[[], Tensors], otherwise: Callable[[], Tensors]) -> Tensors:
        if self.settings.every == 1:
            return then()
        steps = tf.convert_to_tensor(self.optimizer.iterations)
        return tf.cond(tf.equal(steps % self.settings.every, 0), then, otherwise)

    def _passes_by_part(self, forward: Forward, batch: Any, share: Any) -> tuple[tf.Tensor, Any, Gradients, list[int]]:
        """`_passes` over the parts of a batch, cut as `np.array_split` does, each weighted by its size.

        In a loop, so that the activations of one part at a time are in memory.
        """
        batch = _map(tf.convert_to_tensor, batch)
        size, splits = _examples(batch), int(self.settings.num_batch_splits)

        def run(index: Any) -> tuple[tf.Tensor, Any, Gradients, list[int]]:
            start = index * (size // splits) + tf.minimum(index, size % splits)
            end = start + size // splits + tf.cast(index < size % splits, "int32")
            loss, outputs, gradients, used = self._passes(forward, _map(lambda tensor: tensor[start:end], batch), share)
            # No examples: what the last batch leaves of several replicas to one.
            weight = tf.math.divide_no_nan(tf.cast(end - start, "float32"), tf.cast(size, "float32"))
            loss, gradients = tf.nest.map_structure(lambda each: tf.cast(weight, each.dtype) * each, (loss, gradients))
            return loss, outputs, gradients, used

        def add(index: tf.Tensor, sums: Any, collected: Any) -> Any:
            loss, outputs, gradients, _ = run(index)
            sums = tf.nest.map_structure(tf.add, sums, (loss, gradients))
            return index + 1, sums, tf.nest.map_structure(lambda array, o: array.write(index, o), collected, outputs)

        # The first part outside of the loop shows which weights are used and what the outputs are.
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
        """Skip the step, let the gradients wait for more, or step."""
        accumulate = self.settings.accumulate
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in tf.nest.flatten(gradients)])
        last = tf.constant(True) if accumulate == 1 else tf.convert_to_tensor(self._calls) >= accumulate - 1

        def skip(gradients: Gradients, size: tf.Tensor, before: Tensors) -> None:
            for variable, value in zip(self.model.non_trainable_variables, before, strict=True):
                variable.assign(value)
            if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
                # Which lowers the loss scale and skips as well; finite in neither, whichever of the passes was not.
                self._apply([gradient * math.nan for gradient in gradients[self._kinds[0]]], used)

        def wait(gradients: Gradients, size: tf.Tensor, _: Tensors) -> None:
            for kind, of_kind in gradients.items():
                for index, gradient in zip(used, of_kind, strict=True):
                    self._sums[kind][index].assign_add(tf.cast(size, gradient.dtype) * gradient)
            self._examples.assign_add(size)
            self._calls.assign_add(1)

        def step(gradients: Gradients, size: tf.Tensor, before: Tensors) -> None:
            if accumulate > 1:
                wait(gradients, size, before)
                gradients = {
                    kind: [sums[index] / tf.cast(self._examples.value, sums[index].dtype) for index in used]
                    for kind, sums in self._sums.items()
                }
            self._apply(self._final(gradients, used), used)
            for variable in tf.nest.flatten([self._sums, self._examples, self._calls]) if accumulate > 1 else ():
                variable.assign(tf.zeros_like(variable.value))

        def choose(finite: tf.Tensor, last: tf.Tensor, run: Callable[[Callable[..., None]], None]) -> None:
            tf.cond(
                finite,
                lambda: run(step) if accumulate == 1 else tf.cond(last, lambda: run(step), lambda: run(wait)),
                lambda: run(skip),
            )

        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            choose(finite, last, lambda branch: branch(gradients, size, before))
            return

        # The optimizer merges replicas, which none can do in a branch of its own: all take the same one.
        def merged(strategy: Any, finite: Any, last: Any, *arguments: Any) -> None:
            one, other = (strategy.experimental_local_results(flag)[0] for flag in (finite, last))
            choose(one, other, lambda branch: strategy.extended.call_for_each_replica(branch, args=arguments))

        tf.distribute.get_replica_context().merge_call(merged, args=(finite, last, gradients, size, before))

    def _final(self, gradients: Gradients, used: list[int]) -> Tensors:
        """The method's formula; and what the method remembers is brought up to date."""
        settings = self.settings
        if settings.flat:
            return gradients["clean"]
        perturbed = gradients["perturbed"]
        match settings.method:
            case "gsam":
                return gap_direction(gradients["clean"], perturbed, settings.alpha)
            case "wsam":
                return weighted_direction(gradients["clean"], perturbed, settings.gamma)
            case "looksam":
                return self._look(gradients["clean"], perturbed, used)
            case "friendly":
                averages = [self._averages[index] for index in used]
                _, new = friendly_direction(gradients["clean"], averages, settings.sigma, settings.friendly_lambda)
                for variable, value in zip(averages, new, strict=True):
                    variable.assign(value)
        return perturbed

    def _look(self, clean: Tensors, perturbed: Tensors, used: list[int]) -> Tensors:
        kept = [self._orthogonal[index] for index in used]

        def keep() -> Tensors:
            for variable, value in zip(kept, orthogonal(perturbed, clean), strict=True):
                variable.assign(value)
            return perturbed

        return self._if_sharp(keep, lambda: look_direction(clean, kept, self.settings.alpha))

    def _apply(self, gradients: Tensors, used: list[int]) -> None:
        replicas = _replicas()
        if replicas > 1:
            # Keras clips on each replica and sums then: clip the sum, and give each replica its share of that.
            gradients = [gradient / replicas for gradient in base_optimizer(self.optimizer)._clip_gradients(gradients)]
        if self._scales:
            gradients = [self.optimizer.scale_loss(gradient) for gradient in gradients]
        variables = self.model.trainable_variables
        found = dict(zip(used, gradients, strict=True))
        self.optimizer.apply([found.get(index) for index in range(len(variables))], variables)


def _replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync


def _map(function: Callable[[Any], Any], batch: Any) -> Any:
    return keras.tree.map_structure(lambda leaf: None if leaf is None else function(leaf), batch)


def _examples(batch: Any) -> tf.Tensor:
    return tf.shape(next(tensor for tensor in keras.tree.flatten(batch) if tensor is not None))[0]


def _begin_list(first: tf.Tensor) -> tf.TensorArray:
    shape = [None, *first.shape[1:]]
    array = tf.TensorArray(first.dtype, 1, dynamic_size=True, infer_shape=False, element_shape=shape)
    return array.write(0, first)


class SharpnessAwareMinimization(keras.Model):
    """A model whose `fit` takes sharpness-aware steps, all else as ever.

    `compile`, `fit`, `evaluate`, `predict` and callbacks work as on the model itself. `model` is the inner model, and
    `save` and `export` write it without the wrapper; `save_weights` keeps the optimizer's and the method's state too,
    which is what `BackupAndRestore` needs.

    The first four arguments are those of tf_keras' class of this name; `Settings` explains all.

    Args:
        model: functional, sequential or subclassed.

    Raises:
        ValueError: what `Settings` refuses; in `compile`, a loss that is no mean where gradients of several parts are
            averaged, or `jit_compile=True` with `num_batch_splits`; in `fit`, several workers.
    """

    def __init__(
        self,
        model: keras.Model,
        rho: float = 0.05,
        num_batch_splits: int | None = None,
        name: str | None = None,
        *,
        method: str = "sam",
        adaptive: bool = False,
        eta: float = 0.01,
        every: int = 1,
        accumulate: int = 1,
        sync_perturbation: bool = False,
        alpha: float | None = None,
        gamma: float | None = None,
        rho_min: float | None = None,
        rho_max: float | None = None,
        sigma: float | None = None,
        friendly_lambda: float | None = None,
    ) -> None:
        settings = Settings(
            rho=rho,
            method=method,
            adaptive=adaptive,
            eta=eta,
            every=every,
            num_batch_splits=num_batch_splits,
            accumulate=accumulate,
            sync_perturbation=sync_perturbation,
            alpha=alpha,
            gamma=gamma,
            rho_min=rho_min,
            rho_max=rho_max,
            sigma=sigma,
            friendly_lambda=friendly_lambda,
        )
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)  # inputs reach the model as they come
        self.settings = settings
        self.model = model
        self.built = model.built
        self._call_has_training_arg = model._call_has_training_arg
        if hasattr(model, "output_names"):  # by which losses and metrics are given
            self.output_names = model.output_names
        self._sharp_step: Any = None  # a Step, once there are variables

    def build(self, input_shape: Any = None) -> None:
        """Nothing: the inner model builds itself when it is called."""
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The inner model's outputs; Keras' call context brings `training` to it where its own `call` has that."""
        return self.model(inputs)

    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, *arguments: Any, jit_compile: Any = "auto", **options: Any
    ) -> None:
        """`keras.Model.compile`, refusing what parts of a batch can't be averaged under."""
        splits = self.settings.num_batch_splits > 1
        if splits and jit_compile is True:
            raise _invalid(
                "jit_compile", "False or 'auto' with num_batch_splits: XLA has no loop over such parts", True
            )
        for each in keras.tree.flatten(loss) if splits or self.settings.accumulate > 1 else ():
            reduction = getattr(each, "reduction", "sum_over_batch_size")
            if reduction not in ("sum_over_batch_size", "mean"):
                raise _invalid(
                    "loss", "losses whose reduction is 'sum_over_batch_size', since parts are averaged", each
                )
        self._sharp_step = None
        super().compile(optimizer, loss, *arguments, jit_compile=False if splits else jit_compile, **options)

    def fit(self, *args: Any, **options: Any) -> Any:
        """`keras.Model.fit`; on several workers Keras 3 has none that works (keras issue 20585)."""
        if isinstance(self.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise ValueError("fit does not run on several workers in Keras 3; call flatmin.sam.Step in a loop instead")
        return super().fit(*args, **options)

    def make_train_function(self, force: bool = False) -> None:
        """`keras.Model.make_train_function`; here variables can be made for every replica, the model's being there."""
        if all(layer.built for layer in self._flatten_layers()):
            self._begin()
        super().make_train_function(force)

    def _begin(self) -> None:
        if self._sharp_step is None and not self.settings.plain:
            with tf.init_scope(), self.distribute_strategy.scope():
                if not self.optimizer.built:
                    self.optimizer.build(self.trainable_variables)
                self._sharp_step = Step(self.settings, self.model, self.optimizer)

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step on (x, y, sample_weight); what is reported is the clean pass's."""
        if self.settings.plain or (self.built and not self.trainable_variables):
            return super().train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self._sharp_step is None:
            self(x, training=False)  # a model that nothing has called yet has its variables only then
            self._begin()

        def forward(part: Any) -> tuple[tf.Tensor, Any]:
            x, y, sample_weight = part
            outputs = self(x, training=True) if self._call_has_training_arg else self(x)
            if self.settings.num_batch_splits > 1 and any(
                getattr(output, "_keras_mask", None) is not None for output in keras.tree.flatten(outputs)
            ):
                raise _invalid("num_batch_splits", "1 with masked outputs, which parts share unequally", "more")
            return self.compute_loss(x, y, outputs, sample_weight, training=True), outputs

        loss, outputs = self._sharp_step(forward, (x, y, sample_weight))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss * _replicas(), sample_weight=_examples(x))
        return self.compute_metrics(x, y, outputs, sample_weight)

    def save(self, *args: Any, **options: Any) -> None:
        """Save the inner model."""
        self.model.save(*args, **options)

    def export(self, *args: Any, **options: Any) -> None:
        """Export the inner model."""
        self.model.export(*args, **options)

    def save_own_variables(self, store: Any) -> None:
        """What the method remembers between steps, for `save_weights`."""
        for index, variable in enumerate(self._sharp_step.variables if self._sharp_step else ()):
            store[str(index)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """What `save_own_variables` wrote, where training has begun; else it begins anew."""
        for index, variable in enumerate(self._sharp_step.variables if self._sharp_step else ()):
            variable.assign(store[str(index)] if str(index) in store else tf.zeros_like(variable.value))
