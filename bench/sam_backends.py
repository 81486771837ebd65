"""The time of an epoch of sharpness-aware `fit` over a plain one, on the backend that runs: bench/sam_backends.json.

KERAS_BACKEND=jax PYTHONPATH=src build/jax/bin/python bench/sam_backends.py

`make docs` fills the table of docs/sam.md from it. A small convolutional network; the variants take turns, and the
quickest turn of each counts, since what else runs on a machine only ever slows a turn.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

from flatmin.sam import SharpnessAwareMinimization

RESULTS = Path(__file__).with_suffix(".json")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rho": 0.0},
    "sam": {},
    "sam, adaptive": {"adaptive": True},
    "sam, every=5": {"every": 5},
    "gsam": {"method": "gsam"},
}
TURNS, STEPS, BATCH = 5, 10, 64


def network() -> keras.Model:
    layers = keras.layers
    body = [layers.Conv2D(32, 3, strides=2, padding="same"), layers.BatchNormalization(), layers.ReLU()]
    body += [layers.Conv2D(64, 3, strides=2, padding="same"), layers.BatchNormalization(), layers.ReLU()]
    return keras.Sequential([keras.Input((32, 32, 3)), *body, layers.GlobalAveragePooling2D(), layers.Dense(10)])


def main() -> None:
    load = os.getloadavg()[0]
    images = np.random.default_rng(0).normal(size=(BATCH * STEPS, 32, 32, 3)).astype("float32")
    labels = np.arange(len(images)) % 10
    models = {}
    for name, settings in VARIANTS.items():
        models[name] = SharpnessAwareMinimization(network(), **settings)
        models[name].compile(keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        models[name].fit(images, labels, batch_size=BATCH, verbose=0)  # compiles
    quickest = dict.fromkeys(models, float("inf"))
    for _ in range(TURNS):
        for name, model in models.items():
            started = time.perf_counter()
            model.fit(images, labels, batch_size=BATCH, verbose=0)
            quickest[name] = min(quickest[name], time.perf_counter() - started)
    plain = quickest.pop("plain")
    found = {
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "plain_milliseconds": round(1000 * plain / STEPS, 1),
        "ratios": {name: round(seconds / plain, 2) for name, seconds in quickest.items()},
    }
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[keras.config.backend()] = found
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(keras.config.backend(), json.dumps(found))


if __name__ == "__main__":
    main()
