"""Augments images, as a pure function of (seed, epoch, chunk) that no batch size, order or number of workers changes.

A chunk is AUGMENT_CHUNK consecutive examples. Augmentation is seeded by the chunk because seeding imgaug takes longer
than augmenting an image. It runs in workers, so that training does not wait for it.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np
from threadpoolctl import threadpool_limits

from flatmin.common.params import Augment

# Random numbers are drawn for this many consecutive examples at a time. Another value changes every augmented image.
AUGMENT_CHUNK = 32
_CHUNKS_PER_WORKER = 4  # handed out at a time, so that no worker waits for the next one

Arguments = tuple[Augment, int, int, int]  # of `augment`: settings, seed, epoch and chunk


def augment(images: list[np.ndarray], settings: Augment, seed: int, epoch: int, chunk: int) -> list[np.ndarray]:
    """Augment one chunk of images: random flips, then crops, then RandAugment, as the settings say.

    Args:
        images: uint8 [height, width, 3] each; sizes may differ.
        settings: the `augment` section of params.yaml.
        seed, epoch, chunk: non-negative; all random numbers follow from these three.

    Returns:
        Images of the same sizes and dtype.
    """
    if settings.engine == "none":
        return images
    flip_and_crop_seed, randaugment_seed = np.random.SeedSequence([seed, epoch, chunk]).spawn(2)
    random = np.random.default_rng(flip_and_crop_seed)
    if settings.flip:
        images = [
            image[:, ::-1] if is_flipped else image
            for image, is_flipped in zip(images, random.random(len(images)) < 0.5, strict=True)
        ]
    if settings.crop:
        images = [_crop(image, settings.crop, random) for image in images]
    if settings.n:
        chosen = [index for index, drawn in enumerate(random.random(len(images))) if drawn < settings.p]
        augmented = _apply_randaugment([images[index] for index in chosen], settings, randaugment_seed)
        images = list(images)
        for index, image in zip(chosen, augmented, strict=True):
            images[index] = image
    return [np.ascontiguousarray(image) for image in images]


def _apply_randaugment(images: list[np.ndarray], settings: Augment, seed: np.random.SeedSequence) -> list[np.ndarray]:
    if not images:
        return []
    if settings.engine == "tensorflow":
        from flatmin.inputs import augment_ops

        return augment_ops.randaugment(images, settings.n, settings.m, np.random.default_rng(seed))
    augmenter = _imgaug_randaugment(settings.n, settings.m)
    augmenter.seed_(int(seed.generate_state(1)[0] >> 1))
    return augmenter(images=[np.ascontiguousarray(image) for image in images])


def _crop(image: np.ndarray, padding: int, random: np.random.Generator) -> np.ndarray:
    """Pad an image by reflection, and crop it back to its size at a random place."""
    height, width, _ = image.shape
    top, left = random.integers(0, 2 * padding + 1, size=2)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    return padded[top : top + height, left : left + width]


@functools.cache
def _imgaug_randaugment(n: int, m: int) -> Any:
    """Make imgaug's RandAugment (arXiv:1909.13719): a zoom and 18 operations, without the flip that imgaug adds.

    Flips are the setting `flip`'s. The first call imports imgaug, which takes seconds.
    """
    # imgaug 0.4 still uses the aliases of Python's types that NumPy 1.24 removed. They are set only here, so that
    # nothing else in the process sees them unless it augments with imgaug.
    for alias, python_type in (("bool", bool), ("complex", complex)):
        if alias not in np.__dict__:
            setattr(np, alias, python_type)
    import cv2
    import imgaug.augmenters as iaa

    class RandAugment(iaa.RandAugment):
        @classmethod
        def _create_initial_augmenters_list(cls, m: Any) -> list[Any]:
            return [each for each in super()._create_initial_augmenters_list(m) if not isinstance(each, iaa.Fliplr)]

    cv2.setNumThreads(0)
    return RandAugment(n=n, m=m)


class _Pending(NamedTuple):
    """A chunk that a worker has.

    Attributes:
        result: waits for it and returns it, augmented.
        abandon: says that nobody will wait for it.
    """

    result: Callable[[], list[np.ndarray]]
    abandon: Callable[[], object] = lambda: None


class Augmenter:
    """Augments chunks of images in workers, in order. Use it in a `with` block, at whose end the workers end.

    Workers are processes for imgaug, which holds Python's global interpreter lock, and threads for TensorFlow, which
    releases it. The engine `none` has no workers.
    """

    def __init__(self, settings: Augment, seed: int, workers: int | None = None, niceness: int = 0) -> None:
        """Keep the settings; the `with` block starts the workers.

        Args:
            settings: the `augment` section of params.yaml.
            seed: non-negative.
            workers: the number of workers; by default one less than the cores, because one core trains.
            niceness: added to that of worker processes.
        """
        self._settings = settings
        self._seed = seed
        self._workers = workers or max(1, len(os.sched_getaffinity(0)) - 1)
        self._niceness = niceness
        self._pool: Executor | None = None
        self._buffers: list[int] = []  # descriptors of every in-memory file
        self._free_buffers: list[int] = []  # those that no worker may still be using

    def __enter__(self) -> Self:
        if self._settings.engine == "imgaug":
            # A fork would copy TensorFlow's locks while its threads may be holding them.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self._workers, context, initializer=_initialize_worker, initargs=(self._niceness,)
            )
        elif self._settings.engine == "tensorflow":
            self._pool = ThreadPoolExecutor(self._workers)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        while self._buffers:
            os.close(self._buffers.pop())
        self._free_buffers.clear()

    def start(self) -> None:
        """Start the worker processes, without waiting for the seconds that this takes them."""
        if isinstance(self._pool, ProcessPoolExecutor):
            for _ in range(self._workers):
                self._pool.submit(_import_imgaug, self._settings)

    def chunks(
        self, images: Iterable[np.ndarray], epoch: int, numbers: Iterable[int] | None = None
    ) -> Iterator[list[np.ndarray]]:
        """Split images into chunks and augment each one.

        Args:
            images: uint8 [height, width, 3] each; sizes may differ.
            epoch: non-negative.
            numbers: the chunks' numbers, which seed them; by default 0, 1, ...

        Yields:
            The augmented images of one chunk after another.
        """
        pending: deque[_Pending] = deque()
        try:
            for index, chunk in zip(itertools.count() if numbers is None else numbers, _split(images), strict=False):
                pending.append(self._submit(chunk, (self._settings, self._seed, epoch, index)))
                if len(pending) >= _CHUNKS_PER_WORKER * self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for left in pending:  # as by a training that is validated within an epoch
                left.abandon()

    def _submit(self, images: list[np.ndarray], arguments: Arguments) -> _Pending:
        """Hand a chunk to a worker."""
        if self._pool is None:
            return _Pending(lambda: augment(images, *arguments))
        if isinstance(self._pool, ThreadPoolExecutor):
            future = self._pool.submit(augment, images, *arguments)
            return _Pending(future.result, future.cancel)
        try:
            buffer = self._free_buffers.pop()
        except IndexError:
            buffer = self._new_buffer()
        _write(buffer, images)
        shapes = [image.shape for image in images]
        task = self._pool.submit(_augment_in_place, f"/proc/{os.getpid()}/fd/{buffer}", shapes, arguments)

        def wait() -> list[np.ndarray]:
            task.result()
            augmented = _read(buffer, shapes)
            self._free(buffer)
            return augmented

        def abandon() -> None:
            task.add_done_callback(lambda _: self._free(buffer))  # only then: a worker may still write to it
            task.cancel()

        return _Pending(wait, abandon)

    def _free(self, buffer: int) -> None:
        if buffer in self._buffers:  # else the block has ended
            self._free_buffers.append(buffer)

    def _new_buffer(self) -> int:
        """Open a file in memory for one chunk, which is faster than pickling the chunk through a pipe both ways.

        The file is in no folder, because /dev/shm is small in containers. It is not mapped either: page faults would
        cost more than copying.
        """
        self._buffers.append(os.memfd_create("flatmin-chunk"))
        return self._buffers[-1]


def _import_imgaug(settings: Augment) -> None:
    if settings.n:
        _imgaug_randaugment(settings.n, settings.m)


def _augment_in_place(path: str, shapes: list[tuple[int, ...]], arguments: Arguments) -> None:
    """Augment the chunk in a buffer, in a worker process."""
    buffer = os.open(path, os.O_RDWR)
    try:
        _write(buffer, augment(_read(buffer, shapes), *arguments))
    finally:
        os.close(buffer)


def _write(buffer: int, images: list[np.ndarray]) -> None:
    start = 0
    for image in images:
        start += os.pwrite(buffer, np.ascontiguousarray(image).data, start)


def _read(buffer: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    images = [np.empty(shape, np.uint8) for shape in shapes]
    start = 0
    for image in images:
        start += os.preadv(buffer, [image.data], start)
    return images


def _split(images: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    iterator = iter(images)
    while chunk := list(itertools.islice(iterator, AUGMENT_CHUNK)):
        yield chunk


def _initialize_worker(niceness: int) -> None:
    """Make a worker process use one core at most, and end with its parent, which it would otherwise outlive.

    One thread for NumPy's BLAS: by default it has one for each core, and they spin for a while after each of imgaug's
    small products, which took as much processor time as the augmentation itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it the workers
    threadpool_limits(1)
    os.nice(niceness)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
