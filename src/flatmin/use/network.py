"""The networks that are exported: from pixels to calibrated probabilities."""

from __future__ import annotations

import keras
from keras import ops

from flatmin.common.errors import InputError
from flatmin.images import Fit, Stored
from flatmin.models.classifier import Classifier
from flatmin.use import resize


def temperature(model: Classifier, folder: object) -> float:
    """The classifier's temperature.

    Raises:
        InputError: it has none, since finalize did not release it.
    """
    if model.description.temperature is None:
        raise InputError(f"{folder}: expected a classifier with a temperature, as finalize releases it, received none")
    return model.description.temperature


def any_size(model: Classifier, temperature: float, fit: Fit, stored: Stored) -> keras.Model:
    """uint8 [batch, height, width, 3] of any height and width -> probabilities, float32 [batch, classes]."""
    pixels = keras.Input((None, None, 3), dtype="uint8", name="pixels")
    square = resize.to_square(pixels, model.description.image_size, fit, stored)
    return _with_softmax(pixels, model.network(square), temperature)


def one_size(model: Classifier, temperature: float) -> keras.Model:
    """uint8 [1, size, size, 3] -> probabilities, float32 [1, classes]."""
    size = model.description.image_size
    pixels = keras.Input((size, size, 3), batch_size=1, dtype="uint8", name="pixels")
    return _with_softmax(pixels, model.network(ops.cast(pixels, "float32")), temperature)


def _with_softmax(pixels: keras.KerasTensor, logits: keras.KerasTensor, temperature: float) -> keras.Model:
    probabilities = ops.softmax(logits / temperature)
    exported = keras.Model(pixels, probabilities, name="calibrated_classifier")
    exported.trainable = False
    return exported
