"""Sources of a training's batches: images augmented again in every epoch, or cached activations of a few views."""

from __future__ import annotations

import itertools
import math
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from flatmin.common import console
from flatmin.common.params import Balance
from flatmin.features.store import FeatureStore
from flatmin.inputs import batches
from flatmin.inputs.batches import Batches
from flatmin.inputs.records import Records
from flatmin.inputs.workers import Augmenter
from flatmin.models.classifier import Classifier, TrainedLayers


class BatchSource(Protocol):
    """Gives batches of inputs and labels, and says how inputs become activations at the split."""

    engine: str  # what runs the frozen layers on train images

    def epoch(self, number: int, strategy: tf.distribute.Strategy, skipped: int = 0) -> Any:
        """The batches of an epoch's train images but the first `skipped`, distributed over replicas.

        (inputs, int32 labels as `Records.training_labels` has them)
        """

    def activations(self, inputs: Any) -> Any:
        """The activations at the split, in a graph: one tensor, or a list of several."""

    def val_logits(self) -> np.ndarray:
        """The logits of all val images, float32 [n, classes]."""


class AugmentedImages:
    """Images, augmented again in every epoch; the frozen layers run within the training step."""

    engine = "tensorflow"

    def __init__(
        self,
        records: Records,
        model: Classifier,
        frozen: keras.Model,
        augmenter: Augmenter,
        seed: int,
        batch_size: int,
        sampling: Balance = "none",
    ) -> None:
        self._records, self._model, self._frozen, self._augmenter = records, model, frozen, augmenter
        self._seed, self._batch_size, self._sampling = seed, batch_size, sampling

    def epoch(self, number: int, strategy: tf.distribute.Strategy, skipped: int = 0) -> Any:
        size = self._model.description.image_size

        def rest() -> Batches:
            epoch = batches.augmented(
                self._records, self._augmenter, size, self._batch_size, self._seed, number, self._sampling
            )
            return itertools.islice(epoch, skipped, None)

        signature = (tf.TensorSpec((None, size, size, 3), tf.uint8), tf.TensorSpec((None,), tf.int32))
        images = batches.from_generator(rest, signature, self._batch_size * size**2 * 3)
        sharding = tf.data.Options()
        sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
        return strategy.experimental_distribute_dataset(images.with_options(sharding))

    def activations(self, inputs: Any) -> Any:
        return self._frozen(tf.cast(inputs, tf.float32), training=False)

    def val_logits(self) -> np.ndarray:
        return logits_from_images(self._model, self._records, self._batch_size, self._records.count("val"))


class CachedActivations:
    """Activations of a few augmented views of each image; epoch e takes view e mod views."""

    def __init__(
        self, store: FeatureStore, frozen: keras.Model, layers: TrainedLayers, batch_size: int, val_images: int
    ) -> None:
        self.engine = store.engine
        self._store, self._frozen, self._batch_size, self._val_images = store, frozen, batch_size, val_images
        self._logits = tf.function(
            lambda inputs: layers(self.activations(inputs), training=False), reduce_retracing=True
        )

    def epoch(self, number: int, strategy: tf.distribute.Strategy, skipped: int = 0) -> Any:
        dataset = self._store.epoch(number, self._batch_size, skipped)
        return strategy.distribute_datasets_from_function(lambda _: dataset)

    def activations(self, inputs: Any) -> Any:
        cast = [tf.cast(tensor, like.dtype) for tensor, like in zip(inputs, self._frozen.outputs, strict=True)]
        return cast[0] if len(cast) == 1 else cast

    def val_logits(self) -> np.ndarray:
        cached = self._store.val_batches(self._batch_size)
        total = math.ceil(self._val_images / self._batch_size)
        return np.concatenate(
            [self._logits(inputs).numpy() for inputs in console.progress(cached, "validating", total, "batch")]
        )


def logits_from_images(model: Classifier, records: Records, batch_size: int, count: int) -> np.ndarray:
    """The logits of the first `count` val images by the assembled network, float32 [count, classes]."""
    images = batches.plain(records, "val", model.description.image_size, batch_size, range(count))
    return model.logits((pixels for pixels, _ in images), math.ceil(count / batch_size), "validating")
