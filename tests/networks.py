"""Small networks, and random weights for networks of any size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from flatmin.models import registry


def spread(model: keras.Model) -> None:
    """He initialisation: with Keras' own, depthwise convolutions leave features near 1e-15."""
    random = np.random.default_rng(5)
    for variable in model.trainable_variables:
        if len(variable.shape) == 4:
            variable.assign(random.normal(0, math.sqrt(2 / _fan_in(variable.shape)), variable.shape))


def randomize(model: keras.Model, seed: int = 0) -> None:
    """Assign random values that keep activations in bounds, and with which every BatchNorm and bias has an effect."""
    random = np.random.default_rng(seed)
    for variable in model.variables:
        name = variable.path.rsplit("/")[-1]
        if name in ("gamma", "moving_variance"):
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
        elif name in ("beta", "bias", "moving_mean"):
            variable.assign(random.normal(0.0, 0.1, variable.shape))
        elif len(variable.shape) == 4:
            variable.assign(random.normal(0, math.sqrt(2 / _fan_in(variable.shape)), variable.shape))


def _fan_in(shape: tuple[int, ...]) -> int:
    is_depthwise = shape[-1] == 1
    return math.prod(shape[:2]) * (1 if is_depthwise else shape[2])


def residual_network(size: int = 12) -> keras.Model:
    """Build a network like EfficientNet-Lite's in small: a stem, and two blocks of which one has a shortcut."""

    def norm(x: Any, activation: bool = True) -> Any:
        x = keras.layers.BatchNormalization()(x)
        return keras.layers.ReLU(6.0)(x) if activation else x

    inputs = keras.Input((size, size, 3))
    x = norm(keras.layers.Conv2D(4, 3, 2, padding="same", use_bias=False)(inputs))
    for kernel in (3, 5):
        shortcut = x
        x = norm(keras.layers.Conv2D(8, 1, use_bias=False)(x))
        x = norm(keras.layers.DepthwiseConv2D(kernel, padding="same", use_bias=False)(x))
        x = norm(keras.layers.Conv2D(4, 1, use_bias=False)(x), activation=False)
        x = keras.layers.Add()([x, shortcut]) if kernel == 5 else x
    model = keras.Model(inputs, x)
    randomize(model)
    return model


def constructed(name: str, size: int, **options: Any) -> keras.Model:
    """Build Keras' own network of a backbone in the table, with random weights."""
    row = registry.BACKBONES[name]
    constructor = getattr(keras.applications, row.constructor)
    return constructor(weights=None, input_shape=(size, size, 3), **row.options, **options)


def assign_random(model: keras.Model, seed: int = 0) -> keras.Model:
    """Give every weight its own random values, so that no two can be exchanged unnoticed."""
    random = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.dtype == "float32":
            weight.assign(random.uniform(0.5, 1.5, weight.shape))
    return model


def save_legacy(model: keras.Model, path: Path) -> Path:
    """Save weights as Keras 2 did: by layer, in order."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        for layer in model.layers:
            group = file.create_group(layer.name)
            weights = [] if isinstance(layer, keras.layers.InputLayer) else layer.weights
            labels = [f"{layer.name}/{index}:0" for index in range(len(weights))]
            group.attrs["weight_names"] = [label.encode() for label in labels]
            for label, weight in zip(labels, weights, strict=True):
                group[label] = np.asarray(weight)
    return path
