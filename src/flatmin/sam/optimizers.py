"""Facts about a Keras optimizer that a step needs."""

from __future__ import annotations

import keras
import tensorflow as tf


def base_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """The optimizer without the wrapper that scales its loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def learning_rate_range(optimizer: keras.optimizers.Optimizer) -> tuple[float, float]:
    """The lowest and the highest rate of the optimizer's schedule, between which GSAM varies rho.

    If a schedule does not say, the lowest is 0 and the highest is that of step 0. A rate without a schedule is itself
    the highest, so a callback that lowers the rate lowers rho.
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
