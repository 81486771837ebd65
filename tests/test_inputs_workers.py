"""Workers: the same images from any number of them, in order, in bounded memory, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import folder_data, write_picture
from PIL import Image
from threadpoolctl import threadpool_info

from flatmin.common.errors import InputError
from flatmin.common.params import Augment
from flatmin.data import writer
from flatmin.inputs import augment, workers
from flatmin.inputs.augment import AUGMENT_CHUNK, Augmentation
from flatmin.inputs.pixels import Task
from flatmin.inputs.records import Records
from flatmin.inputs.workers import Augmenter

SOURCE = Path(__file__).parents[1] / "src"
COUNT = 9 * AUGMENT_CHUNK + 5
CHUNKS = range(10)
SIZE = 16
ALL = Augment(engine="imgaug", n=2, m=9, flip=True, crop=3)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Noise; tests only read it."""
    folder = tmp_path_factory.mktemp("workers")
    for split, count in (("train", COUNT), ("val", 4), ("test", 4)):
        for number in range(count):
            write_picture(folder / f"source/{split}/{('cat', 'dog')[number % 2]}/{number:03d}.png", number)
    writer.write(folder_data(folder / "source", val="val"), folder / "records")
    return Records(folder / "records")


@pytest.fixture(scope="module")
def processes() -> Iterator[Augmenter]:
    """Two processes of imgaug's, which take seconds to start; tests leave them as they are."""
    with Augmenter(ALL, seed=1, workers=2) as augmenter:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONWARNINGS", "error")
            augmenter.start()
        yield augmenter


def task(records: Records, chunk: int, augmentation: Augmentation | None = None) -> Task:
    return Task(records.stored("train", augment.positions(chunk, COUNT)), SIZE, records.fit("train"), augmentation)


def without_workers(records: Records, settings: Augment, seed: int, epoch: int) -> np.ndarray:
    return np.concatenate([task(records, each, Augmentation(settings, seed, epoch, each)).run() for each in CHUNKS])


def epoch_of(augmenter: Augmenter, records: Records, epoch: int) -> np.ndarray:
    return np.concatenate(list(augmenter.chunks(records, SIZE, epoch, CHUNKS)))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "count"), [("imgaug", 3), ("tensorflow", 1), ("tensorflow", 3)])
def test_augmenter_any_number_of_workers_gives_the_same(
    count: int, engine: str, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")  # in the workers too
    settings = Augment.model_validate(ALL.model_dump() | {"engine": engine})
    with Augmenter(settings, seed=1, workers=count) as augmenter:
        epochs = [epoch_of(augmenter, records, epoch) for epoch in (4, 0, 4)]
        of_chunks = list(augmenter.chunks(records, SIZE, 4, [7, 2]))
    np.testing.assert_array_equal(epochs[0], without_workers(records, settings, 1, 4))
    np.testing.assert_array_equal(epochs[1], without_workers(records, settings, 1, 0))
    np.testing.assert_array_equal(epochs[0], epochs[2])
    assert not np.array_equal(epochs[0], epochs[1])
    for images, chunk in zip(of_chunks, (7, 2), strict=True):
        np.testing.assert_array_equal(images, epochs[0][chunk * AUGMENT_CHUNK :][:AUGMENT_CHUNK])


def test_augmenter_engine_none_reads_in_threads(records: Records) -> None:
    before = multiprocessing.active_children()
    with Augmenter(Augment(engine="none", n=3, m=9, flip=True, crop=2), seed=0, workers=2) as augmenter:
        augmenter.start()
        chunks = list(augmenter.chunks(records, SIZE, 0, CHUNKS))
        assert multiprocessing.active_children() == before
    assert [len(chunk) for chunk in chunks] == [AUGMENT_CHUNK] * 9 + [5]
    np.testing.assert_array_equal(
        np.concatenate(chunks), np.concatenate([task(records, each).run() for each in CHUNKS])
    )


def test_augmenter_that_nobody_asks_starts_no_process(records: Records) -> None:
    before = multiprocessing.active_children()
    with Augmenter(ALL, seed=0, workers=2) as augmenter:
        assert list(augmenter.chunks(records, SIZE, 0, [])) == []
        assert multiprocessing.active_children() == before


def test_read_gives_results_in_order(records: Records) -> None:
    tasks = [task(records, each) for each in (3, 1, 2)]
    for received, each in zip(workers.read(tasks), tasks, strict=True):
        np.testing.assert_array_equal(received, each.run())


class Counting(Executor):
    """Runs tasks at once, and counts those whose result nobody has asked for."""

    def __init__(self) -> None:
        self.waiting = self.most = 0

    def submit(self, run: Callable[..., Any], /, *arguments: Any, **more: Any) -> Future[Any]:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        future: Future[Any] = Future()
        future.set_result(None)
        return future


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [
        (12, 16, 4 * 16),  # small pictures: four tasks a worker
        (12, 1000, 2),  # 96 MB of results a task
        (4000, 16, 2),  # 192 MB for a picture while it is read
        (20000, 16, 1),  # one alone, however large
    ],
)
def test_in_order_has_no_more_ahead_than_fits(side: int, size: int, expected: int, records: Records) -> None:
    image = records.stored("train", [0])[0]._replace(height=side, width=side)
    pool = Counting()
    for _ in workers.in_order(pool, [Task([image] * 32, size, "squash")] * 100, workers=16):
        pool.waiting -= 1
    assert pool.most == expected


