"""The resize inside exported models against Pillow's, which the network was trained behind."""

from __future__ import annotations

from typing import get_args

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from flatmin import images
from flatmin.images import Fit
from flatmin.use import resize

SIZE = 48
ROWS_FIRST = [(16, 16), (32, 32), (48, 48), (49, 48), (36, 60), (64, 64), (72, 95), (31, 301), (300, 299), (480, 640)]
COLUMNS_FIRST = [(96, 40), (200, 50), (301, 31)]  # height, width


def graph(fit: Fit) -> tf.types.experimental.GenericFunction:
    pixels = keras.Input((None, None, 3), dtype="uint8")
    return tf.function(keras.Model(pixels, resize.to_square(pixels, SIZE, fit)), reduce_retracing=True)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def difference(fit: Fit, pixels: np.ndarray, received: np.ndarray) -> float:
    expected = np.asarray(images.to_square(Image.fromarray(pixels), SIZE, fit))
    assert received.shape == expected.shape
    return float(np.abs(received - expected).max())


@pytest.mark.parametrize("fit", get_args(Fit))
def test_to_square_equals_pillow(fit: Fit) -> None:
    run = graph(fit)
    for height, width in ROWS_FIRST:
        pixels = noise(height, width)
        assert difference(fit, pixels, run(pixels[None]).numpy()[0]) == 0, (height, width)


@pytest.mark.parametrize("fit", get_args(Fit))
def test_to_square_where_pillow_goes_through_columns_first_differs_by_one_at_most(fit: Fit) -> None:
    run = graph(fit)
    for height, width in COLUMNS_FIRST:
        pixels = noise(height, width)
        assert difference(fit, pixels, run(pixels[None]).numpy()[0]) <= 1, (height, width)


def test_to_square_of_a_batch_is_that_of_each() -> None:
    pair = np.stack([noise(40, 56), 255 - noise(40, 56)])
    received = graph("crop")(pair).numpy()
    assert [difference("crop", pixels, each) for pixels, each in zip(pair, received, strict=True)] == [0, 0]
