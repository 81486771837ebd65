"""The time of an epoch of sharpness-aware `fit` over a plain one, on the backend that runs.

KERAS_BACKEND=jax PYTHONPATH=src build/jax/bin/python tests/keras_backends/cost.py
"""

from __future__ import annotations

import time
from typing import Any

import keras
import numpy as np

from flatmin.sam import SharpnessAwareMinimization

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rho": 0.0},
    "sam": {},
    "sam, adaptive": {"adaptive": True},
    "sam, every=5": {"every": 5},
    "gsam": {"method": "gsam"},
}
TURNS = 5


def network() -> keras.Model:
    layers = keras.layers
    body = [layers.Conv2D(32, 3, strides=2, padding="same"), layers.BatchNormalization(), layers.ReLU()]
    body += [layers.Conv2D(64, 3, strides=2, padding="same"), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([keras.Input((32, 32, 3)), *body, layers.GlobalAveragePooling2D(), layers.Dense(10)])


def main() -> None:
    images = np.random.default_rng(0).normal(size=(640, 32, 32, 3)).astype("float32")
    labels = np.arange(640) % 10
    models = {}
    for name, settings in VARIANTS.items():
        models[name] = SharpnessAwareMinimization(network(), **settings)
        models[name].compile(keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        models[name].fit(images, labels, batch_size=64, verbose=0)  # compiles
    quickest = dict.fromkeys(models, float("inf"))
    for _ in range(TURNS):
        for name, model in models.items():
            started = time.perf_counter()
            model.fit(images, labels, batch_size=64, verbose=0)
            quickest[name] = min(quickest[name], time.perf_counter() - started)
    ratios = ", ".join(f"{name} {quickest[name] / quickest['plain']:.2f}" for name in VARIANTS if name != "plain")
    print(f"{keras.config.backend()}: {ratios} (plain {quickest['plain'] * 100:.1f} ms a step)")


if __name__ == "__main__":
    main()
