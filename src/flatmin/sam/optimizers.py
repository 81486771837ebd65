"""Facts about a Keras optimizer that a step needs."""

from __future__ import annotations

import keras

from .settings import Settings, invalid_argument

_DECAYS = (
    keras.optimizers.schedules.CosineDecayRestarts,
    keras.optimizers.schedules.ExponentialDecay,
    keras.optimizers.schedules.InverseTimeDecay,
)


def base_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer without the wrapper that scales its loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def scales_loss(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the optimizer expects gradients of a loss that `scale_loss` multiplied."""
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or bool(optimizer.loss_scale_factor)


def learning_rate_range(optimizer: keras.optimizers.Optimizer, settings: Settings | None = None) -> tuple[float, float]:
    """The lowest and the highest learning rate, between which GSAM varies rho.

    `rate_min` and `rate_max` of the settings come first. Cosine, polynomial and piecewise schedules say what theirs
    are, and schedules that only fall begin with the highest; the lowest is 0 otherwise. A rate without a schedule is
    itself the highest, so a callback that lowers the rate lowers rho.

    Raises:
        ValueError: the highest rate of a schedule is not known, or the optimizer has several rates.
    """
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise invalid_argument("optimizer", "one with a single learning rate, which rho can follow", optimizer)
    low, high = (None, None) if settings is None else (settings.rate_min, settings.rate_max)
    schedule = base_optimizer(optimizer)._learning_rate
    known: tuple[float, float] | None = None
    match schedule:
        case keras.optimizers.schedules.CosineDecay():
            peak = schedule.initial_learning_rate if schedule.warmup_target is None else schedule.warmup_target
            known = peak * schedule.alpha, float(peak)
        case keras.optimizers.schedules.PolynomialDecay():
            known = float(schedule.end_learning_rate), float(schedule.initial_learning_rate)
        case keras.optimizers.schedules.PiecewiseConstantDecay():
            known = float(min(schedule.values)), float(max(schedule.values))
        case keras.optimizers.schedules.LearningRateSchedule():
            known = (0.0, float(schedule.initial_learning_rate)) if isinstance(schedule, _DECAYS) else None
        case _:
            known = 0.0, float(keras.ops.convert_to_numpy(base_optimizer(optimizer).learning_rate))
    if high is None:
        if known is None:
            name = type(schedule).__name__
            raise invalid_argument("rate_max", f"the highest learning rate of {name}, since it does not say", None)
        high = known[1]
    low = (known[0] if known else 0.0) if low is None else low
    if not low < high:
        raise invalid_argument("rate_max", f"more than the lowest learning rate, {low:g}", high)
    return float(low), float(high)
