"""The TensorFlow engine: operations equal to imgaug's, and random numbers with the same distributions."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from repository import ROOT
from sklearn.datasets import load_sample_images

from flatmin.common.params import Augment
from flatmin.inputs import augment_ops
from flatmin.inputs.augment import AUGMENT_CHUNK, _imgaug_randaugment, augment
from flatmin.inputs.augment_ops import FILL, NAMES, draw, values

ALL = Augment(engine="tensorflow", n=3, m=9, flip=True, crop=3)
CENTRE = (0.3, 0.8)  # of the cutout, as fractions
# Mean differences that are allowed, in gray levels. A rotated pixel halfway between two may be the other one, because
# Pillow rounds to 2**-16; and OpenCV weighs a zoomed pixel's neighbours with 11 bits.
TOLERANCES = {"rotate": 0.05, "zoom": 0.15}


@functools.cache
def photographs(size: int, count: int) -> np.ndarray:
    """Windows of scikit-learn's two photographs: uint8 [count, size, size, 3]."""
    random = np.random.default_rng(0)
    windows = []
    for picture in itertools.islice(itertools.cycle(load_sample_images().images), count):
        top, left = (random.integers(0, extent - size) for extent in picture.shape[:2])
        windows.append(picture[top : top + size, left : left + size])
    return np.stack(windows)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [image for size in (40, 24) for image in photographs(size, 48)]


