"""The resize inside exported models against Pillow's, which the network was trained behind."""

from __future__ import annotations

from typing import get_args

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from flatmin import images
from flatmin.images import OWN_SIZE, Fit, Stored
from flatmin.use import resize

SIZE = 48
# Height and width. In the last five Pillow goes through the columns first.
SHAPES = [(16, 16), (32, 32), (48, 48), (36, 60), (64, 64), (72, 95), (31, 301), (300, 299), (480, 640)]
SHAPES += [(49, 48), (96, 40), (96, 71), (200, 50), (301, 31), (3, 400)]


def graph(fit: Fit, stored: Stored = OWN_SIZE) -> tf.types.experimental.GenericFunction:
    pixels = keras.Input((None, None, 3), dtype="uint8")
    return tf.function(keras.Model(pixels, resize.to_square(pixels, SIZE, fit, stored)), reduce_retracing=True)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def difference(fit: Fit, pixels: np.ndarray, received: np.ndarray, stored: Stored = OWN_SIZE) -> float:
    expected = np.asarray(images.to_square(stored.resize(Image.fromarray(pixels)), SIZE, fit))
    assert received.shape == expected.shape
    return float(np.abs(received - expected).max())


@pytest.mark.parametrize("fit", get_args(Fit))
def test_to_square_equals_pillow(fit: Fit) -> None:
    run = graph(fit)
    for height, width in SHAPES:
        pixels = noise(height, width)
        assert difference(fit, pixels, run(pixels[None]).numpy()[0]) == 0, (height, width)


def test_to_square_of_a_batch_is_that_of_each() -> None:
    pair = np.stack([noise(40, 56), 255 - noise(40, 56)])
    received = graph("crop")(pair).numpy()
    assert [difference("crop", pixels, each) for pixels, each in zip(pair, received, strict=True)] == [0, 0]


@pytest.mark.parametrize("fit", get_args(Fit))
@pytest.mark.parametrize("stored", [Stored(32), Stored(40, enlarge=False), Stored(64, enlarge=False)])
def test_to_square_goes_through_the_stored_size(fit: Fit, stored: Stored) -> None:
    run = graph(fit, stored)
    for height, width in [(8, 8), (16, 20), (20, 16), (40, 64), (64, 64), (61, 90), (200, 300), (100, 299), (50, 26)]:
        pixels = noise(height, width)
        assert difference(fit, pixels, run(pixels[None]).numpy()[0], stored) == 0, (height, width)


def test_to_square_of_a_very_long_picture_stays_near_pillow() -> None:
    """Its stored size is squeezed to `LONGEST`, and the fit squeezes it in any case."""
    pixels = np.asarray(Image.fromarray(noise(8, 96)).resize((480, 40), Image.Resampling.BICUBIC))
    received = graph("squash", Stored(32, enlarge=False))(pixels[None]).numpy()[0]
    expected = np.asarray(images.to_square(Stored(32).resize(Image.fromarray(pixels)), SIZE, "squash"), np.float64)
    assert 0 < np.abs(received - expected).mean() < 3
