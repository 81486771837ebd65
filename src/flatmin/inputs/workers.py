"""Runs tasks in processes or threads, in order, and no more of them ahead than a bounded number of bytes holds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from flatmin.common.params import Augment
from flatmin.inputs import augment
from flatmin.inputs.augment import Augmentation
from flatmin.inputs.pixels import Task
from flatmin.inputs.records import Records

# With the shuffle buffer and tf.data's prefetching, which inputs.batches bounds, all queues hold less than 512 MB.
QUEUE_BYTES = 200 * 10**6  # of finished images
# What all workers together take for the pictures that they decode: threads, and processes, which take as much anyway.
THREADS_BYTES, PROCESSES_BYTES = 400 * 10**6, 2000 * 10**6
_AHEAD = 4  # tasks a worker, so that none waits for the next one


Result = TypeVar("Result", covariant=True)


class Job(Protocol[Result]):
    """A task for `in_order`; `Task` is one."""

    @property
    def result_bytes(self) -> int:
        """The size of what `run` returns."""

    @property
    def working_bytes(self) -> int:
        """The memory that `run` takes beside its result, roughly."""

    def run(self) -> Result:
        """Do it, in a worker."""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(pool: Executor, tasks: Iterable[Job[Result]], workers: int) -> Generator[Result]:
    """Run tasks in a pool of so many workers; give their results in order."""
    working_bytes = PROCESSES_BYTES if isinstance(pool, ProcessPoolExecutor) else THREADS_BYTES
    pending: deque[tuple[Future[Result], Job[Result]]] = deque()
    queued = working = 0
    try:
        for task in tasks:
            queued, working = queued + task.result_bytes, working + task.working_bytes
            while pending and (len(pending) >= _AHEAD * workers or queued > QUEUE_BYTES or working > working_bytes):
                future, done = pending.popleft()
                queued, working = queued - done.result_bytes, working - done.working_bytes
                yield future.result()
            pending.append((pool.submit(task.run), task))
        while pending:
            yield pending.popleft()[0].result()
    finally:
        for future, _ in pending:  # nobody waits for them: a training that is validated within an epoch
            future.cancel()


def read(tasks: Iterable[Task]) -> Iterator[np.ndarray]:
    """Run tasks without augmentation in threads, since Pillow releases Python's lock; give their results in order."""
    with ThreadPoolExecutor(cores()) as pool:
        yield from in_order(pool, tasks, cores())


class Augmenter:
    """Reads and augments chunks of train images in workers. Use it in a `with` block, at whose end the workers end.

    Workers are processes for imgaug, which holds Python's lock, and threads for TensorFlow, which releases it, and for
    reading alone. They start with the first chunk, or by `start`.
    """

    def __init__(self, settings: Augment, seed: int, workers: int | None = None) -> None:
        """Keep the settings.

        Args:
            settings: the `augment` section of params.yaml.
            seed: non-negative.
            workers: the number of workers; by default one less than the cores, because one core trains.
        """
        self._settings = settings
        self._seed = seed
        self._workers = workers or max(1, cores() - 1)
        self._pool: Executor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def start(self) -> None:
        """Start the worker processes, without waiting for the seconds that this takes them."""
        pool = self._started()
        if isinstance(pool, ProcessPoolExecutor):
            for _ in range(self._workers):
                pool.submit(augment.prepare, self._settings)

    def chunks(self, records: Records, size: int, epoch: int, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """Read and augment chunks of train images.

        Args:
            size: of the network's input.
            epoch: non-negative.
            numbers: the chunks' numbers, which also seed them.

        Yields:
            The images of one chunk after another, uint8 [at most AUGMENT_CHUNK, size, size, 3].
        """
        count, fit = records.count("train"), records.fit("train")
        is_plain = self._settings.engine == "none"
        tasks = (
            Task(
                records.stored("train", augment.positions(number, count)),
                size,
                fit,
                None if is_plain else Augmentation(self._settings, self._seed, epoch, number),
            )
            for number in numbers
        )
        yield from in_order(self._started(), tasks, self._workers)

    def _started(self) -> Executor:
        if self._pool is None and self._settings.engine == "imgaug":
            # A fork would copy TensorFlow's locks while its threads may be holding them.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, context, initializer=_initialize_worker)
        elif self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers)
        return self._pool


def _initialize_worker() -> None:
    """Make a worker process use one core at most, and end with its parent, which it would otherwise outlive.

    One thread for NumPy's BLAS: by default it has one for each core, and they spin for a while after each of imgaug's
    small products, which took as much processor time as the augmentation itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it the workers
    threadpool_limits(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