def equal(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def imgaug_operation(name: str, m: int, sign: int) -> Any:
    """Make imgaug's operation with a fixed sign and a fixed centre of the cutout."""
    theirs = _imgaug_randaugment(1, m)  # first, since imgaug can't be imported without NumPy's old names
    import imgaug.augmenters as iaa
    import imgaug.parameters as iap

    level = sign * m / 30
    moved = {
        "shear_x": {"shear": {"x": level * np.rad2deg(0.3)}},
        "shear_y": {"shear": {"y": level * np.rad2deg(0.3)}},
        "translate_x": {"translate_percent": {"x": level * 0.33}},
        "translate_y": {"translate_percent": {"y": level * 0.33}},
    }
    if name == "rotate":
        return iaa.pillike.Affine(rotate=30 * level, fillcolor=FILL, center=(0.5, 0.5))
    if name in moved:
        return iaa.pillike.Affine(**moved[name], fillcolor=FILL, center=(0.0, 0.0))
    if name in ("color", "contrast", "brightness", "sharpness"):
        return getattr(iaa.pillike, f"Enhance{name.title()}")(1 + 0.9 * level)
    if name == "cutout":
        position = tuple(iap.Deterministic(at) for at in CENTRE)
        return iaa.Cutout(1, position=position, size=20 / 32 * m / 30, squared=True, fill_mode="constant", cval=FILL)
    return theirs[1][NAMES.index(name)]  # nothing in it is random


def imgaug_zoom(images: np.ndarray, crops: np.ndarray) -> np.ndarray:
    import imgaug.augmenters as iaa

    def zoomed(image: np.ndarray, crop: np.ndarray) -> np.ndarray:
        cropped = iaa.Crop(px=tuple(int(side) for side in crop), keep_size=False)
        return iaa.KeepSizeByResize(cropped, interpolation="linear")(image=image)

    return np.stack([zoomed(image, crop) for image, crop in zip(images, crops, strict=True)])


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Gray levels."""
    return np.abs(one.astype(int) - other)


@pytest.mark.parametrize("m", [0, 1, 7, 16, 30])
@pytest.mark.parametrize("size", [24, 72])
@pytest.mark.slow
def test_run_every_operation_equals_imgaug(size: int, m: int) -> None:
    images = photographs(size, AUGMENT_CHUNK)
    for name, sign in itertools.product(NAMES, (-1, 1)):
        expected = imgaug_operation(name, m, sign)(images=images)
        fixed = np.full(AUGMENT_CHUNK, sign), np.tile(CENTRE, (AUGMENT_CHUNK, 1))
        received = augment_ops.run(name, images, values(name, m, *fixed, size, size))
        assert difference(received, expected).mean() <= TOLERANCES.get(name, 0.001), name
        if m == 30 and sign == 1 and name != "identity":
            assert difference(expected, images).mean() > 1, name


@pytest.mark.parametrize("m", [0, 1, 7, 16, 30])
@pytest.mark.parametrize("size", [24, 72])
def test_run_zoom_equals_imgaug(size: int, m: int) -> None:
    _imgaug_randaugment(1, m)
    images = photographs(size, AUGMENT_CHUNK)
    crops = np.rint(np.random.default_rng(0).uniform(0, m, (len(images), 4)) / 224 * size)
    differences = difference(augment_ops.run("zoom", images, crops), imgaug_zoom(images, crops))
    assert differences.mean() <= TOLERANCES["zoom"]
    assert differences.max() <= 1


@pytest.mark.parametrize("name", ["autocontrast", "equalize", "contrast", "blur", "smooth", "sharpness", "rotate"])
@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (2, 50), (37, 36), (40, 60)])
def test_run_odd_pictures_equals_imgaug(name: str, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    tops = np.array([1, 2, 40, 255, 256] * 3)[:, None, None, None]  # constant, nearly constant, dark, light
    images = random.integers(0, tops, (15, *shape, 3)).astype(np.uint8)
    images[5:10] = 255 - images[5:10]
    expected = imgaug_operation(name, 9, 1)(images=images)
    received = augment_ops.run(name, images, values(name, 9, np.ones(15), np.ones((15, 2)), *shape))
    assert (received != expected).mean() < (0.01 if name == "rotate" else 1e-4)


@pytest.mark.parametrize("m", range(31))
def test_values_magnitudes_and_signs_are_those_that_imgaug_draws(m: int) -> None:
    _imgaug_randaugment(1, m)
    from imgaug.random import RNG

    theirs = dict(zip(NAMES, _imgaug_randaugment(1, m)[1], strict=True))
    signs = draw(np.random.default_rng(0), 2000, 1, m).signs

    def samples(parameter: Any) -> np.ndarray:
        return parameter.draw_samples((2000,), random_state=RNG(7))

    def ours(name: str) -> np.ndarray:
        return values(name, m, signs[:, NAMES.index(name)], np.zeros((2000, 2)), 100, 100)

    pairs = {
        "posterize": (ours("posterize")[:, 0], 2 ** (8 - samples(theirs["posterize"].counts))),
        "solarize": (ours("solarize")[:, 0], samples(theirs["solarize"].threshold)),
        "rotate": (np.rad2deg(np.arcsin(ours("rotate")[:, 1])), samples(theirs["rotate"].rotate)),
        "shear_x": (-ours("shear_x")[:, 1], np.tanh(np.deg2rad(samples(theirs["shear_x"].shear[0])))),
        "shear_y": (-ours("shear_y")[:, 3], np.tanh(np.deg2rad(samples(theirs["shear_y"].shear[1])))),
        "translate_x": (ours("translate_x")[:, 2] / 100, samples(theirs["translate_x"].translate[0])),
        "translate_y": (ours("translate_y")[:, 5] / 100, samples(theirs["translate_y"].translate[1])),
        **{
            name: (ours(name)[:, 0], samples(theirs[name].factor))
            for name in ("color", "contrast", "brightness", "sharpness")
        },
    }
    for name, (received, expected) in pairs.items():
        kinds, counts = np.unique(np.round(received, 4), return_counts=True)
        np.testing.assert_allclose(kinds, np.unique(np.round(expected.astype(float), 4)), atol=2e-4, err_msg=name)
        assert counts.min() > 2000 / len(kinds) * 0.9, name


def test_draw_has_the_distributions_of_imgaug() -> None:
    draws = draw(np.random.default_rng(1), 20_000, 3, 12)
    assert draws.active.sum(axis=1).tolist() == [3] * 20_000
    np.testing.assert_allclose(draws.active.mean(axis=0), 3 / 18, atol=0.01)
    zooms, centres = draws.zooms * 224 / 12, draws.centres
    for spread in (*zooms.T, *centres.T):
        np.testing.assert_allclose(np.quantile(spread, [0, 0.25, 0.5, 0.75, 1]), [0, 0.25, 0.5, 0.75, 1], atol=0.02)
    np.testing.assert_allclose(np.corrcoef([*zooms.T, *centres.T]), np.eye(6), atol=0.03)
    orders = np.array([draw(np.random.default_rng(seed), 1, 1, 1).order for seed in range(300)])
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(18))}
    np.testing.assert_allclose(orders.mean(axis=0), 8.5, atol=1.5)


def test_operations_are_imgaugs_in_its_order() -> None:
    theirs = [type(child).__name__ for child in _imgaug_randaugment(1, 7)[1]]
    plain = {"Identity", "Autocontrast", "Equalize", "Invert", "Posterize", "Solarize", "Cutout"}
    for name, kind in zip(NAMES, theirs, strict=True):
        moves = name.split("_")[0] in ("rotate", "shear", "translate")
        expected = "Affine" if moves else name.title() if name.title() in plain else None
        assert kind in (expected, f"Enhance{name.title()}", f"Filter{name.title()}")


def chunks(images: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    return (images[start : start + AUGMENT_CHUNK] for start in range(0, len(images), AUGMENT_CHUNK))


@pytest.mark.parametrize("other", [(2, 0, 0), (1, 1, 0), (1, 0, 1)])
@pytest.mark.slow
def test_augment_another_seed_epoch_or_chunk_differs(other: tuple[int, int, int], pictures: list[np.ndarray]) -> None:
    settings = Augment(engine="tensorflow", n=1, m=9)
    before = [image.copy() for image in pictures]
    first = augment(pictures, settings, 1, 0, 0)
    assert equal(first, augment(pictures, settings, 1, 0, 0))
    assert not equal(first, augment(pictures, settings, *other))
    assert equal(pictures, before)
    assert [image.shape for image in first] == [image.shape for image in pictures]


def test_augment_flips_and_crops_equal_those_of_imgaugs_engine(pictures: list[np.ndarray]) -> None:
    flips_and_crops = ALL.model_copy(update={"n": 0})
    engines = (flips_and_crops, flips_and_crops.model_copy(update={"engine": "imgaug"}))
    both = [augment(pictures, settings, 3, 2, 1) for settings in engines]
    assert equal(*both)
    assert not equal(both[0], pictures)


@pytest.mark.parametrize("m", [0, 30])
@pytest.mark.parametrize("n", [1, 14])
def test_augment_every_magnitude_and_shape_works(n: int, m: int) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*shape, 3), np.uint8) for shape in [(1, 1), (40, 3), (2, 9), (33, 32)] * 4]
    changed = augment(images, Augment(engine="tensorflow", n=n, m=m), 0, 0, 0)
    assert [image.shape for image in changed] == [image.shape for image in images]
    assert all(image.dtype == np.uint8 and image.flags.c_contiguous for image in changed)


@pytest.mark.slow
def test_augment_in_deterministic_process_gives_the_same_bytes(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 40, 40, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    program = (
        "import numpy as np, tensorflow as tf\n"
        "from flatmin.inputs.augment import augment\n"
        "from flatmin.common.params import Augment\n"
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
