"""Batches of images resized to the network's input, augmented or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin.inputs.augment import CHUNK, Augmenter
from flatmin.inputs.records import Records, without_autotune

# So many bytes of decoded images are held to be shuffled; data sets below it are shuffled as a whole.
SHUFFLE_BYTES = 2**30

TRUNK_BATCH = CHUNK


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """uint8 [..., h, w, 3] to float32 [..., size, size, 3], still 0 to 255; bilinear, smoothed where it shrinks."""
    resized = tf.cond(
        tf.reduce_any(tf.shape(image)[-3:-1] > size),
        lambda: tf.image.resize(image, (size, size), antialias=True),
        lambda: tf.image.resize(image, (size, size)),  # the same where it grows, and twice as quick
    )
    return tf.ensure_shape(resized, (*image.shape[:-3], size, size, 3))


def derived_seed(*numbers: int) -> int:
    """A seed below 2**31 that no other non-negative numbers give, but by chance."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def plain(records: Records, role: str, size: int, batch_size: int) -> tf.data.Dataset:
    """Batches of (float32 [batch, size, size, 3], int32 [batch]) in the records' order, un-augmented."""
    return _batches(records.images(role), size, batch_size)


def sample(records: Records, size: int, every: int, batch_size: int = TRUNK_BATCH) -> tf.data.Dataset:
    """Batches as `plain`'s of every so-many-th train image, the first one included."""
    return _batches(records.images("train", lambda position: position % every == 0), size, batch_size)


def augmented(
    records: Records, augmenter: Augmenter, size: int, batch_size: int, seed: int, epoch: int
) -> tf.data.Dataset:
    """The training images of one epoch, freshly augmented and in an order of that epoch's own.

    Batches are as `plain`'s; the last may be smaller. Equal (seed, epoch) give equal batches.
    """
    order = derived_seed(seed, epoch)

    def one_by_one() -> Iterator[tuple[np.ndarray, np.int32]]:
        for images, labels in augmented_chunks(records, augmenter, epoch, Share()):
            yield from zip(images, labels, strict=True)

    dataset = from_generator(one_by_one, (tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec((), tf.int32)))
    dataset = dataset.shuffle(_shuffle_buffer(records), seed=order, reshuffle_each_iteration=False)
    return _batches(dataset, size, batch_size)


def _batches(images: tf.data.Dataset, size: int, batch_size: int) -> tf.data.Dataset:
    dataset = images.map(lambda image, label: (resize(image, size), label), tf.data.AUTOTUNE)
    return dataset.batch(batch_size).prefetch(2)


@dataclass(frozen=True)
class Share:
    """The examples whose views a worker computes and trains on: those of its replicas' chunks.

    Chunk c belongs to replica c mod (workers * replicas); worker w has the replicas from w * replicas on.
    """

    worker: int = 0
    workers: int = 1
    replicas: int = 1

    def replica_of(self, examples: np.ndarray) -> np.ndarray:
        """int [n]: which replica of all takes these examples (int [n], positions in the records)."""
        return examples // CHUNK % (self.workers * self.replicas)

    def examples(self, count: int) -> np.ndarray:
        """int [n]: the positions of this worker's, of `count` examples."""
        return np.flatnonzero(self.has(np.arange(count)))

    def has(self, example: Any) -> Any:
        """Whether examples are this worker's: bools for positions in the records, array or tensor alike."""
        return example // CHUNK % (self.workers * self.replicas) // self.replicas == self.worker


def augmented_chunks(
    records: Records, augmenter: Augmenter, epoch: int, share: Share
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """A share's training images in the records' order, augmented, and their labels, chunk by chunk."""
    labels = records.labels("train")
    mine = [chunk for chunk in range(math.ceil(len(labels) / CHUNK)) if share.has(chunk * CHUNK)]
    images = records.arrays("train", share.has)
    for number, chunk in zip(mine, augmenter.chunks(images, epoch, mine), strict=True):
        yield chunk, labels[number * CHUNK :][: len(chunk)]


def from_generator(make: Callable[[], Iterator[Any]], signature: Any) -> tf.data.Dataset:
    return without_autotune(tf.data.Dataset.from_generator(make, output_signature=signature))


def stacked(images: list[np.ndarray], size: int) -> np.ndarray:
    """float32 [len(images), height, width, 3]: as they are where they are alike and not large, else of `size`."""
    if len({image.shape for image in images}) > 1 or max(images[0].shape) > size:
        images = [resize(tf.constant(image), size).numpy() for image in images]
    return np.stack(images).astype(np.float32)


def _shuffle_buffer(records: Records) -> int:
    image_bytes = int(records.mean_pixels("train") * 3)
    return max(CHUNK, min(records.count("train"), SHUFFLE_BYTES // max(1, image_bytes)))
