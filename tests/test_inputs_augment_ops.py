"""The native engine makes of an image what imgaug makes of it, and draws as imgaug draws."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from repository import ROOT

from flatmin.common.params import Augment
from flatmin.inputs import augment_ops
from flatmin.inputs.augment import CHUNK, Augmenter, _randaugment, augment
from flatmin.inputs.augment_ops import NAMES, draw, values

sys.path.append(str(ROOT / "bench"))
augmentation: Any = importlib.import_module("augmentation")

ALL = Augment(engine="tensorflow", n=3, m=9, flip=True, crop=3)
# Gray levels on average: a rotated pixel between two may be the other one, since Pillow rounds to 2**-16; OpenCV weighs
# a zoomed pixel's neighbours by 11 bits.
TOLERANCES = {"rotate": 0.05, "zoom": 0.15}


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [image for size in (40, 24) for image in augmentation.photographs(size, 48)]


def equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("m", [0, 1, 7, 16, 30])
@pytest.mark.parametrize("size", [24, 72])
def test_every_operation_makes_what_imgaug_makes(size: int, m: int) -> None:
    found = augmentation.operations(size, m)
    assert set(found) == {"zoom", *NAMES}
    assert {name: mean for name, (mean, _, _) in found.items() if mean > TOLERANCES.get(name, 0.001)} == {}
    assert found["zoom"][1] <= 1
    if m == 30:
        assert all(changed > 1 for name, (_, _, changed) in found.items() if name != "identity")


@pytest.mark.parametrize("name", ["autocontrast", "equalize", "contrast", "blur", "smooth", "sharpness", "rotate"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (2, 50), (37, 36), (40, 60)])
def test_odd_pictures_too(name: str, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    tops = np.array([1, 2, 40, 255, 256] * 3)[:, None, None, None]  # flat, nearly flat, dark, light
    images = random.integers(0, tops, (15, *shape, 3)).astype(np.uint8)
    images[5:10] = 255 - images[5:10]
    wanted = augmentation.imgaugs(name, 9, 1)(images=images)
    made = augment_ops.run(name, images, values(name, 9, np.ones(15), np.ones((15, 2)), *shape))
    assert (made != wanted).mean() < (0.01 if name == "rotate" else 1e-4)


def drawn(augmenter: Any, attribute: str) -> np.ndarray:
    return getattr(augmenter, attribute).draw_samples((2000,), random_state=7)


@pytest.mark.parametrize("m", range(31))
def test_magnitudes_and_signs_are_those_that_imgaug_draws(m: int) -> None:
    _randaugment(1, m)
    from imgaug.random import RNG

    theirs = dict(zip(NAMES, _randaugment(1, m)[1], strict=True))
    signs = draw(np.random.default_rng(0), 2000, 1, m).signs

    def of(parameter: Any) -> np.ndarray:
        return parameter.draw_samples((2000,), random_state=RNG(7))

    def ours(name: str) -> np.ndarray:
        return values(name, m, signs[:, NAMES.index(name)], np.zeros((2000, 2)), 100, 100)

    pairs = {
        "posterize": (ours("posterize")[:, 0], 2 ** (8 - of(theirs["posterize"].counts))),
        "solarize": (ours("solarize")[:, 0], of(theirs["solarize"].threshold)),
        "rotate": (np.rad2deg(np.arcsin(ours("rotate")[:, 1])), of(theirs["rotate"].rotate)),
        "shear_x": (-ours("shear_x")[:, 1], np.tanh(np.deg2rad(of(theirs["shear_x"].shear[0])))),
        "shear_y": (-ours("shear_y")[:, 3], np.tanh(np.deg2rad(of(theirs["shear_y"].shear[1])))),
        "translate_x": (ours("translate_x")[:, 2] / 100, of(theirs["translate_x"].translate[0])),
        "translate_y": (ours("translate_y")[:, 5] / 100, of(theirs["translate_y"].translate[1])),
        **{
            name: (ours(name)[:, 0], of(theirs[name].factor))
            for name in ("color", "contrast", "brightness", "sharpness")
        },
    }
    for name, (mine, imgaugs) in pairs.items():
        kinds, often = np.unique(np.round(mine, 4), return_counts=True)
        np.testing.assert_allclose(kinds, np.unique(np.round(imgaugs.astype(float), 4)), atol=2e-4, err_msg=name)
        assert often.min() > 2000 / len(kinds) * 0.9, name


def test_what_else_is_drawn_is_spread_as_imgaug_spreads_it() -> None:
    of = draw(np.random.default_rng(1), 20_000, 3, 12)
    assert of.active.sum(axis=1).tolist() == [3] * 20_000
    np.testing.assert_allclose(of.active.mean(axis=0), 3 / 18, atol=0.01)
    zooms, centres = of.zooms * 224 / 12, of.centres
    for spread in (*zooms.T, *centres.T):
        np.testing.assert_allclose(np.quantile(spread, [0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], atol=0.02)
    np.testing.assert_allclose(np.corrcoef([*zooms.T, *centres.T]), np.eye(6), atol=0.03)
    orders = np.array([draw(np.random.default_rng(seed), 1, 1, 1).order for seed in range(300)])
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(18))}
    np.testing.assert_allclose(orders.mean(axis=0), 8.5, atol=1.5)


def test_the_operations_are_imgaugs_in_its_order() -> None:
    theirs = [type(child).__name__ for child in _randaugment(1, 7)[1]]
    plain = {"Identity", "Autocontrast", "Equalize", "Invert", "Posterize", "Solarize", "Cutout"}
    for name, kind in zip(NAMES, theirs, strict=True):
        moves = name.split("_")[0] in ("rotate", "shear", "translate")
        expected = "Affine" if moves else name.title() if name.title() in plain else None
        assert kind in (expected, f"Enhance{name.title()}", f"Filter{name.title()}")


def chunks(images: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    return (images[start : start + CHUNK] for start in range(0, len(images), CHUNK))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int, pictures: list[np.ndarray]) -> None:
    alone = [augment(chunk, ALL, 1, 4, index) for index, chunk in enumerate(chunks(pictures))]
    with Augmenter(ALL, seed=1, workers=workers) as augmenter:
        for _ in range(2):
            found = list(augmenter.chunks(pictures, 4))
            assert [len(chunk) for chunk in found] == [CHUNK] * 3
            assert all(equal(one, other) for one, other in zip(found, alone, strict=True))


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 1)])
def test_seed_epoch_and_chunk_each_matter(other: tuple[int, int, int], pictures: list[np.ndarray]) -> None:
    settings = Augment(engine="tensorflow", n=1, m=9)
    before = [image.copy() for image in pictures]
    first = augment(pictures, settings, 1, 0, 0)
    assert equal(first, augment(pictures, settings, 1, 0, 0))
    assert not equal(first, augment(pictures, settings, *other))
    assert equal(pictures, before)
    assert [image.shape for image in first] == [image.shape for image in pictures]


def test_flips_and_crops_are_those_of_imgaugs_engine(pictures: list[np.ndarray]) -> None:
    flips_and_crops = ALL.model_copy(update={"n": 0})
    engines = (flips_and_crops, flips_and_crops.model_copy(update={"engine": "imgaug"}))
    both = [augment(pictures, settings, 3, 2, 1) for settings in engines]
    assert equal(*both)
    assert not equal(both[0], pictures)


@pytest.mark.parametrize("m", [0, 30])
@pytest.mark.parametrize("n", [1, 14])
def test_every_magnitude_and_shape(n: int, m: int) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*shape, 3), np.uint8) for shape in [(1, 1), (40, 3), (2, 9), (33, 32)] * 4]
    changed = augment(images, Augment(engine="tensorflow", n=n, m=m), 0, 0, 0)
    assert [image.shape for image in changed] == [image.shape for image in images]
    assert all(image.dtype == np.uint8 and image.flags.c_contiguous for image in changed)


@pytest.mark.slow
def test_another_process_gets_the_same_bytes_with_determinism_as_this_one_without(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 40, 40, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    program = (
        "import numpy as np, tensorflow as tf\n"
        "from flatmin.augment import augment\n"
        "from flatmin.params import Augment\n"
        "tf.keras.utils.set_random_seed(5)\n"
        "tf.config.experimental.enable_op_determinism()\n"
        "settings = Augment(engine='tensorflow', n=14, m=9)\n"
        "np.save('made.npy', augment(list(np.load('images.npy')), settings, 1, 2, 3))\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=True,
        capture_output=True,
    )
    made = augment(list(images), Augment(engine="tensorflow", n=14, m=9), 1, 2, 3)
    assert equal(made, list(np.load(tmp_path / "made.npy")))


def test_it_runs_within_a_dataset(pictures: list[np.ndarray]) -> None:
    """As views' generator does, in a thread of TensorFlow's own."""
    with Augmenter(ALL, seed=0, workers=2) as augmenter:

        def generator() -> Iterator[np.ndarray]:
            for chunk in augmenter.chunks(pictures, 0):
                yield from chunk

        dataset = tf.data.Dataset.from_generator(generator, output_signature=tf.TensorSpec((None, None, 3), tf.uint8))
        found = list(dataset.as_numpy_iterator())
    alone = [image for index, chunk in enumerate(chunks(pictures)) for image in augment(chunk, ALL, 0, 0, index)]
    assert equal(found, alone)
