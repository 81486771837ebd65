"""Augmented images: a pure function of (seed, epoch, chunk), whatever the batch, the order or the number of workers.

Images are augmented in chunks of 32 consecutive examples, since seeding imgaug costs more than augmenting an image.
Workers do it, so that training is not held up.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
from threadpoolctl import threadpool_limits

from flatmin.common.params import Augment

AUGMENT_CHUNK = 32


def augment(images: list[np.ndarray], settings: Augment, seed: int, epoch: int, chunk: int) -> list[np.ndarray]:
    """One chunk of images, varied.

    Args:
        images: uint8 [height, width, 3] each; sizes may differ.
        settings: the `augment` section.
        seed, epoch, chunk: non-negative; they alone choose what happens.

    Returns:
        uint8 images of the sizes given.
    """
    if settings.engine == "none":
        return images
    flips_and_crops, randaugment_seed = np.random.SeedSequence([seed, epoch, chunk]).spawn(2)
    random = np.random.default_rng(flips_and_crops)
    if settings.flip:
        images = [
            image[:, ::-1] if mirrored else image
            for image, mirrored in zip(images, random.random(len(images)) < 0.5, strict=True)
        ]
    if settings.crop:
        images = [_crop(image, settings.crop, random) for image in images]
    if settings.n:
        chosen = [index for index, drawn in enumerate(random.random(len(images))) if drawn < settings.p]
        varied = _randaugmented([images[index] for index in chosen], settings, randaugment_seed)
        images = list(images)
        for index, image in zip(chosen, varied, strict=True):
            images[index] = image
    return [np.ascontiguousarray(image) for image in images]


def _randaugmented(images: list[np.ndarray], settings: Augment, seed: np.random.SeedSequence) -> list[np.ndarray]:
    if not images:
        return []
    if settings.engine == "tensorflow":
        from flatmin.inputs import augment_ops

        return augment_ops.randaugment(images, settings.n, settings.m, np.random.default_rng(seed))
    augmenter = _randaugment(settings.n, settings.m)
    augmenter.seed_(int(seed.generate_state(1)[0] >> 1))
    return augmenter(images=[np.ascontiguousarray(image) for image in images])


def _crop(image: np.ndarray, padding: int, random: np.random.Generator) -> np.ndarray:
    """Pad by reflection, cut the old size out anywhere."""
    height, width, _ = image.shape
    top, left = random.integers(0, 2 * padding + 1, size=2)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
    return padded[top : top + height, left : left + width]


_augmenters: dict[tuple[int, int], Any] = {}


def _randaugment(n: int, m: int) -> Any:
    """imgaug's RandAugment (arXiv:1909.13719) with its zoom and its 18 operations, but not its built-in mirroring."""
    if (n, m) not in _augmenters:
        # imgaug 0.4 names NumPy's old aliases of Python's types.
        for alias, of in (("bool", bool), ("complex", complex)):
            if alias not in np.__dict__:
                setattr(np, alias, of)
        import cv2
        import imgaug.augmenters as iaa

        class RandAugment(iaa.RandAugment):
            @classmethod
            def _create_initial_augmenters_list(cls, m: Any) -> list[Any]:
                return [each for each in super()._create_initial_augmenters_list(m) if not isinstance(each, iaa.Fliplr)]

        cv2.setNumThreads(0)
        _augmenters[n, m] = RandAugment(n=n, m=m)
    return _augmenters[n, m]


