"""The networks that are exported: from pixels to calibrated probabilities."""

from __future__ import annotations

import keras
from keras import ops

from flatmin.images import Stored
from flatmin.models.classifier import Classifier
from flatmin.use import resize


def any_size(model: Classifier) -> keras.Model:
    """uint8 [batch, height, width, 3] of any height and width -> probabilities, float32 [batch, classes]."""
    made = model.description
    pixels = keras.Input((None, None, 3), dtype="uint8", name="pixels")
    stored = Stored(made.stored_side, made.stored_enlarge)
    return _calibrated(model, pixels, resize.to_square(pixels, made.image_size, made.fit, stored))


def one_size(model: Classifier) -> keras.Model:
    """uint8 [1, size, size, 3] -> probabilities, float32 [1, classes]."""
    size = model.description.image_size
    pixels = keras.Input((size, size, 3), batch_size=1, dtype="uint8", name="pixels")
    return _calibrated(model, pixels, ops.cast(pixels, "float32"))


def _calibrated(model: Classifier, pixels: keras.KerasTensor, squares: keras.KerasTensor) -> keras.Model:
    probabilities = ops.softmax(model.network(squares) / model.description.temperature)
    exported = keras.Model(pixels, probabilities, name="calibrated_classifier")
    exported.trainable = False
    return exported
