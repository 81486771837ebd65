"""Augments images, as a pure function of (seed, epoch, chunk) that no batch size, order or number of workers changes.

A chunk is AUGMENT_CHUNK consecutive examples. Augmentation is seeded by the chunk because seeding imgaug takes longer
than augmenting an image. Where a chunk's pictures are large it is augmented in several groups, seeded one by one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from flatmin.common.params import Augment

# Random numbers are drawn for this many consecutive examples at a time. Another value changes every augmented image.
AUGMENT_CHUNK = 32


class Augmentation(NamedTuple):
    """How one chunk is augmented: the `augment` section of params.yaml, and the numbers that all randomness follows."""

    settings: Augment
    seed: int
    epoch: int
    chunk: int


def augment(
    images: list[np.ndarray], settings: Augment, seed: int, epoch: int, chunk: int, group: int = 0
) -> list[np.ndarray]:
    """Augment one group of a chunk's images: random flips, then crops, then RandAugment, as the settings say.

    Args:
        images: uint8 [height, width, 3] each; sizes may differ.
        settings: the `augment` section of params.yaml.
        seed, epoch, chunk, group: non-negative; all random numbers follow from these four.

    Returns:
        Images of the same sizes and dtype.
    """
    if settings.engine == "none":
        return images
    flip_and_crop_seed, randaugment_seed = np.random.SeedSequence([seed, epoch, chunk, group]).spawn(2)
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


def prepare(settings: Augment) -> None:
    """Import in a new worker process what the first chunk would have to wait for."""
    if settings.n:
        _imgaug_randaugment(settings.n, settings.m)


def positions(chunk: int, count: int) -> range:
    """The positions of a chunk's examples among `count`."""
    return range(chunk * AUGMENT_CHUNK, min((chunk + 1) * AUGMENT_CHUNK, count))