LIMITED = """
import os, resource, sys
from pathlib import Path
from flatmin.inputs import workers
from flatmin.inputs.pixels import Task
from flatmin.inputs.records import Records

workers.cores = lambda: 16
records = Records(sys.argv[1])
tasks = [Task(records.stored("train", [0] * 4), int(sys.argv[2]), "squash") for _ in range(int(sys.argv[3]))]
next(workers.read([Task(records.stored("test", [0]), 16, "squash")]))  # what reading loads once
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
stacks = 16 * 9 * 2**20  # of the threads
resource.setrlimit(resource.RLIMIT_AS, (now + stacks + int(sys.argv[4]), -1))
print(sum(len(images) for images in workers.read(tasks)))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of records with two pictures of 12 megapixels to train on."""
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (folder / f"source/{split}/{name}").mkdir(parents=True)
            side = (4000, 3000) if split == "train" else (16, 16)
            Image.new("RGB", side, (9, 90, 30)).save(folder / f"source/{split}/{name}/1.jpg")
    writer.write(folder_data(folder / "source", val="val"), folder / "records")
    return folder / "records"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "tasks"), [(64, 12), (1500, 12)])
def test_read_by_16_threads_stays_within_its_bounds(size: int, tasks: int, photos: Path) -> None:
    """A limit of the address space, under which a picture more at a time would be refused."""
    code = ["-c", LIMITED, str(photos), str(size), str(tasks), str(512 * 10**6)]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{4 * tasks}\n", "")


def test_in_order_that_is_left_early_runs_no_more(records: Records) -> None:
    with ThreadPoolExecutor(1) as pool:
        done: list[Future[Any]] = []
        submit = pool.submit

        def noted(*arguments: Any) -> Any:
            done.append(submit(*arguments))
            return done[-1]

        pool.submit = noted  # type: ignore[method-assign, assignment]
        results = workers.in_order(pool, [task(records, 0)] * 100, workers=20)
        next(results)
        del results  # closes it
    assert sum(not future.cancelled() for future in done) < 20 < len(done)


@pytest.mark.slow
def test_augmenter_workers_end_with_the_block(records: Records) -> None:
    before = multiprocessing.active_children()

    def use(error: type[BaseException] | None) -> set[int | None]:
        with Augmenter(ALL, seed=0, workers=2) as augmenter:
            next(augmenter.chunks(records, SIZE, 0, [0, 1, 2] * 10))  # nobody asks for the rest
            found = {child.pid for child in multiprocessing.active_children() if child not in before}
            if error:
                raise error
        return found

    found = use(None)
    assert 1 <= len(found) <= 2
    assert multiprocessing.active_children() == before
    assert not any(alive(worker) for worker in found if worker)
    with pytest.raises(KeyboardInterrupt):
        use(KeyboardInterrupt)
    assert multiprocessing.active_children() == before


@pytest.mark.slow
def test_augmenter_workers_use_one_thread(processes: Augmenter) -> None:
    blas = processes._started().submit(threadpool_info).result()
    assert {library["num_threads"] for library in blas if "numpy" in library["filepath"]} == {1}


@pytest.mark.slow
def test_augmenter_chunks_that_nobody_waits_for_spoil_no_others(processes: Augmenter, records: Records) -> None:
    next(processes.chunks(records, SIZE, 7, CHUNKS))
    np.testing.assert_array_equal(epoch_of(processes, records, 4), without_workers(records, ALL, 1, 4))


@pytest.mark.slow
def test_augmenter_error_in_worker_is_raised(processes: Augmenter, records: Records) -> None:
    damaged = task(records, 0, Augmentation(ALL, 0, 0, 0))
    damaged.images[3] = damaged.images[3]._replace(crc32=1)
    found = workers.in_order(processes._started(), [damaged], 1)
    with pytest.raises(InputError, match=rf"tfrecord: expected '{damaged.images[3].name}' as prepare wrote it"):
        list(found)


def descendants(process: int) -> set[int]:
    children = {
        int(child)
        for listing in Path(f"/proc/{process}/task").glob("*/children")
        for child in listing.read_text().split()
    }
    return children.union(*(descendants(child) for child in children))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


PARENT = """
import sys, time
from flatmin.common.params import Augment
from flatmin.inputs.records import Records
from flatmin.inputs.workers import Augmenter

def loaded():
    return "tensorflow" in sys.modules, "imgaug" in sys.modules

if __name__ == "__main__":
    import tensorflow
    with Augmenter(Augment(), seed=0, workers=2) as augmenter:
        chunks = augmenter.chunks(Records(sys.argv[1]), 16, 0, range(9))
        next(chunks)
        print(*augmenter._pool.submit(loaded).result(), flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_augmenter_workers_import_no_tensorflow_and_end_with_a_killed_parent(
    ending: signal.Signals, tmp_path: Path, records: Records
) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, str(program), str(records.folder)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == "False True\n"
        children = descendants(parent.pid)
        assert len(children) >= 2
        parent.send_signal(ending)
        parent.wait()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and any(alive(child) for child in children):
            time.sleep(0.1)
        left = [child for child in children if alive(child)]
        for child in left:
            os.kill(child, signal.SIGKILL)
        assert not left
