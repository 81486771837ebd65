"""Images a second that each augmentation engine makes, and how far the native engine's operations are from imgaug's.

`python bench/augmentation.py` writes to bench/results.json and prints the tables of docs/augmentation.md, with
`operations` after it the second one alone, which takes seconds. The images are windows of the two photographs that
scikit-learn carries. Engines take turns, and the quickest turn of each counts, since what else runs on a machine only
ever slows one.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from sam_cost import RESULTS, add
from threadpoolctl import threadpool_limits

from flatmin.common.params import Augment
from flatmin.inputs import augment
from flatmin.inputs.augment import CHUNK, Augmenter

SIZES = {72: 16, 180: 8}  # pixels: chunks in a turn
ENGINES = ("imgaug", "tensorflow")
RECIPES = {"RandAugment n=3 m=7, flip, crop 4": {"n": 3, "m": 7}, "flip, crop 4": {"n": 0}}
TURNS = 3
MAGNITUDES = (7, 30)
CENTRE = (0.3, 0.8)  # of the cutout


def photographs(size: int, count: int) -> np.ndarray:
    """uint8 [count, size, size, 3]: windows of two photographs."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    windows = []
    for picture in itertools.islice(itertools.cycle(load_sample_images().images), count):
        top, left = (random.integers(0, extent - size) for extent in picture.shape[:2])
        windows.append(picture[top : top + size, left : left + size])
    return np.stack(windows)


def seconds(chunks: Iterable[list[np.ndarray]]) -> tuple[float, float]:
    """Of the clock and of this process, to go through chunks."""
    clock, process = time.perf_counter(), time.process_time()
    for _ in chunks:
        pass
    return time.perf_counter() - clock, time.process_time() - process


def rates(size: int, recipe: dict[str, Any]) -> dict[str, float]:
    """Images a second by engine and workers, and microseconds of CPU an image.

    The latter are of the training process, so with workers that are processes it is what handing over costs; they say
    more than a rate where other work runs.
    """
    threadpool_limits(1)  # as a worker has it: NumPy's other threads would spin on into the next turn
    images = list(photographs(size, SIZES[size] * CHUNK))
    quickest: dict[str, float] = {}
    costs: dict[str, float] = {}
    with ExitStack() as stack:
        passes: dict[str, Callable[[int], Iterable[list[np.ndarray]]]] = {}
        for engine in ENGINES:
            settings = Augment(engine=engine, flip=True, crop=4, **recipe)  # type: ignore[arg-type]
            passes[f"{engine}, in process"] = partial(in_process, images, settings)
            for workers in range(1, len(os.sched_getaffinity(0)) + 1):
                augmenter = stack.enter_context(Augmenter(settings, 0, workers))
                passes[f"{engine}, workers: {workers}"] = partial(augmenter.chunks, images)
        for turn, (name, chunks) in itertools.product(range(-1, TURNS), passes.items()):
            spent, own = seconds(chunks(turn + 1))
            if turn >= 0:  # the first starts workers and traces graphs
                quickest[name] = max(quickest.get(name, 0.0), round(len(images) / spent, 1))
                costs[name] = min(costs.get(name, np.inf), round(own / len(images) * 1e6, 1))
    return quickest | {f"{name}, microseconds of CPU here": cost for name, cost in costs.items()}


def in_process(images: list[np.ndarray], settings: Augment, epoch: int) -> Iterator[list[np.ndarray]]:
    for number, start in enumerate(range(0, len(images), CHUNK)):
        yield augment.augment(images[start : start + CHUNK], settings, 0, epoch, number)


def imgaugs(name: str, m: int, sign: int) -> Any:
    """imgaug's operation of that name with its sign, and the cutout's centre, fixed."""
    augment._randaugment(1, m)  # mends NumPy's names, without which imgaug can't be imported
    import imgaug.augmenters as iaa
    import imgaug.parameters as iap

    from flatmin.inputs.augment_ops import FILL, NAMES

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
    return augment._randaugment(1, m)[1][NAMES.index(name)]  # nothing in it is random


def zooms(images: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops [n, 4] as drawn at a magnitude, in pixels, and what imgaug makes of them."""
    augment._randaugment(1, m)
    import imgaug.augmenters as iaa

    crops = np.rint(np.random.default_rng(0).uniform(0, m, (len(images), 4)) / 224 * images.shape[1])

    def zoomed(image: np.ndarray, crop: np.ndarray) -> np.ndarray:
        cut = iaa.Crop(px=tuple(int(side) for side in crop), keep_size=False)
        return iaa.KeepSizeByResize(cut, interpolation="linear")(image=image)

    return crops, np.stack([zoomed(image, crop) for image, crop in zip(images, crops, strict=True)])


def operations(size: int, m: int) -> dict[str, tuple[float, int, float]]:
    """By operation: mean and largest difference from imgaug's output, and how much imgaug changes, in gray levels."""
    from flatmin.inputs import augment_ops

    images = photographs(size, CHUNK)
    crops, wanted = zooms(images, m)
    pairs = {"zoom": [(augment_ops.run("zoom", images, crops), wanted)]}
    for name, sign in itertools.product(augment_ops.NAMES, (-1, 1)):
        fixed = np.full(CHUNK, sign), np.tile(CENTRE, (CHUNK, 1))
        made = augment_ops.run(name, images, augment_ops.values(name, m, *fixed, size, size))
        pairs.setdefault(name, []).append((made, imgaugs(name, m, sign)(images=images)))

    def apart(made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.abs(made.astype(int) - wanted)

    return {
        name: (
            max(float(apart(made, wanted).mean()) for made, wanted in found),
            max(int(apart(made, wanted).max()) for made, wanted in found),
            max(float(apart(wanted, images).mean()) for _, wanted in found),
        )
        for name, found in pairs.items()
    }


def print_operations() -> dict[str, Any]:
    """The table of operations; returns the mean differences."""
    found = {f"{size} px, m={m}": operations(size, m) for size, m in itertools.product(SIZES, MAGNITUDES)}
    print("| operation | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for name in next(iter(found.values())):
        cells = (f"{mean:.3f} ({most}) of {change:.1f}" for mean, most, change in (of[name] for of in found.values()))
        print(f"| {name} | " + " | ".join(cells) + " |")
    return {where: {name: round(of[name][0], 4) for name in of} for where, of in found.items()}


def main() -> None:
    """Measure all, write the results and print the tables."""
    measured = {f"{size} px, {name}": rates(size, recipe) for size in SIZES for name, recipe in RECIPES.items()}
    print("| | " + " | ".join(measured) + " |\n|---|" + "---|" * len(measured))
    for name in next(iter(measured.values())):
        print(f"| {name} | " + " | ".join(f"{of[name]:.0f}" for of in measured.values()) + " |")
    add(RESULTS, {"augmentation": {"images_per_second": measured, "operations_mean_difference": print_operations()}})


if __name__ == "__main__":
    if sys.argv[1:] == ["operations"]:
        print_operations()
    else:
        main()
