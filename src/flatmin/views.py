"""The images that a stage sees, resized to the network's input; and what a frozen trunk makes of them, kept on disk.

A trunk's activations of an image never change while a tail is trained, so each augmented view is computed once.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin import cache, reporting, runtime, trunk
from flatmin.augment import CHUNK, Augmenter
from flatmin.classifier import Classifier
from flatmin.params import Params
from flatmin.records import Records, not_tuned
from flatmin.reporting import InputError

# So many bytes of decoded images are held to be shuffled; data sets below it are shuffled as a whole.
SHUFFLE_BYTES = 2**30
TRUNK_BATCH = CHUNK
DTYPE = np.dtype(np.float16)
# Whose code decides what a view holds.
MODULES = ("augment", "augment_ops", "backbones", "classifier", "records", "runtime", "trunk", "views")
BESIDE = 1024  # bytes of a file's header and checksum, at most


def resize(image: tf.Tensor, size: int) -> tf.Tensor:
    """uint8 [..., h, w, 3] to float32 [..., size, size, 3], still 0 to 255; bilinear, smoothed where it shrinks."""
    resized = tf.cond(
        tf.reduce_any(tf.shape(image)[-3:-1] > size),
        lambda: tf.image.resize(image, (size, size), antialias=True),
        lambda: tf.image.resize(image, (size, size)),  # the same where it grows, and twice as quick
    )
    return tf.ensure_shape(resized, (*image.shape[:-3], size, size, 3))


def plain(records: Records, role: str, size: int, batch_size: int) -> tf.data.Dataset:
    """Batches of (float32 [batch, size, size, 3], int32 [batch]) in the records' order, un-augmented."""
    return _batches(records.images(role), size, batch_size)


def augmented(
    records: Records, augmenter: Augmenter, size: int, batch_size: int, seed: int, epoch: int
) -> tf.data.Dataset:
    """The training images of one epoch, freshly augmented and in an order of that epoch's own.

    Batches are as `plain`'s; the last may be smaller. Equal (seed, epoch) give equal batches.
    """
    order = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0] >> 1)

    def one_by_one() -> Iterator[tuple[np.ndarray, np.int32]]:
        for images, labels in _chunks(records, augmenter, epoch, Share()):
            yield from zip(images, labels, strict=True)

    dataset = _generated(one_by_one, (tf.TensorSpec((None, None, 3), tf.uint8), tf.TensorSpec((), tf.int32)))
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

    def has(self, example: Any) -> Any:
        """Whether examples are this worker's: bools for positions in the records, array or tensor alike."""
        return example // CHUNK % (self.workers * self.replicas) // self.replicas == self.worker


