"""Activations of the frozen layers, computed once for each augmented view of the training images, and kept on disk.

The frozen layers never change while the others are trained, so neither do their activations of an image.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Augment, Balance, Runtime
from flatmin.features import cache, engine
from flatmin.features.engine import EXTRACTOR_BATCH, Engine
from flatmin.inputs import batches
from flatmin.inputs.batches import WorkerShard
from flatmin.inputs.records import Records
from flatmin.inputs.sampling import draw
from flatmin.inputs.workers import Augmenter
from flatmin.models.classifier import Classifier
from flatmin.runtime import machine

DTYPE = np.dtype(np.float16)
FILE_OVERHEAD_BYTES = 1024  # of a file's header and checksum, at most

View = int | str  # the number of an augmented view of the train images, or a role, whose images are as they are


class Activations:
    """Activations of many examples on disk: one .npy file for each tensor at the split, float16 [examples, ...].

    They are read and not mapped: mapped pages count as the process's memory, which would grow with the data.
    """

    def __init__(self, entry: cache.Entry) -> None:
        self._entry = entry  # held, so that nobody prunes it
        mapped = [np.load(path, mmap_mode="r") for path in sorted(entry.folder.glob("activations_*.npy"))]
        self._files = [os.open(array.filename, os.O_RDONLY) for array in mapped]
        self._offsets = [array.offset for array in mapped]
        self.shapes = [array.shape[1:] for array in mapped]
        self.count = len(mapped[0])

    def read(self, examples: Sequence[int] | np.ndarray) -> tuple[np.ndarray, ...]:
        """Read each tensor, float16 [len(examples), ...], for positions in the file."""
        tensors = tuple(np.empty((len(examples), *shape), DTYPE) for shape in self.shapes)
        for file, offset, array in zip(self._files, self._offsets, tensors, strict=True):
            rows = array.reshape(len(examples), math.prod(array.shape[1:])).view(np.uint8)
            for row, example in zip(rows, examples, strict=True):
                if os.preadv(file, [row], offset + int(example) * row.nbytes) != row.nbytes:
                    raise InputError(
                        f"{self._entry.folder}: expected complete files, received a truncated one; run it again"
                    )
        return tensors

    def signature(self) -> tuple[tuple[tf.TensorSpec, ...], tf.TensorSpec]:
        """The signature of what `read` returns for any number of examples, and of their labels."""
        return tuple(tf.TensorSpec((None, *shape), DTYPE) for shape in self.shapes), tf.TensorSpec((None,), tf.int32)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._entry.close()


def compute(
    records: Records,
    model: Classifier,
    *,
    runtime: Runtime,
    augment: Augment,
    seed: int,
    views: int,
    shard: WorkerShard,
    sampling: Balance = "none",
) -> FeatureStore:
    """Compute what the cache lacks of `views` augmented views of the shard's train images, and of val's images.

    Takes minutes and gigabytes where much is missing; a second call finds everything.

    Raises:
        InputError: the cache has no room for them, which is known before the first view is computed.
    """
    with ExitStack() as stack, Augmenter(augment, seed) as augmenter:
        extractor = _extractor(records, model, runtime, augmenter, shard)
        view_keys = extractor.keys(augment, seed, ("val", *range(views)))
        if any(view != "val" and not cache.exists("views", key) for view, key in view_keys.items()):
            augmenter.start()
        activations = extractor.open(view_keys, stack)
        return FeatureStore(records, seed, shard, sampling, extractor.engine.name, activations, stack.pop_all())


@contextmanager
def plain(
    records: Records, model: Classifier, *, runtime: Runtime, roles: Iterable[str]
) -> Iterator[dict[str, Activations]]:
    """Within the block: the activations of all images of each role as they are, at the classifier's split.

    What the cache lacks is computed, such as train's where every training augments.

    Raises:
        InputError: as `compute`.
    """
    augment = Augment(engine="none")
    with ExitStack() as stack, Augmenter(augment, 0) as augmenter:
        extractor = _extractor(records, model, runtime, augmenter, WorkerShard())
        activations = extractor.open(extractor.keys(augment, 0, roles), stack)
        yield {str(role): each for role, each in activations.items()}


def _extractor(
    records: Records, model: Classifier, runtime: Runtime, augmenter: Augmenter, shard: WorkerShard
) -> _Extractor:
    frozen, _ = model.split(model.description.fine_tune_at)
    identity = model.frozen_identity(model.description.fine_tune_at)
    size = model.description.image_size

    def first_batch() -> np.ndarray:
        augmenter.start()  # which takes seconds, while the frozen layers are converted
        count = min(EXTRACTOR_BATCH, records.count("train"))
        return next(batches.plain(records, "train", size, count, range(count)))[0]

    chosen = engine.choose(frozen, identity, runtime, first_batch)
    depends_on = {
        "frozen": identity,
        "engine": chosen.name,
        "matmul": [runtime.matmul, runtime.deterministic],
        "machine": machine(),
    }
    return _Extractor(records, frozen, chosen, size, augmenter, shard, depends_on)


@dataclass(frozen=True)
class _Extractor:
    """Writes the activations of views. depends_on: what all of them depend on, but the images."""

    records: Records
    frozen: keras.Model
    engine: Engine
    size: int
    augmenter: Augmenter
    shard: WorkerShard
    depends_on: dict[str, Any]

    def keys(self, augment: Augment, seed: int, views: Iterable[View]) -> dict[View, str]:
        """The cache's key of each view."""
        augmented = {"augment": augment.model_dump(), "seed": seed, "shard": asdict(self.shard)}

        def images(view: View) -> dict[str, Any]:
            if isinstance(view, str):
                return {"records": self.records.digest(view)}
            return {"records": self.records.digest("train"), **augmented, "view": view}

        return {view: cache.key(self.depends_on | images(view), rooms=cache.ACTIVATION_ROOMS) for view in views}

    def open(self, keys: Mapping[View, str], stack: ExitStack) -> dict[View, Activations]:
        """Open the views of these keys, in their order, and compute what the cache lacks.

        They are closed with the stack.
        """
        views = sum(isinstance(view, int) for view in keys)
        missing = [view for view, key in keys.items() if not cache.exists("views", key)]

        def open_view(view: View) -> Activations:
            fill = functools.partial(self.fill, view=view, views=views)
            return stack.enter_context(closing(Activations(cache.open_entry("views", keys[view], fill))))

        # Those that are there are opened first, so that making room does not prune them.
        activations = {view: open_view(view) for view in keys if view not in missing}
        if missing:
            cache.make_room("views", self.bytes(missing))
        activations |= {view: open_view(view) for view in missing}
        return {view: activations[view] for view in keys}

    def bytes(self, views: Iterable[View]) -> int:
        """The size of these views on disk, at most."""
        values = sum(math.prod(tensor.shape[1:]) for tensor in self.frozen.outputs)
        overhead = FILE_OVERHEAD_BYTES * len(self.frozen.outputs)
        return sum(self._count(view) * values * DTYPE.itemsize + overhead for view in views)

    def _count(self, view: View) -> int:
        if isinstance(view, str):
            return self.records.count(view)
        return len(self.shard.examples(self.records.count("train")))

    def fill(self, folder: Path, view: View, views: int) -> None:
        """Run the frozen layers on a view's images, batch by batch, and write their activations to `folder`."""
        title = f"{view} activations" if isinstance(view, str) else f"view {view + 1}/{views}"
        count = self._count(view)
        started = time.monotonic()
        with ExitStack() as stack:
            files = []
            for index, tensor in enumerate(self.frozen.outputs):
                file = stack.enter_context((folder / f"activations_{index:02d}.npy").open("wb"))
                header = {"descr": DTYPE.str, "fortran_order": False, "shape": (count, *tensor.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
                files.append(file)
            total = math.ceil(count / EXTRACTOR_BATCH)
            for pixels in console.progress(self._pixels(view), title, total, "batch"):
                for tensor, file in zip(self.engine(pixels), files, strict=True):
                    file.write(_to_float16(tensor).data)
            written = sum(file.tell() for file in files)
        console.log(f"{title}: {count} images, {written} bytes ({time.monotonic() - started:.1f} s)")

    def _pixels(self, view: View) -> Iterator[np.ndarray]:
        """Give a view's images in batches, of EXTRACTOR_BATCH or by chunk: float32 [batch, size, size, 3]."""
        if isinstance(view, str):
            for pixels, _ in batches.plain(self.records, view, self.size, EXTRACTOR_BATCH):
                yield pixels
            return
        numbers = self.shard.chunks(self.records.count("train"))
        for images in self.augmenter.chunks(self.records, self.size, view, numbers):
            yield images.astype(np.float32)


class FeatureStore:
    """The cached activations that a training reads: those of its augmented views, and of val. Made by `compute`.

    Attributes:
        engine: the name of the engine that computed them.
    """

    def __init__(
        self,
        records: Records,
        seed: int,
        shard: WorkerShard,
        sampling: Balance,
        engine: str,
        activations: dict[View, Activations],
        opened: ExitStack,
    ) -> None:
        self.engine = engine
        self.val = activations["val"]
        self.train = [activations[view] for view in range(len(activations) - 1)]
        self._records, self._seed, self._shard, self._sampling = records, seed, shard, sampling
        self._examples = shard.examples(records.count("train"))
        self._opened = opened

    def epoch(self, number: int, batch_size: int, skipped: int = 0) -> tf.data.Dataset:
        """The shard's parts of an epoch's batches but the first `skipped`: (tuple of float16 activations, labels).

        The batches are those of a single device. Each is split into one part for each replica, in the replicas' order;
        a part may be empty.
        """
        view = self.train[number % len(self.train)]
        labels = self._records.training_labels()
        order = draw(self._records.labels("train"), self._sampling, np.random.default_rng([self._seed, number]))
        first = self._shard.worker * self._shard.replicas

        def parts() -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
            for start in range(skipped * batch_size, len(order), batch_size):
                examples = order[start : start + batch_size]
                replicas = self._shard.replica_for(examples)
                for replica in range(first, first + self._shard.replicas):
                    part = examples[replicas == replica]
                    yield view.read(np.searchsorted(self._examples, part)), labels[part]

        batch_bytes = batch_size * sum(math.prod(shape) for shape in view.shapes) * DTYPE.itemsize
        return batches.from_generator(parts, view.signature(), batch_bytes)

    def val_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Val's activations, float16, in the records' order."""
        positions = np.arange(self._records.count("val"))
        for start in range(0, len(positions), batch_size):
            yield self.val.read(positions[start : start + batch_size])

    def close(self) -> None:
        """Close the files and let the entries be pruned."""
        self._opened.close()


def _to_float16(tensor: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(tensor, DTYPE)
    if not np.isfinite(halves).all():
        raise InputError(
            f"views: expected activations that float16 can hold, received {np.abs(tensor).max():.3g}; "
            "`views: 0` computes them in every epoch instead"
        )
    return halves
