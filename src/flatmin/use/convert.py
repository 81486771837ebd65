"""Writes a classifier in each format, by Keras' own export."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from flatmin.common import console
from flatmin.models.classifier import Classifier
from flatmin.use import formats, network


def write(model: Classifier, name: formats.Name, path: Path, sample: Callable[[], Iterator[np.ndarray]]) -> None:
    """Write a classifier as a file or folder that gives calibrated probabilities of pixels.

    Args:
        model: with a temperature.
        sample: gives what the network sees of train's pictures, uint8 [size, size, 3] each, from which int8 gets its
            ranges.
    """
    exported = network.any_size(model) if formats.FORMATS[name].any_size else network.one_size(model)
    with console.quiet(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of converters about their own code
        if name == "keras":
            exported.save(path)
        elif name == "savedmodel":
            exported.export(path, verbose=False)
        elif name == "onnx":
            exported(np.zeros((1, 8, 8, 3), np.uint8))  # Keras exports no model that was never called
            exported.export(path, format="onnx", verbose=False)
        elif name == "litert":
            exported.export(path, format="litert", verbose=False)
        else:
            path.write_bytes(_int8(exported, sample))


def _int8(exported: keras.Model, sample: Callable[[], Iterator[np.ndarray]]) -> bytes:
    """Convert to LiteRT with weights and activations of 8 bits, all but the last softmax.

    In 8 bits it knows no probability between 0 and 1/256, nor a confidence above 255/256.
    """

    def calibration() -> Iterator[list[np.ndarray]]:
        return ([pixels[None]] for pixels in sample())

    with tempfile.TemporaryDirectory() as folder:
        exported.export(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = calibration
        options = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=["SOFTMAX"])
        selective = tf.lite.experimental.QuantizationDebugger(
            converter=converter, debug_dataset=calibration, debug_options=options
        )
        return selective.get_nondebug_quantized_model()