def _chunks(
    records: Records, augmenter: Augmenter, epoch: int, share: Share
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """A share's training images in the records' order, augmented, and their labels, chunk by chunk."""
    labels = records.labels("train")
    mine = [chunk for chunk in range(math.ceil(len(labels) / CHUNK)) if share.has(chunk * CHUNK)]
    images = records.arrays("train", share.has)
    for number, chunk in zip(mine, augmenter.chunks(images, epoch, mine), strict=True):
        yield chunk, labels[number * CHUNK :][: len(chunk)]


def _generated(make: Callable[[], Iterator[Any]], signature: Any) -> tf.data.Dataset:
    return not_tuned(tf.data.Dataset.from_generator(make, output_signature=signature))


def _stacked(images: list[np.ndarray], size: int) -> np.ndarray:
    """float32 [len(images), height, width, 3]: as they are where they are alike and not large, else of `size`."""
    if len({image.shape for image in images}) > 1 or max(images[0].shape) > size:
        images = [resize(tf.constant(image), size).numpy() for image in images]
    return np.stack(images).astype(np.float32)


def _shuffle_buffer(records: Records) -> int:
    image_bytes = int(records.mean_pixels("train") * 3)
    return max(CHUNK, min(records.count("train"), SHUFFLE_BYTES // max(1, image_bytes)))


class Activations:
    """Boundary tensors of many examples on disk: one .npy file each, float16 [examples, ...].

    They are read, not mapped: mapped pages count as the process's memory, which would grow with the data.
    """

    def __init__(self, entry: cache.Entry) -> None:
        self._entry = entry  # held, so that nobody prunes it
        mapped = [np.load(path, mmap_mode="r") for path in sorted(entry.folder.glob("boundary_*.npy"))]
        self._files = [os.open(array.filename, os.O_RDONLY) for array in mapped]
        self._offsets = [array.offset for array in mapped]
        self.shapes = [array.shape[1:] for array in mapped]
        self.count = len(mapped[0])

    def read(self, examples: Sequence[int] | np.ndarray) -> tuple[np.ndarray, ...]:
        """float16 [len(examples), ...] of each boundary tensor, for positions in the file."""
        found = tuple(np.empty((len(examples), *shape), DTYPE) for shape in self.shapes)
        for file, offset, array in zip(self._files, self._offsets, found, strict=True):
            rows = array.reshape(len(examples), math.prod(array.shape[1:])).view(np.uint8)
            for row, example in zip(rows, examples, strict=True):
                os.preadv(file, [row], offset + int(example) * row.nbytes)
        return found

    def signature(self) -> tuple[tuple[tf.TensorSpec, ...], tf.TensorSpec]:
        """Of what `read` gives for any number of examples, and of their labels."""
        return tuple(tf.TensorSpec((None, *shape), DTYPE) for shape in self.shapes), tf.TensorSpec((None,), tf.int32)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._entry.close()


class Views:
    """The augmented views that a training goes through, and val's plain one: computed where the cache lacks them."""

    def __init__(self, records: Records, model: Classifier, params: Params, number: int, share: Share) -> None:
        """Compute what is missing of `number` views of the share's train images, and of one of all val images.

        Raises:
            InputError: the cache can't hold them, which is said before a view is computed.
        """
        self.records = records
        self.params = params
        self.share = share
        self.size = model.description.image_size
        self.trunk, _ = model.cut(model.description.fine_tune_at)
        identity = model.trunk_identity(model.description.fine_tune_at)
        self._examples = np.flatnonzero(share.has(np.arange(records.count("train"))))

        @functools.cache
        def engine() -> tuple[str, trunk.Run]:
            sample = next(iter(plain(records, "train", self.size, TRUNK_BATCH)))[0].numpy()
            return trunk.engine(self.trunk, identity, params.runtime, sample)

        def named(engine: str) -> dict[int | None, str]:
            return {view: self._key(identity, engine, view) for view in (None, *range(number))}

        def missing_of(keys: Mapping[int | None, str]) -> list[int | None]:
            return [view for view, key in keys.items() if not cache.exists("views", key)]

        # Niceness: what interrupts one of LiteRT's threads holds up the others, which wait for it.
        with ExitStack() as stack, Augmenter(params.augment, params.seed, niceness=10) as augmenter:
            self.engine = trunk.preferred(params.runtime)
            if lacking := missing_of(named(self.engine)):
                if lacking != [None]:
                    augmenter.start()  # while the trunk is converted
                self.engine = engine()[0]
            keys = named(self.engine)

            def opened(view: int | None) -> Activations:
                title = "val activations" if view is None else f"view {view + 1}/{number}"

                def fill(folder: Path) -> None:
                    name, run = engine()
                    if name != self.engine:  # all views seemed to be there, and one was broken
                        raise InputError(f"{title}: expected {self.engine}, which made the others, received {name}")
                    self._fill(folder, view, title, augmenter, run)

                return stack.enter_context(closing(Activations(cache.Entry("views", keys[view], fill))))

            missing = missing_of(keys)
            found = {view: opened(view) for view in keys if view not in missing}  # held, so not pruned for the others
            if missing:
                cache.make_room("views", sum(self._bytes(view) + BESIDE * len(self.trunk.outputs) for view in missing))
            found |= {view: opened(view) for view in missing}
            self._opened = stack.pop_all()
        self.val = found[None]
        self.train = [found[view] for view in range(number)]

    def _key(self, identity: Mapping[str, Any], engine: str, view: int | None) -> str:
        """Of a view of the train images, or of val's plain one, which is None."""
        depends_on: dict[str, Any] = {
            "trunk": identity,
            "engine": engine,
            "math": [self.params.runtime.math, self.params.runtime.deterministic, runtime.has_float16()],
            "machine": runtime.machine(),
            "records": self.records.digest,
        }
        if view is not None:
            augment = self.params.augment.model_dump()
            depends_on |= {"view": view, "augment": augment, "seed": self.params.seed, "share": asdict(self.share)}
        return cache.key(depends_on, modules=MODULES)

    def _count(self, view: int | None) -> int:
        return self.records.count("val") if view is None else len(self._examples)

    def _bytes(self, view: int | None) -> int:
        values = sum(math.prod(tensor.shape[1:]) for tensor in self.trunk.outputs)
        return self._count(view) * values * DTYPE.itemsize

    def _fill(self, folder: Path, view: int | None, title: str, augmenter: Augmenter, run: trunk.Run) -> None:
        """Run the trunk over a view, batch by batch, into `folder`."""
        count = self._count(view)
        started = time.monotonic()
        with ExitStack() as stack:
            files = []
            for index, tensor in enumerate(self.trunk.outputs):
                file = stack.enter_context((folder / f"boundary_{index:02d}.npy").open("wb"))
                header = {"descr": DTYPE.str, "fortran_order": False, "shape": (count, *tensor.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
                files.append(file)
            for pixels in reporting.progress(
                self._pixels(view, augmenter), title, math.ceil(count / TRUNK_BATCH), "batch"
            ):
                for tensor, file in zip(run(pixels), files, strict=True):
                    file.write(_halved(tensor).data)
        reporting.log(f"{title}: {count} images, {self._bytes(view)} bytes ({time.monotonic() - started:.1f} s)")

    def _pixels(self, view: int | None, augmenter: Augmenter) -> Iterator[np.ndarray]:
        """A view's images for the trunk, float32 [at most TRUNK_BATCH, size, size, 3] at a time."""
        if view is None:
            images = plain(self.records, "val", self.size, TRUNK_BATCH).map(lambda pixels, _: pixels)
        else:

            def stacked() -> Iterator[np.ndarray]:
                for chunk, _ in _chunks(self.records, augmenter, view, self.share):
                    yield _stacked(chunk, self.size)

            # Resized behind the generator: LiteRT holds Python's lock while it computes.
            images = _generated(stacked, tf.TensorSpec((None, None, None, 3), tf.float32)).prefetch(4)
            images = images.map(lambda chunk: resize(chunk, self.size)).prefetch(2)
        yield from images.as_numpy_iterator()

    def epoch(self, number: int, batch_size: int) -> tf.data.Dataset:
        """The share's parts of an epoch's batches: (tuple of float16 boundary tensors, int32 labels).

        The batches are those that one device would get; each is one part a replica, in the replicas' order, and a part
        may be empty.
        """
        of_view = self.train[number % len(self.train)]
        labels = self.records.labels("train")
        order = np.random.default_rng([self.params.seed, number]).permutation(len(labels))
        first = self.share.worker * self.share.replicas

        def parts() -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
            for start in range(0, len(order), batch_size):
                examples = order[start : start + batch_size]
                replicas = self.share.replica_of(examples)
                for replica in range(first, first + self.share.replicas):
                    part = examples[replicas == replica]
                    yield of_view.read(np.searchsorted(self._examples, part)), labels[part]

        return _generated(parts, of_view.signature()).prefetch(4)

    def val_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Boundary tensors, float16, of val in the records' order."""
        positions = np.arange(self.records.count("val"))
        for start in range(0, len(positions), batch_size):
            yield self.val.read(positions[start : start + batch_size])

    def close(self) -> None:
        """Close the files and let the entries be pruned."""
        self._opened.close()


def _halved(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(tensor, DTYPE)
    if not np.isfinite(halves).all():
        raise InputError(
            f"views: expected activations that float16 holds, received "
            f"{np.abs(tensor).max():.3g}; `views: 0` does without"
        )
    return halves
