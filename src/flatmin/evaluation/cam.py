"""Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391): where in an image the network saw a class."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from flatmin.models import registry
from flatmin.models.classifier import Classifier

# The colours of 0, 1/3, 2/3 and 1, from none to strong: they grow lighter, so they can be told apart without hue.
_COLORS = np.array([(20, 20, 90), (140, 30, 130), (240, 110, 50), (255, 240, 120)], np.float32)
_OPACITY = 0.75  # of the colours where the map is 1


def activation_maps(model: Classifier, pixels: np.ndarray, classes: Sequence[int] | np.ndarray) -> np.ndarray:
    """How much each place of the backbone's last feature maps speaks for a class.

    A map is the sum of the feature maps, each weighted by the mean gradient of the class's logit, where it is positive.
    With a linear head on pooled features it is Zhou's class activation map (2016, arXiv:1512.04150).

    Args:
        pixels: float32 [n, size, size, 3] in [0, 255], the network's input.
        classes: int [n], the class to explain in each image.

    Returns:
        float32 [n, rows, columns], each map divided by its maximum, so in [0, 1]; all 0 where nothing speaks for it.
    """
    layers = keras.Model(model.base.input, [model.base.output, model.features.output])
    inputs = registry.preprocess(model.description.backbone, tf.convert_to_tensor(pixels, tf.float32))
    with tf.GradientTape() as tape:
        maps, features = layers(inputs, training=False)
        logits = tf.gather(model.head(features, training=False), np.asarray(classes), axis=1, batch_dims=1)
    gradients = tape.gradient(logits, maps)
    weights = tf.reduce_mean(tf.cast(gradients, tf.float32), axis=(1, 2), keepdims=True)
    found = tf.nn.relu(tf.reduce_sum(weights * tf.cast(maps, tf.float32), axis=-1)).numpy()
    highest = found.max(axis=(1, 2), keepdims=True)
    return np.divide(found, highest, out=np.zeros_like(found), where=highest > 0)


def overlay(picture: Image.Image, activation: np.ndarray) -> Image.Image:
    """Colour a picture by a map of `activation_maps`: the more, the brighter; what does not speak for it turns grey.

    Args:
        picture: RGB, the whole of what the network saw.
        activation: float [rows, columns] in [0, 1].
    """
    shown = Image.fromarray(activation.astype(np.float32), "F").resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(shown), 0, 1)
    stops = np.linspace(0, 1, len(_COLORS))
    colors = np.stack([np.interp(strength, stops, _COLORS[:, channel]) for channel in range(3)], axis=-1)
    opacity = _OPACITY * strength[..., None]
    gray = np.asarray(picture.convert("L"), np.float32)[..., None]
    mixed = (1 - opacity) * gray + opacity * colors
    return Image.fromarray(np.rint(mixed).astype(np.uint8))
