"""Facts about a Keras optimizer that a step needs."""

from __future__ import annotations

from typing import Any

import keras

from .settings import Settings, invalid_argument


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
    if isinstance(base_optimizer(optimizer), keras.optimizers.MultiOptimizer):
        raise invalid_argument("optimizer", "one with a single learning rate, which rho can follow", optimizer)
    low: Any = settings.rate_min if settings else None
    high: Any = settings.rate_max if settings else None
    schedule = base_optimizer(optimizer)._learning_rate
    known = _known_range(schedule)
    if known is None and high is None:
        name = type(schedule).__name__
        raise invalid_argument("rate_max", f"the highest learning rate of {name}, since it does not say", None)
    low = (known[0] if known else 0.0) if low is None else low
    high = known[1] if high is None and known else high
    if not low < high:
        raise invalid_argument("rate_max", f"more than the lowest learning rate, {low:g}", high)
    return float(low), float(high)


def _known_range(rate: Any) -> tuple[float, float] | None:
    """The lowest and the highest value of a learning rate, as far as it says them."""
    schedules = keras.optimizers.schedules
    match rate:
        case schedules.CosineDecay():
            peak = rate.initial_learning_rate if rate.warmup_target is None else rate.warmup_target
            return peak * rate.alpha, float(peak)
        case schedules.PolynomialDecay():
            return float(rate.end_learning_rate), float(rate.initial_learning_rate)
        case schedules.PiecewiseConstantDecay():
            return float(min(rate.values)), float(max(rate.values))
        case schedules.CosineDecayRestarts() | schedules.ExponentialDecay() | schedules.InverseTimeDecay():
            return 0.0, float(rate.initial_learning_rate)
        case schedules.LearningRateSchedule():
            return None
    return 0.0, float(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(rate)))
