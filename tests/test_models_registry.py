"""The table of backbones, and preprocessing against Keras' own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from flatmin.common.errors import InputError
from flatmin.models import registry
from flatmin.models.registry import BACKBONES

# The module in keras.applications that has a backbone's preprocessing.
KERAS_MODULES = {
    "ResNet50": "resnet",
    "ResNet101": "resnet",
    "DenseNet121": "densenet",
    "InceptionResNetV2": "inception_resnet_v2",
    "NASNetMobile": "nasnet",
    "MobileNetV2": "mobilenet_v2",
    "EfficientNetB0": "efficientnet",
    "EfficientNetB1": "efficientnet",
    "EfficientNetB2": "efficientnet",
    "EfficientNetB3": "efficientnet",
    "EfficientNetV2B0": "efficientnet_v2",
    "ConvNeXtTiny": "convnext",
    "MobileNet": "mobilenet",
    "MobileNet025": "mobilenet",
    "MobileNetV3": "mobilenet_v3",
    "MobileNetV3Small": "mobilenet_v3",
    "MobileNetV3Large": "mobilenet_v3",
}
LITES = [name for name in BACKBONES if BACKBONES[name].is_lite]


def test_registry_import_loads_neither_builders_nor_tensorflow() -> None:
    unwanted = ("keras", "tensorflow", "flatmin.models.build", "flatmin.models.efficientnet_lite")
    code = f"import sys, flatmin.models.registry; print([name for name in {unwanted} if name in sys.modules])"
    path = {"PYTHONPATH": str(Path(registry.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_find_unknown_name_is_refused() -> None:
    with pytest.raises(InputError, match=r"backbones: expected one of ResNet50, .*, received 'ResNet51'"):
        registry.find("ResNet51")


def test_registry_rows_are_all_checked() -> None:
    assert {*KERAS_MODULES, *LITES} == set(BACKBONES)
    for row in BACKBONES.values():
        assert row.image_size >= row.smallest
        assert row.imagenet_size in (None, row.image_size)


@pytest.mark.parametrize("name", KERAS_MODULES)
def test_preprocess_keras_backbone_equals_keras(name: str) -> None:
    images = np.random.default_rng(0).uniform(0, 255, (2, 5, 7, 3)).astype(np.float32)
    images[0, 0, 0] = [0, 127, 255]
    theirs = importlib.import_module(f"keras.applications.{KERAS_MODULES[name]}").preprocess_input(images.copy())
    ours = registry.preprocess(name, images)
    assert keras.backend.standardize_dtype(ours.dtype) == "float32"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LITES)
def test_preprocess_efficientnet_lite_scales_to_one(name: str) -> None:
    pixels = np.array([[[[0, 127, 255]]]], np.uint8)
    np.testing.assert_array_equal(registry.preprocess(name, pixels), [[[[-127 / 128, 0, 1]]]])


@pytest.mark.parametrize("name", ["ResNet50", "DenseNet121", "MobileNet", "EfficientNetLite0", "EfficientNetB0"])
def test_preprocess_in_model_and_traced_equals_eager(name: str) -> None:
    images = np.random.default_rng(0).uniform(0, 255, (2, 4, 4, 3)).astype(np.float32)
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, registry.preprocess(name, inputs))
    expected = registry.preprocess(name, images)
    np.testing.assert_allclose(model(images), expected, rtol=0, atol=1e-5)
    traced = tf.function(lambda tensor: registry.preprocess(name, tensor))
    np.testing.assert_allclose(traced(tf.constant(images)), expected, rtol=0, atol=1e-5)
