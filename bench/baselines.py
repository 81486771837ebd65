"""The pipelines that Flatmin is compared with: every epoch augments the images and runs the whole network over them.

    python bench/baselines.py original extract EPOCHS
    python bench/baselines.py original finetune EPOCHS
    python bench/baselines.py keras extract EPOCHS

Each reads params.yaml, data/records and, to fine-tune, models/select of the working directory, trains with Keras'
`fit` and prints `ready` once all is imported, then a line at the end of each epoch, as Flatmin's stages do.

`original` is the pipeline of the study that Flatmin began as: imgaug in a Python function of tf.data, on whole batches;
the network resizes and preprocesses. `keras` is Keras' guide to transfer learning (keras.io/guides/transfer_learning):
tf.data resizes, and augments with the guide's layers. Decoded images are kept in memory, and neither waits for what it
could do ahead.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np

from flatmin.common import console, errors, params


def decoded(records: Any, role: str) -> Any:
    """All of a role, decoded and held in memory: (uint8 image as stored, label) of each."""
    import tensorflow as tf

    images = np.stack([np.asarray(each.read()) for each in records.stored(role, range(records.count(role)))])
    return tf.data.Dataset.from_tensor_slices((images, records.labels(role)))


def original_data(records: Any, settings: Any, batch_size: int) -> tuple[Any, Any]:
    """Batches of (uint8 images as stored, labels): augmented train, plain val."""
    import tensorflow as tf

    from flatmin.inputs.augment import augment

    numbers = itertools.count()

    def vary(images: np.ndarray) -> np.ndarray:
        return np.stack(augment(list(images), settings.augment, settings.seeds[0], 0, next(numbers)))

    def varied(images: Any, labels: Any) -> tuple[Any, Any]:
        return tf.ensure_shape(tf.numpy_function(vary, [images], tf.uint8), images.shape), labels

    train = decoded(records, "train").shuffle(records.count("train"), seed=settings.seeds[0]).batch(batch_size)
    val = decoded(records, "val").batch(batch_size)
    return train.map(varied, tf.data.AUTOTUNE).prefetch(2), val.prefetch(2)


def keras_data(records: Any, settings: Any, batch_size: int) -> tuple[Any, Any]:
    """Batches of (float32 images at the network's size, labels): augmented train, plain val."""
    import keras
    import tensorflow as tf

    size = settings.extract.image_size
    layers = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.1)]

    def resized(image: Any, label: Any) -> tuple[Any, Any]:
        return tf.image.resize(image, (size, size)), label

    def varied(images: Any, labels: Any) -> tuple[Any, Any]:
        for layer in layers:
            images = layer(images, training=True)
        return images, labels

    train = decoded(records, "train").map(resized, tf.data.AUTOTUNE).cache()
    train = train.shuffle(records.count("train"), seed=settings.seeds[0]).batch(batch_size)
    val = decoded(records, "val").map(resized, tf.data.AUTOTUNE).cache().batch(batch_size)
    return train.map(varied, tf.data.AUTOTUNE).prefetch(2), val.prefetch(2)


def network(start: Any, pixels: Any, resize: bool) -> Any:
    """The backbone and head of a classifier behind in-model preprocessing, and resizing where asked.

    As in Keras' guide, the backbone runs in inference mode, so that BatchNorm keeps its statistics.
    """
    import keras

    from flatmin.models import registry

    size = start.description.image_size
    images = keras.layers.Resizing(size, size)(pixels) if resize else pixels
    prepared = registry.preprocess(start.description.backbone, images)
    return keras.Model(pixels, start.head(start.features(prepared, training=False)))


def starting_point(settings: Any, records: Any, stage: str) -> Any:
    """A new classifier with its backbone frozen, or the selected one, trained from the split point on."""
    from flatmin.models import classifier, registry, split

    name = settings.backbones[0]
    if stage == "extract":
        recipe = settings.extract
        start = classifier.create(
            name,
            records.class_names,
            image_size=recipe.image_size,
            dropout=recipe.dropout,
            seed=settings.seeds[0],
            weights=recipe.weights.get(name, "imagenet"),
        )
        start.base.trainable = False
        return start
    start = classifier.load("models/select", dropout=settings.finetune.dropout, seed=settings.seeds[0])
    split_at = settings.finetune.fine_tune_at or registry.find(name).fine_tune_at
    for layer in start.base.layers[: split.layer_index(start.base, split_at)]:
        layer.trainable = False
    return start


def main(pipeline: str, stage: str, epochs: str) -> None:
    """Train one of the two pipelines for so many epochs, with the optimizer and batch size of the stage's recipe."""
    with console.importing_tensorflow():
        import keras

        from flatmin import runtime
        from flatmin.inputs.records import Records
        from flatmin.training.optimizer import make_optimizer

    print("ready", flush=True)
    settings = params.load()
    recipe = getattr(settings, stage)
    runtime.set_matmul(settings.runtime)
    keras.utils.set_random_seed(settings.seeds[0])
    records = Records("data/records")
    data = {"original": original_data, "keras": keras_data}[pipeline]
    train, val = data(records, settings, recipe.batch_size)
    pixels = keras.Input(train.element_spec[0].shape[1:], dtype=train.element_spec[0].dtype)
    model = network(starting_point(settings, records, stage), pixels, resize=pipeline == "original")
    model.compile(
        make_optimizer(recipe),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    def say(epoch: int, logs: dict[str, float]) -> None:
        title = f"{pipeline} {stage} {epoch + 1}/{epochs}"
        print(f"{title}: loss {logs['loss']:.4f}, val accuracy {logs['val_accuracy']:.4f}", flush=True)

    done = keras.callbacks.LambdaCallback(on_epoch_end=say)
    model.fit(train, validation_data=val, epochs=int(epochs), verbose=0, callbacks=[done])


if __name__ == "__main__":
    errors.run(main, *sys.argv[1:])
