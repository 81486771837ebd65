"""Augmentation: a pure function of (seed, epoch, chunk)."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from flatmin.common.params import Augment
from flatmin.inputs.augment import AUGMENT_CHUNK, _imgaug_randaugment, augment

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


@pytest.mark.parametrize("settings", [ALL, Augment(n=0, flip=True)])
def test_augment_another_group_differs(settings: Augment) -> None:
    images = pictures(AUGMENT_CHUNK)
    assert equal(augment(images, settings, 1, 2, 3), augment(images, settings, 1, 2, 3, group=0))
    assert not equal(augment(images, settings, 1, 2, 3), augment(images, settings, 1, 2, 3, group=1))


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


def test_augment_everything_off_is_the_identity() -> None:
    images = pictures(AUGMENT_CHUNK)  # noise, none of which is its own mirror image
    assert equal(augment(images, Augment(engine="none", n=3, m=9, flip=True, crop=2), 0, 0, 0), images)
    assert equal(augment(images, Augment(n=0, m=30), 0, 0, 0), images)


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
