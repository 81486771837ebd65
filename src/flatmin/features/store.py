"""The images that a stage sees, resized to the network's input; and what a frozen trunk makes of them, kept on disk.

A trunk's activations of an image never change while a tail is trained, so each augmented view is computed once.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin import runtime
from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Params
from flatmin.features import cache, engine
from flatmin.inputs import batches
from flatmin.inputs.augment import Augmenter
from flatmin.inputs.batches import TRUNK_BATCH, Share
from flatmin.inputs.records import Records
from flatmin.models.classifier import Classifier

DTYPE = np.dtype(np.float16)
# Whose code decides what a view holds.
MODULES = ("augment", "augment_ops", "backbones", "classifier", "records", "runtime", "trunk", "views")
BESIDE = 1024  # bytes of a file's header and checksum, at most


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
                if os.preadv(file, [row], offset + int(example) * row.nbytes) != row.nbytes:
                    raise InputError(f"{self._entry.folder}: expected whole files, received one cut off; run it again")
        return found

    def signature(self) -> tuple[tuple[tf.TensorSpec, ...], tf.TensorSpec]:
        """Of what `read` gives for any number of examples, and of their labels."""
        return tuple(tf.TensorSpec((None, *shape), DTYPE) for shape in self.shapes), tf.TensorSpec((None,), tf.int32)

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._entry.close()


class _Maker:
    """Makes views, where the cache lacks them: of the share's train images by number, and val's plain one, None."""

    def __init__(
        self, records: Records, model: Classifier, params: Params, number: int, share: Share, augmenter: Augmenter
    ) -> None:
        self._records, self._params, self._share, self._augmenter = records, params, share, augmenter
        self.views: tuple[int | None, ...] = (None, *range(number))
        self._size = model.description.image_size
        self._trunk, _ = model.cut(model.description.fine_tune_at)
        self._identity = model.trunk_identity(model.description.fine_tune_at)
        self._run: engine.Run | None = None
        self.engine = engine.preferred(params.runtime)

    def missing(self) -> list[int | None]:
        """The views to make. Where there are any, what runs the trunk gets ready, and decides on `engine`."""
        lacking = self._lacking()
        if lacking:
            if lacking != [None]:
                self._augmenter.start()  # while the trunk is converted
            self.engine, self._run = self._started()
            lacking = self._lacking()  # of that engine
        return lacking

    def _lacking(self) -> list[int | None]:
        return [view for view in self.views if not cache.exists("views", self._key(view))]

    def _started(self) -> tuple[str, engine.Run]:
        sample = next(iter(batches.plain(self._records, "train", self._size, TRUNK_BATCH)))[0].numpy()
        return engine.engine(self._trunk, self._identity, self._params.runtime, sample)

    def _key(self, view: int | None) -> str:
        depends_on: dict[str, Any] = {
            "trunk": self._identity,
            "engine": self.engine,
            "math": [self._params.runtime.matmul, self._params.runtime.deterministic],
            "machine": runtime.machine(),
            "records": self._records.digest,
        }
        if view is not None:
            augment = self._params.augment.model_dump()
            depends_on |= {"view": view, "augment": augment, "seed": self._params.seed, "share": asdict(self._share)}
        return cache.key(depends_on, modules=MODULES)

    def bytes(self, views: Iterable[int | None]) -> int:
        """What these views take on disk, at most."""
        values = sum(math.prod(tensor.shape[1:]) for tensor in self._trunk.outputs)
        beside = BESIDE * len(self._trunk.outputs)
        return sum(self._count(view) * values * DTYPE.itemsize + beside for view in views)

    def _count(self, view: int | None) -> int:
        return self._records.count("val") if view is None else len(self._share.examples(self._records.count("train")))

    def make(self, view: int | None) -> Activations:
        """A view, computed if it is not there or broken."""
        return Activations(cache.Entry("views", self._key(view), functools.partial(self._fill, view)))

    def _fill(self, view: int | None, folder: Path) -> None:
        """Run the trunk over a view, batch by batch, into `folder`."""
        title = "val activations" if view is None else f"view {view + 1}/{len(self.views) - 1}"
        if self._run is None:  # all views seemed to be there, and this one was broken
            engine, self._run = self._started()
            if engine != self.engine:
                raise InputError(
                    f"{title}: expected {self.engine}, which made the others, received {engine}; run it again"
                )
        count = self._count(view)
        started = time.monotonic()
        with ExitStack() as stack:
            files = []
            for index, tensor in enumerate(self._trunk.outputs):
                file = stack.enter_context((folder / f"boundary_{index:02d}.npy").open("wb"))
                header = {"descr": DTYPE.str, "fortran_order": False, "shape": (count, *tensor.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
                files.append(file)
            batches = math.ceil(count / TRUNK_BATCH)
            for pixels in console.progress(self._pixels(view), title, batches, "batch"):
                for tensor, file in zip(self._run(pixels), files, strict=True):
                    file.write(_halved(tensor).data)
            written = sum(file.tell() for file in files)
        console.log(f"{title}: {count} images, {written} bytes ({time.monotonic() - started:.1f} s)")

    def _pixels(self, view: int | None) -> Iterator[np.ndarray]:
        """A view's images for the trunk, float32 [at most TRUNK_BATCH, size, size, 3] at a time."""
        if view is None:
            images = batches.plain(self._records, "val", self._size, TRUNK_BATCH).map(lambda pixels, _: pixels)
        else:

            def stacked() -> Iterator[np.ndarray]:
                for chunk, _ in batches.augmented_chunks(self._records, self._augmenter, view, self._share):
                    yield batches.stacked(chunk, self._size)

            # Resized behind the generator: LiteRT holds Python's lock while it computes.
            images = batches.from_generator(stacked, tf.TensorSpec((None, None, None, 3), tf.float32)).prefetch(4)
            images = images.map(lambda chunk: batches.resize(chunk, self._size)).prefetch(2)
        yield from images.as_numpy_iterator()


