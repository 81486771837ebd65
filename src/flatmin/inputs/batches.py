"""Batches of images at the network's size, augmented or not; and which worker trains on which examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin.common.params import Balance
from flatmin.inputs import workers
from flatmin.inputs.augment import AUGMENT_CHUNK
from flatmin.inputs.pixels import Task
from flatmin.inputs.records import Records
from flatmin.inputs.sampling import draw
from flatmin.inputs.workers import Augmenter

# Finished images held in memory for shuffling; smaller data sets are shuffled as a whole.
SHUFFLE_BYTES = 130 * 10**6
PREFETCH_BYTES = 70 * 10**6
_READ_TOGETHER = 16  # images a task, when they are read as they are

Batches = Iterator[tuple[np.ndarray, np.ndarray]]


def derived_seed(*numbers: int) -> int:
    """Derive a seed in [0, 2**31) from non-negative integers; other integers give another seed, but by chance."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def plain(records: Records, role: str, size: int, batch_size: int, positions: Iterable[int] | None = None) -> Batches:
    """Read images as they are: batches of (float32 [batch, size, size, 3] in [0, 255], int32 [batch]), in order.

    Args:
        positions: of the images in the records; by default all.
    """
    chosen = np.arange(records.count(role)) if positions is None else np.fromiter(positions, np.int64)
    labels = records.labels(role)
    starts = range(0, len(chosen), batch_size)
    parts = [chosen[start : start + batch_size] for start in starts]
    tasks = (
        Task(records.stored(role, part[first : first + _READ_TOGETHER]), size, records.fit(role))
        for part in parts
        for first in range(0, len(part), _READ_TOGETHER)
    )
    images = workers.read(tasks)
    for part in parts:
        batch = np.empty((len(part), size, size, 3), np.float32)
        for first in range(0, len(part), _READ_TOGETHER):
            batch[first : first + _READ_TOGETHER] = next(images)
        yield batch, labels[part]


def sample(records: Records, size: int, every: int, batch_size: int) -> Batches:
    """Batches like `plain`'s of every `every`-th train image, from the first one on. No other image is read."""
    return plain(records, "train", size, batch_size, range(0, records.count("train"), every))


def augmented(
    records: Records,
    augmenter: Augmenter,
    size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    sampling: Balance = "none",
) -> Batches:
    """One epoch's training images, augmented and shuffled for this epoch.

    Chunks are augmented in a random order, then images are shuffled within a buffer of at most SHUFFLE_BYTES. The order
    depends on (seed, epoch) and the size alone. The last batch may be smaller. An image that balanced `sampling` draws
    several times is augmented once.

    Returns:
        Batches of (uint8 [batch, size, size, 3], int32 [batch]); the labels are `Records.training_labels`.
    """
    random = np.random.default_rng(derived_seed(seed, epoch))
    numbers = random.permutation(math.ceil(records.count("train") / AUGMENT_CHUNK))
    chunks = augmented_chunks(records, augmenter, size, epoch, numbers.tolist())
    if sampling != "none":
        drawn = draw(records.labels("train"), sampling, np.random.default_rng(derived_seed(seed, epoch, 1)))
        times = np.bincount(drawn, minlength=records.count("train"))
        chunks = (
            (np.broadcast_to(image, (often, *image.shape)), np.full(often, label))  # not copied before it is drawn
            for (images, labels), number in zip(chunks, numbers.tolist(), strict=True)
            for image, label, often in zip(images, labels, times[number * AUGMENT_CHUNK :][: len(labels)], strict=True)
        )
    shuffled = _shuffled(chunks, max(AUGMENT_CHUNK, SHUFFLE_BYTES // (3 * size**2)), random)
    while batch := list(itertools.islice(shuffled, batch_size)):
        images, labels = zip(*batch, strict=True)
        yield np.stack(images), np.array(labels, np.int32)


def _shuffled(chunks: Batches, held_at_most: int, random: np.random.Generator) -> Iterator[tuple[np.ndarray, int]]:
    """Give (image, label) one by one, each drawn from those that are held."""
    held: list[tuple[np.ndarray, int]] = []
    for images, labels in chunks:
        for image, label in zip(images, labels.tolist(), strict=True):
            if len(held) >= held_at_most:
                place = int(random.integers(len(held)))
                yield held[place]
                held[place] = held[-1]
                held.pop()
            held.append((image.copy(), label))  # a view would hold its whole chunk
    for place in random.permutation(len(held)):
        yield held[place]


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
        return np.flatnonzero(self.replica_for(np.arange(count)) // self.replicas == self.worker)

    def chunks(self, count: int) -> list[int]:
        """The numbers of this worker's chunks, out of those of `count` examples."""
        numbers: list[int] = np.unique(self.examples(count) // AUGMENT_CHUNK).tolist()
        return numbers


def augmented_chunks(records: Records, augmenter: Augmenter, size: int, epoch: int, numbers: Sequence[int]) -> Batches:
    """Augment these chunks of train images, in this order: (uint8 [images, size, size, 3], int32 [images]) of each."""
    labels = records.training_labels()
    chunks = augmenter.chunks(records, size, epoch, numbers)
    for number, images in zip(numbers, chunks, strict=True):
        yield images, labels[number * AUGMENT_CHUNK :][: len(images)]


def from_generator(make: Callable[[], Iterator[Any]], signature: Any, batch_bytes: int) -> tf.data.Dataset:
    """`tf.data.Dataset.from_generator` that prefetches up to four batches, as long as they fit into PREFETCH_BYTES.

    tf.data's autotuning is off: its thread can take up to five seconds to notice that an iterator was closed, and
    blocks the end of an epoch for that long.

    Args:
        batch_bytes: the size of what the generator gives at a time.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = tf.data.Dataset.from_generator(make, output_signature=signature).with_options(options)
    ahead = min(4, PREFETCH_BYTES // batch_bytes)
    return dataset.prefetch(ahead) if ahead else dataset
