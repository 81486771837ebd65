"""Networks of random weights."""

from __future__ import annotations

import math

import keras
import numpy as np


def spread(model: keras.Model) -> None:
    """He initialisation: with Keras' own, depthwise convolutions leave features near 1e-15."""
    random = np.random.default_rng(5)
    for variable in model.trainable_variables:
        if len(variable.shape) == 4:
            depthwise = variable.shape[-1] == 1
            fan_in = math.prod(variable.shape[:2]) * (1 if depthwise else variable.shape[2])
            variable.assign(random.normal(0, math.sqrt(2 / fan_in), variable.shape))
