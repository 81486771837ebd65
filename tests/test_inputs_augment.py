"""Augmentation: a pure function of (seed, epoch, chunk), in workers that leave nothing behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from flatmin.common.params import Augment
from flatmin.inputs.augment import AUGMENT_CHUNK, Augmenter, _imgaug_randaugment, augment

SOURCE = Path(__file__).parents[1] / "src"


def pictures(count: int, side: int = 24) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.integers(0, 256, (side + index % 3, side, 3), np.uint8) for index in range(count)]


def equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(
        one.dtype == other.dtype and np.array_equal(one, other) for one, other in zip(first, second, strict=True)
    )


def joined(chunks: Iterable[list[np.ndarray]]) -> list[np.ndarray]:
    return list(itertools.chain.from_iterable(chunks))


def without_workers(images: list[np.ndarray], settings: Augment, seed: int, epoch: int) -> list[np.ndarray]:
    chunks = [images[start : start + AUGMENT_CHUNK] for start in range(0, len(images), AUGMENT_CHUNK)]
    return joined(augment(chunk, settings, seed, epoch, index) for index, chunk in enumerate(chunks))


ALL = Augment(engine="imgaug", n=2, m=9, flip=True, crop=3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_augmenter_any_number_of_workers_gives_the_same(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")  # in the workers too
    images = pictures(9 * AUGMENT_CHUNK + 5)
    with Augmenter(ALL, seed=1, workers=workers) as augmenter:
        epochs = [joined(augmenter.chunks(images, epoch)) for epoch in (4, 0, 4)]
    assert equal(epochs[0], without_workers(images, ALL, 1, 4))
    assert equal(epochs[1], without_workers(images, ALL, 1, 0))
    assert equal(epochs[0], epochs[2])
    assert not equal(epochs[0], epochs[1])


def test_augment_chunks_in_any_order_are_the_same() -> None:
    images = pictures(3 * AUGMENT_CHUNK)
    chunks = [images[start : start + AUGMENT_CHUNK] for start in range(0, len(images), AUGMENT_CHUNK)]
    backwards = {index: augment(chunks[index], ALL, 1, 4, index) for index in (2, 0, 1, 0)}
    assert equal(joined([backwards[0], backwards[1], backwards[2]]), without_workers(images, ALL, 1, 4))


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("settings", [ALL, Augment(n=0, flip=True), Augment(n=0, crop=5), Augment(n=1, m=9)])
@pytest.mark.slow
def test_augment_another_seed_epoch_or_chunk_differs(settings: Augment, other: tuple[int, int, int]) -> None:
    images = pictures(AUGMENT_CHUNK)
    assert equal(augment(images, settings, 1, 0, 0), augment(images, settings, 1, 0, 0))
    assert not equal(augment(images, settings, 1, 0, 0), augment(images, settings, *other))


@pytest.mark.slow
def test_augment_in_another_process_gives_the_same_bytes() -> None:
    program = (
        "import hashlib, numpy as np\n"
        "from flatmin.inputs.augment import augment\n"
        "from flatmin.common.params import Augment\n"
        "images = list(np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3), np.uint8))\n"
        "settings = Augment(n=3, m=9, flip=True, crop=2)\n"
        "print(hashlib.sha256(b''.join(image.tobytes() for image in augment(images, settings, 1, 2, 3))).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env={**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_augment_leaves_its_input_unchanged() -> None:
    images = pictures(AUGMENT_CHUNK)
    before = [image.copy() for image in images]
    augment(images, ALL, 0, 0, 0)
    assert equal(images, before)


def test_augmenter_engine_none_changes_nothing_and_has_no_workers() -> None:
    images = pictures(2 * AUGMENT_CHUNK + 5)
    settings = Augment(engine="none", n=3, m=9, flip=True, crop=2)
    assert equal(augment(images, settings, 0, 0, 0), images)
    before = multiprocessing.active_children()
    with Augmenter(settings, seed=0, workers=2) as augmenter:
        chunks = list(augmenter.chunks(images, 0))
        assert multiprocessing.active_children() == before
    assert [len(chunk) for chunk in chunks] == [AUGMENT_CHUNK, AUGMENT_CHUNK, 5]
    assert equal(joined(chunks), images)


def test_augment_everything_off_is_the_identity() -> None:
    images = pictures(AUGMENT_CHUNK)  # noise, none of which is its own mirror image
    assert equal(augment(images, Augment(n=0, m=30), 0, 0, 0), images)


@pytest.mark.parametrize("settings", [ALL, Augment(engine="none")])
def test_augmenter_no_images_gives_no_chunks(settings: Augment) -> None:
    with Augmenter(settings, seed=0, workers=1) as augmenter:
        assert list(augmenter.chunks([], 0)) == []


def test_augment_flip_mirrors_about_half_and_nothing_else() -> None:
    images = pictures(400)
    flipped = augment(images, Augment(n=0, flip=True), 0, 0, 0)
    mirrored = [np.array_equal(new, old[:, ::-1]) for new, old in zip(flipped, images, strict=True)]
    same = [np.array_equal(new, old) for new, old in zip(flipped, images, strict=True)]
    assert all(one != other for one, other in zip(mirrored, same, strict=True))
    assert 150 < sum(mirrored) < 250


def reflected(index: int, size: int) -> int:
    """The index in [0, size) at which repeated reflection ends: 3 2 1 [0 1 2 3] 2 1 0 1 ..."""
    index %= max(1, 2 * (size - 1))
    return min(index, 2 * (size - 1) - index) if size > 1 else 0


def window(image: np.ndarray, top: int, left: int) -> np.ndarray:
    height, width, _ = image.shape
    rows = [reflected(top + row, height) for row in range(height)]
    columns = [reflected(left + column, width) for column in range(width)]
    return image[rows][:, columns]


@pytest.mark.parametrize(("side", "padding"), [(9, 2), (9, 1), (4, 3), (4, 4), (3, 7), (2, 2), (1, 3)])
def test_augment_crop_is_a_window_of_the_reflected_picture(side: int, padding: int) -> None:
    """Even if the padding is larger than the picture."""
    images = pictures(60, side)
    offsets = range(-padding, padding + 1)
    places = set()
    for new, old in zip(augment(images, Augment(n=0, crop=padding), 0, 0, 0), images, strict=True):
        matches = [place for place in itertools.product(offsets, offsets) if np.array_equal(window(old, *place), new)]
        assert matches
        places.update(matches)
    assert {top for top, _ in places} == {left for _, left in places} == set(offsets)


def test_augment_randaugment_changes_most_pictures_and_no_shape() -> None:
    images = pictures(2 * AUGMENT_CHUNK) + pictures(AUGMENT_CHUNK, side=11)
    changed = augment(images, Augment(n=3, m=7), 0, 0, 0)
    assert [image.shape for image in changed] == [image.shape for image in images]
    assert all(image.dtype == np.uint8 and image.flags.c_contiguous for image in changed)
    same = [np.array_equal(new, old) for new, old in zip(changed, images, strict=True)]
    assert sum(same) < len(same) / 4


@pytest.mark.parametrize("m", [0, 1, 7, 15, 29, 30])
@pytest.mark.parametrize("n", [1, 14])
def test_augment_randaugment_takes_every_magnitude(n: int, m: int) -> None:
    images = [*pictures(AUGMENT_CHUNK, side=8), np.zeros((1, 1, 3), np.uint8), np.zeros((40, 3, 3), np.uint8)]
    changed = augment(images, Augment(n=n, m=m), 0, 0, 0)
    assert [image.shape for image in changed] == [image.shape for image in images]


def test_augment_p_changes_this_fraction_of_the_pictures() -> None:
    images = pictures(320)
    often, rarely = (
        [
            not np.array_equal(one, other)
            for one, other in zip(images, augment(images, Augment(n=3, m=9, p=p), 0, 0, 0), strict=True)
        ]
        for p in (0.75, 0.25)
    )
    assert 200 < sum(often) < 260
    assert 60 < sum(rarely) < 100
    assert all(one for one, other in zip(often, rarely, strict=True) if other), (
        "those drawn for a lower p are drawn for a higher one too"
    )
    assert augment([], Augment(n=3), 0, 0, 0) == []


def test_imgaug_randaugment_has_all_operations_but_the_flip() -> None:
    ours = _imgaug_randaugment(2, 9)
    theirs = type(ours).__bases__[0](n=2, m=9)

    def names(augmenter: object) -> list[str]:
        return [type(child).__name__ for child in augmenter.get_all_children(flat=True)]  # type: ignore[attr-defined]

    assert "Fliplr" in names(theirs)
    assert names(ours) == [name for name in names(theirs) if name != "Fliplr"]
    assert not {"Fliplr", "Flipud"} & set(names(ours))


def test_augment_without_flip_mirrors_nothing() -> None:
    """A bright spot is at the left, halfway up: operations move it, but none moves it to the right."""
    image = np.full((32, 32, 3), 100, np.uint8)
    image[12:20, 1:9] = 255
    for settings, mirrors in ((Augment(n=1, m=3), False), (Augment(n=1, m=3, flip=True), True)):
        spots = [np.abs(new.astype(int) - new[2, 16].astype(int)) for new in augment([image] * 128, settings, 0, 0, 0)]
        right = sum(spot[:, 20:].sum() > 2 * spot[:, :12].sum() + 1000 for spot in spots)
        assert (right > 30) if mirrors else (right == 0)


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


@pytest.mark.slow
def test_augmenter_workers_end_with_the_block() -> None:
    before = multiprocessing.active_children()

    def use(error: type[BaseException] | None) -> set[int | None]:
        with Augmenter(ALL, seed=0, workers=2) as augmenter:
            next(augmenter.chunks(pictures(20 * AUGMENT_CHUNK), 0))  # nobody asks for the rest
            workers = {child.pid for child in multiprocessing.active_children() if child not in before}
            if error:
                raise error
        return workers

    workers = use(None)
    assert 1 <= len(workers) <= 2
    assert multiprocessing.active_children() == before
    assert not any(alive(worker) for worker in workers if worker)
    with pytest.raises(KeyboardInterrupt):
        use(KeyboardInterrupt)
    assert multiprocessing.active_children() == before


@pytest.mark.slow
def test_augmenter_workers_are_nice_and_use_one_thread() -> None:
    with Augmenter(ALL, seed=0, workers=1, niceness=10) as augmenter:
        augmenter.start()
        (worker,) = (child.pid for child in multiprocessing.active_children())
        assert augmenter._pool is not None
        blas = augmenter._pool.submit(threadpool_info).result()
        assert worker is not None
        assert os.getpriority(os.PRIO_PROCESS, worker) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    assert {library["num_threads"] for library in blas if "numpy" in library["filepath"]} == {1}


def open_buffers() -> int:
    files = Path("/proc/self/fd").iterdir()
    return sum("flatmin-chunk" in os.readlink(file) for file in files if file.is_symlink())


@pytest.mark.slow
def test_augmenter_chunks_that_nobody_waits_for_spoil_no_others() -> None:
    images = pictures(9 * AUGMENT_CHUNK)
    with Augmenter(ALL, seed=1, workers=2) as augmenter:
        next(augmenter.chunks(images, 7))
        assert equal(joined(augmenter.chunks(images, 4)), without_workers(images, ALL, 1, 4))
        assert 8 <= open_buffers() <= 16
    assert open_buffers() == 0


@pytest.mark.slow
def test_augmenter_of_epochs_that_are_left_early_takes_no_more_buffers() -> None:
    """As those of a training that is validated within its epochs are."""
    images, settings = pictures(12 * AUGMENT_CHUNK), Augment(n=0, flip=True)
    with Augmenter(settings, 3, workers=2) as augmenter:
        for epoch in range(10):
            chunks = augmenter.chunks(images, epoch)
            next(chunks)
            del chunks
        # Those of an epoch, and of the one before, whose chunks workers may still have.
        assert open_buffers() <= 2 * 8
        assert equal(joined(augmenter.chunks(images, 10)), without_workers(images, settings, 3, 10))
    assert open_buffers() == 0


@pytest.mark.slow
def test_augmenter_error_in_worker_is_raised() -> None:
    with (
        Augmenter(Augment(n=0, flip=True), seed=0, workers=1) as augmenter,
        pytest.raises(IndexError, match="too many indices"),
    ):
        list(augmenter.chunks([np.zeros(3, np.uint8)] * AUGMENT_CHUNK, 0))


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_augmenter_killed_parent_leaves_no_worker_behind(tmp_path: Path, ending: signal.Signals) -> None:
    program = tmp_path / "parent.py"
    program.write_text(
        "import time\n"
        "import numpy as np\n"
        "from flatmin.inputs.augment import Augmenter\n"
        "from flatmin.common.params import Augment\n"
        "if __name__ == '__main__':\n"
        "    images = [np.zeros((8, 8, 3), np.uint8)] * 1000\n"
        "    with Augmenter(Augment(), seed=0, workers=2) as augmenter:\n"
        "        chunks = augmenter.chunks(images, 0)\n"
        "        next(chunks)\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen([sys.executable, program], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        assert parent.stdout.readline() == b"ready\n"
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
