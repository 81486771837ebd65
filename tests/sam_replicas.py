"""Sharpness-aware steps on two replicas, run as a script: `python sam_replicas.py FOLDER CASES`.

CASES is a JSON list of pairs: `fit`, `loop` or `counted`, and settings. They run on two logical CPUs or, where
TF_CONFIG is set, on its workers, and each writes FOLDER/{its number}.npz. Each replica gets half of a batch, as
`np.array_split` splits it. With `counted` the first replica gets `first` examples, batch by batch, and the other one
the rest or, if there is none, an example that does not count. The network is `sam_reference`'s.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin.sam import Settings, SharpnessAwareMinimization, Step


def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(6, 8, 6)).astype(np.float32), np.arange(48).reshape(6, 8) % 3


def network() -> keras.Model:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    random = np.random.default_rng(3)
    model.set_weights([random.normal(size=(6, 3)), random.normal(size=3)])
    return model


def optimizer(options: dict[str, Any]) -> keras.optimizers.Optimizer:
    scale = options.pop("initial_scale", None)
    made = keras.optimizers.SGD(0.5, **options)
    return keras.optimizers.LossScaleOptimizer(made, initial_scale=scale) if scale else made


def two_replicas() -> tf.distribute.Strategy:
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def uneven(inputs: np.ndarray, labels: np.ndarray, first: list[int]) -> tf.data.Dataset:
    """The parts of batches of eight, in turn: inputs, labels, and 1 for each example that counts."""

    def parts() -> Iterator[tuple[np.ndarray, ...]]:
        for start, cut in zip(range(0, len(labels), 8), first * len(labels), strict=False):
            for part in (slice(start, start + cut), slice(start + cut, start + 8)):
                count = len(labels[part])
                yield (inputs[part], labels[part], np.ones(count)) if count else (inputs[:1], labels[:1], np.zeros(1))

    signature = (tf.TensorSpec((None, 6)), tf.TensorSpec((None,), tf.int64), tf.TensorSpec((None,)))
    return tf.data.Dataset.from_generator(parts, output_signature=signature)


def run(strategy: tf.distribute.Strategy, kind: str, settings: dict[str, Any], out: str) -> None:
    options = settings.pop("optimizer", {})
    broken, first, images = (settings.pop(key, None) for key in ("broken", "first", "images"))
    inputs, labels = data()
    if broken is not None:
        inputs[broken, 7, 0] = np.inf  # in the second replica's half
    inputs, labels = inputs.reshape(-1, 6)[:images], labels.reshape(-1)[:images]
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with strategy.scope():
        model = network()
        trained = optimizer(options)
        if kind == "fit":
            wrapped = SharpnessAwareMinimization(model, **settings)
            wrapped.compile(trained, cross_entropy, metrics=["accuracy"])
        else:
            trained.build(model.trainable_variables)
            step = Step(Settings(**settings), model, trained)

    def forward(part: Any) -> tuple[tf.Tensor, Any]:
        # Keras divides what a loss object returns by the number of replicas, each of which has half of the batch.
        outputs = model(part[0], training=True)
        if kind == "counted":
            losses = keras.losses.sparse_categorical_crossentropy(part[1], outputs, from_logits=True)
            return tf.reduce_sum(losses * part[2]) / 8, outputs
        return cross_entropy(part[1], outputs), outputs

    @tf.function
    def distributed(*batch: Any) -> tf.Tensor:
        shares = strategy.run(lambda *part: step(forward, part, *map(tf.reduce_sum, part[2:]))[0], args=batch)
        return strategy.reduce("SUM", shares, axis=None)

    if kind == "fit":
        losses = wrapped.fit(inputs, labels, batch_size=8, epochs=1, shuffle=False, verbose=0).history["loss"]
    elif kind == "counted":
        batches = strategy.distribute_datasets_from_function(lambda _: uneven(inputs, labels, first))
        losses = [float(distributed(*batch)) for batch in batches]
    else:
        sharding = tf.data.Options()
        sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
        batches = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(8).with_options(sharding)
        losses = [float(distributed(*batch)) for batch in strategy.experimental_distribute_dataset(batches)]
    kernel, bias = model.trainable_variables
    on_each = [strategy.experimental_local_results(variable.value) for variable in (kernel, bias)]
    same = all(np.array_equal(value, values[0]) for values in on_each for value in values)
    if kind == "fit":
        step = wrapped._step
    kernel, bias, steps = (np.array(variable) for variable in (kernel, bias, trained.iterations))
    evaluations = step.gradient_evaluations
    np.savez(out, kernel=kernel, bias=bias, losses=losses, same=same, steps=steps, evaluations=evaluations)


if __name__ == "__main__":
    one_strategy = two_replicas()
    for number, (kind_of_case, settings_of_case) in enumerate(json.loads(sys.argv[2])):
        run(one_strategy, kind_of_case, settings_of_case, f"{sys.argv[1]}/{number}.npz")
