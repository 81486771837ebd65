"""Grad-CAM, on a network whose answer is known."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from PIL import Image

from flatmin.evaluation import cam
from flatmin.models import registry
from flatmin.models.classifier import Classifier, Description

SIZE, CELL = 32, 8  # pixels of the image, and of a place of the feature maps


@pytest.fixture(scope="module")
def red_or_blue() -> Classifier:
    """A classifier whose two feature maps are how red and how blue each cell is; class 0 is red, class 1 is blue."""
    description = Description("EfficientNetLite0", SIZE, ["red", "blue"], 0.0, 0, "none", None, "unit", multiply_adds=0)
    pixels = keras.Input((SIZE, SIZE, 3))
    maps = keras.layers.Conv2D(2, 1, activation="relu", name="colors")(keras.layers.AveragePooling2D(CELL)(pixels))
    base = keras.Model(pixels, maps)
    ends = np.array([0, 255], np.float32).reshape(2, 1, 1, 1).repeat(3, axis=-1)
    black, white = np.asarray(registry.preprocess("EfficientNetLite0", ends))[:, 0, 0, 0].tolist()
    kernel = np.zeros((1, 1, 3, 2), np.float32)
    kernel[0, 0, 0, 0] = kernel[0, 0, 2, 1] = 1 / (white - black)
    base.get_layer("colors").set_weights([kernel, np.full(2, -black / (white - black), np.float32)])
    features = keras.Model(base.input, keras.layers.GlobalAveragePooling2D()(base.output))
    head = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    head.set_weights([np.array([[2.0, -1.0], [-1.0, 2.0]], np.float32), np.zeros(2, np.float32)])
    return Classifier(description, base, features, head, keras.Model(base.input, head(features.output)))


@pytest.fixture
def pixels() -> np.ndarray:
    """An image of red in one cell, half as red in another, and blue in a third: float32 [1, size, size, 3]."""
    image = np.zeros((1, SIZE, SIZE, 3), np.float32)
    image[0, :CELL, :CELL, 0] = 255
    image[0, CELL : 2 * CELL, :CELL, 0] = 127.5
    image[0, -CELL:, -CELL:, 2] = 255
    return image


def test_activation_maps_are_bright_where_the_class_is(red_or_blue: Classifier, pixels: np.ndarray) -> None:
    red, blue = cam.activation_maps(red_or_blue, np.concatenate([pixels, pixels]), [0, 1])
    expected = np.zeros((4, 4))
    expected[0, 0], expected[1, 0] = 1.0, 0.5
    np.testing.assert_allclose(red, expected, atol=1e-5)
    expected = np.zeros((4, 4))
    expected[-1, -1] = 1.0
    np.testing.assert_allclose(blue, expected, atol=1e-5)


def test_activation_maps_without_anything_of_the_class_are_zero(red_or_blue: Classifier, pixels: np.ndarray) -> None:
    pixels[..., 2] = 0
    (found,) = cam.activation_maps(red_or_blue, pixels, np.array([1]))
    assert found.shape == (4, 4)
    assert not found.any()


def test_activation_maps_of_a_pretrained_kind_of_network_with_all_levels_are_finite() -> None:
    from flatmin.models import classifier

    model = classifier.create(
        "MobileNet025", ["a", "b"], image_size=32, dropout=0.2, seed=1, weights="none", levels="all", hidden_units=4
    )
    images = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3)).astype(np.float32)
    found = cam.activation_maps(model, images, [0, 1, 1])
    assert found.shape == (3, *model.base.output.shape[1:3])
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_overlay_colours_the_bright_place_and_leaves_the_rest_grey() -> None:
    activation = np.zeros((4, 4), np.float32)
    activation[0, 0] = 1
    shown = np.asarray(cam.overlay(Image.new("RGB", (64, 64), (10, 200, 30)), activation)).astype(int)
    assert shown.shape == (64, 64, 3)
    assert np.ptp(shown[-1, -1]) == 0, "grey"
    red, green, blue = shown[2, 2]
    assert red > blue + 50
    assert green > blue + 50, "yellow"