class Augmenter:
    """Workers that augment one chunk after another; the order that goes in comes out.

    They are processes for imgaug, which holds Python's lock, and threads for TensorFlow, which doesn't. Use it in a
    `with` block: they end with it. With the engine `none` there are none.
    """

    def __init__(self, settings: Augment, seed: int, workers: int | None = None, niceness: int = 0) -> None:
        """workers: how many; by default one less than the cores, since one trains. niceness: added to processes'."""
        self._settings = settings
        self._seed = seed
        self._workers = workers or max(1, len(os.sched_getaffinity(0)) - 1)
        self._niceness = niceness
        self._pool: Executor | None = None
        self._files: list[int] = []
        self._free: list[int] = []  # without those of chunks that nobody waited for

    def __enter__(self) -> Self:
        if self._settings.engine == "imgaug":
            # A fork would copy TensorFlow's locks in whatever state its threads hold them.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, initializer=_set_up, initargs=(self._niceness,))
        elif self._settings.engine == "tensorflow":
            self._pool = ThreadPoolExecutor(self._workers)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        while self._files:
            os.close(self._files.pop())
        self._free.clear()

    def start(self) -> None:
        """Let the workers get ready, which takes a process seconds, while this one does something else."""
        if isinstance(self._pool, ProcessPoolExecutor):
            for _ in range(self._workers):
                self._pool.submit(_get_ready, self._settings)

    def chunks(
        self, images: Iterable[np.ndarray], epoch: int, numbers: Iterable[int] | None = None
    ) -> Iterator[list[np.ndarray]]:
        """Cut `images` into chunks, augment each; at most four chunks a worker are under way.

        numbers: the chunks' own, where the images are not those of all chunks.
        """
        pending: deque[Callable[[], list[np.ndarray]]] = deque()
        for index, chunk in zip(itertools.count() if numbers is None else numbers, _cut(images), strict=False):
            pending.append(self._begin(chunk, (self._settings, self._seed, epoch, index)))
            if len(pending) >= 4 * self._workers:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()

    def _begin(self, images: list[np.ndarray], how: tuple[Augment, int, int, int]) -> Callable[[], list[np.ndarray]]:
        """Hand a chunk to a worker; what is returned waits for it."""
        if self._pool is None:
            return lambda: augment(images, *how)
        if isinstance(self._pool, ThreadPoolExecutor):
            return self._pool.submit(augment, images, *how).result
        file = self._free.pop() if self._free else self._memory()
        _write(file, images)
        shapes = [image.shape for image in images]
        work = self._pool.submit(_augment_file, f"/proc/{os.getpid()}/fd/{file}", shapes, how)

        def wait() -> list[np.ndarray]:
            work.result()
            augmented = _read(file, shapes)
            self._free.append(file)
            return augmented

        return wait

    def _memory(self) -> int:
        """A file of memory that a chunk goes out and comes back in, which is quicker than pickling it through a pipe.

        It is in no folder: /dev/shm is small in containers. Mapping it would cost more in page faults than copying.
        """
        self._files.append(os.memfd_create("flatmin-chunk"))
        return self._files[-1]


def _get_ready(settings: Augment) -> None:
    if settings.n:
        _randaugment(settings.n, settings.m)


def _augment_file(path: str, shapes: list[tuple[int, ...]], how: tuple[Augment, int, int, int]) -> None:
    """Augment a chunk where it lies."""
    file = os.open(path, os.O_RDWR)
    try:
        _write(file, augment(_read(file, shapes), *how))
    finally:
        os.close(file)


def _write(file: int, images: list[np.ndarray]) -> None:
    start = 0
    for image in images:
        start += os.pwrite(file, np.ascontiguousarray(image).data, start)


def _read(file: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    images = [np.empty(shape, np.uint8) for shape in shapes]
    start = 0
    for image in images:
        start += os.preadv(file, [image.data], start)
    return images


def _cut(images: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    iterator = iter(images)
    while chunk := list(itertools.islice(iterator, AUGMENT_CHUNK)):
        yield chunk


def _set_up(niceness: int) -> None:
    """Make a worker end with its parent, else it would wait for work for ever, and take one core at most.

    NumPy's BLAS has a thread a core, which spin for a while after each of imgaug's small products: they took as much of
    the processor as the augmentation itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the workers
    threadpool_limits(1)
    os.nice(niceness)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)