class Views:
    """The augmented views that a training goes through, and val's plain one: computed where the cache lacks them."""

    def __init__(self, records: Records, model: Classifier, params: Params, number: int, share: Share) -> None:
        """Compute what is missing of `number` views of the share's train images, and of one of all val images.

        Raises:
            InputError: the cache can't hold them, which is said before a view is computed.
        """
        self._records, self._seed, self._share = records, params.seed, share
        self._examples = share.examples(records.count("train"))
        # Niceness: what interrupts one of LiteRT's threads holds up the others, which wait for it.
        with ExitStack() as stack, Augmenter(params.augment, params.seed, niceness=10) as augmenter:
            maker = _Maker(records, model, params, number, share, augmenter)
            missing = maker.missing()
            there = [view for view in maker.views if view not in missing]
            found = {view: stack.enter_context(closing(maker.make(view))) for view in there}  # not to be pruned
            if missing:
                cache.make_room("views", maker.bytes(missing))
            found |= {view: stack.enter_context(closing(maker.make(view))) for view in missing}
            self._opened = stack.pop_all()
        self.engine = maker.engine
        self.val = found[None]
        self.train = [found[view] for view in range(number)]

    def epoch(self, number: int, batch_size: int) -> tf.data.Dataset:
        """The share's parts of an epoch's batches: (tuple of float16 boundary tensors, int32 labels).

        The batches are those that one device would get; each is one part a replica, in the replicas' order, and a part
        may be empty.
        """
        of_view = self.train[number % len(self.train)]
        labels = self._records.labels("train")
        order = np.random.default_rng([self._seed, number]).permutation(len(labels))
        first = self._share.worker * self._share.replicas

        def parts() -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
            for start in range(0, len(order), batch_size):
                examples = order[start : start + batch_size]
                replicas = self._share.replica_of(examples)
                for replica in range(first, first + self._share.replicas):
                    part = examples[replicas == replica]
                    yield of_view.read(np.searchsorted(self._examples, part)), labels[part]

        return batches.from_generator(parts, of_view.signature()).prefetch(4)

    def val_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Boundary tensors, float16, of val in the records' order."""
        positions = np.arange(self._records.count("val"))
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
