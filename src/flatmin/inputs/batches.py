"""Batches of images resized to the network's input, augmented or not; and which worker trains on which examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin.inputs.augment import AUGMENT_CHUNK, Augmenter
from flatmin.inputs.records import Records, without_autotune

# Decoded images held in memory for shuffling; smaller data sets are shuffled as a whole.
SHUFFLE_BYTES = 2**30


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resize bilinearly, with antialiasing where the image shrinks.

    uint8 [..., height, width, 3] -> float32 [..., size, size, 3], still in [0, 255].
    """
    resized = tf.cond(
        tf.reduce_any(tf.shape(image)[-3:-1] > size),
        lambda: tf.image.resize(image, (size, size), antialias=True),
        lambda: tf.image.resize(image, (size, size)),  # the same for an image that grows, and twice as fast
    )
    return tf.ensure_shape(resized, (*image.shape[:-3], size, size, 3))


def derived_seed(*numbers: int) -> int:
    """Derive a seed in [0, 2**31) from non-negative integers; other integers give another seed, but by chance."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def plain(records: Records, role: str, size: int, batch_size: int) -> tf.data.Dataset:
    """Batches of (float32 [batch, size, size, 3], int32 [batch]) in the records' order, un-augmented."""
    return _batches(records.images(role), size, batch_size)


def sample(records: Records, size: int, every: int, batch_size: int) -> tf.data.Dataset:
    """Batches like `plain`'s of every `every`-th train image, from the first one on."""
    return _batches(records.images("train", lambda position: position % every == 0), size, batch_size)


def augmented(
    records: Records, augmenter: Augmenter, size: int, batch_size: int, seed: int, epoch: int
) -> tf.data.Dataset:
    """Batches like `plain`'s of one epoch's training images, augmented and shuffled for this epoch.

    The last batch may be smaller. Equal (seed, epoch) give equal batches. Labels are `Records.training_labels`.
    """
    order = derived_seed(seed, epoch)

    def one_by_one() -> Iterator[tuple[np.ndarray, np.int32]]:
        for images, labels in augmented_chunks(records, augmenter, epoch, WorkerShard()):
            yield from zip(images, labels, strict=True)

    dataset = from_generator(one_by_one, (tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec((), tf.int32)))
    dataset = dataset.shuffle(_shuffle_buffer(records), seed=order, reshuffle_each_iteration=False)
    return _batches(dataset, size, batch_size)


def _batches(images: tf.data.Dataset, size: int, batch_size: int) -> tf.data.Dataset:
    dataset = images.map(lambda image, label: (resize(image, size), label), tf.data.AUTOTUNE)
    return dataset.batch(batch_size).prefetch(2)


@dataclass(frozen=True)
class WorkerShard:
    """The training examples assigned to one worker: the augmentation chunks of its replicas.

    Chunk c belongs to replica c mod (workers * replicas); worker w has `replicas` replicas, from w * replicas on.
    """

    worker: int = 0
    workers: int = 1
    replicas: int = 1

    def replica_for(self, examples: np.ndarray) -> np.ndarray:
        """The replica that each example belongs to, counted over all workers.

        Args:
            examples: int [n], positions in the records.

        Returns:
            int [n].
        """
        return examples // AUGMENT_CHUNK % (self.workers * self.replicas)

    def examples(self, count: int) -> np.ndarray:
        """The positions of this worker's examples, int [n], out of `count`."""
        return np.flatnonzero(self.has(np.arange(count)))

    def has(self, example: Any) -> Any:
        """Whether examples are this worker's: bools for positions in the records, an array or a tensor."""
        return example // AUGMENT_CHUNK % (self.workers * self.replicas) // self.replicas == self.worker


def augmented_chunks(
    records: Records, augmenter: Augmenter, epoch: int, shard: WorkerShard
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Augment a shard's training images in the records' order; give images and labels chunk by chunk."""
    labels = records.training_labels()
    chunks = math.ceil(len(labels) / AUGMENT_CHUNK)
    numbers = [number for number in range(chunks) if shard.has(number * AUGMENT_CHUNK)]
    images = records.arrays("train", shard.has)
    for number, chunk in zip(numbers, augmenter.chunks(images, epoch, numbers), strict=True):
        yield chunk, labels[number * AUGMENT_CHUNK :][: len(chunk)]


def from_generator(make: Callable[[], Iterator[Any]], signature: Any) -> tf.data.Dataset:
    """`tf.data.Dataset.from_generator`, without tf.data's tuning thread."""
    return without_autotune(tf.data.Dataset.from_generator(make, output_signature=signature))


def stack(images: list[np.ndarray], size: int) -> np.ndarray:
    """Stack images for one call of `resize`: float32 [len(images), height, width, 3].

    Images of different sizes, or larger than `size`, are resized one by one first.
    """
    if len({image.shape for image in images}) > 1 or max(images[0].shape) > size:
        images = [resize(tf.constant(image), size).numpy() for image in images]
    return np.stack(images).astype(np.float32)


def _shuffle_buffer(records: Records) -> int:
    image_bytes = int(records.mean_pixels("train") * 3)
    return max(AUGMENT_CHUNK, min(records.count("train"), SHUFFLE_BYTES // max(1, image_bytes)))
