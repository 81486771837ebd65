"""Run a frozen trunk over batches of pixels: in LiteRT on CPU, where that gives what TensorFlow gives, else TensorFlow.

LiteRT (XNNPACK) took half of TensorFlow's time on CPU; bench/results.json has the ratio.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin import cache, reporting
from flatmin.params import Runtime
from flatmin.reporting import InputError

# Of the largest activation. Activations are kept in float16, which rounds by 1e-3; bfloat16 rounds each of a trunk's
# products by 4e-3, which adds up to a tenth behind five blocks of EfficientNetLite2.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}

Run = Callable[[np.ndarray], list[np.ndarray]]


def engine(trunk: keras.Model, identity: Mapping[str, Any], runtime: Runtime, sample: np.ndarray) -> tuple[str, Run]:
    """What runs the trunk under `runtime.trunk`: `litert` or `tensorflow`, and the function that does it.

    Args:
        trunk: pixels float32 [batch, size, size, 3] -> boundary tensors.
        identity: what tells it from every other trunk, as `Classifier.trunk_identity` gives it.
        sample: pixels, on which LiteRT must agree with TensorFlow to TOLERANCE of the largest activation.

    Returns:
        The engine's name; a function from pixels to the boundary tensors, float32 each.

    Raises:
        InputError: `runtime.trunk` is `litert`, and the trunk can't be converted or differs.
    """
    in_tensorflow = _tensorflow(trunk)
    if runtime.trunk == "tensorflow" or (runtime.trunk == "auto" and _unfit(runtime)):
        return "tensorflow", in_tensorflow
    try:
        in_litert = _litert(trunk, identity)
        _compare(in_litert(sample), in_tensorflow(sample), TOLERANCE[runtime.math])
    except Exception as error:  # whatever an unknown network makes the converter raise
        reason = " ".join(str(error).split())[:200]
        if runtime.trunk == "litert":
            raise InputError(f"runtime.trunk: expected a trunk that LiteRT runs, received {reason}") from None
        reporting.log(f"trunk: TensorFlow runs it, since LiteRT does not: {reason}")
        return "tensorflow", in_tensorflow
    return "litert", in_litert


def _unfit(runtime: Runtime) -> bool:
    """Where TensorFlow is the better one: on a GPU, and in half precision."""
    return bool(tf.config.list_logical_devices("GPU")) or runtime.precision != "float32"


def _tensorflow(trunk: keras.Model) -> Run:
    forward = tf.function(lambda pixels: tf.nest.flatten(trunk(pixels, training=False)), reduce_retracing=True)
    return lambda pixels: [np.asarray(tf.cast(tensor, tf.float32)) for tensor in forward(pixels)]


def _litert(trunk: keras.Model, identity: Mapping[str, Any]) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    model = _converted(trunk, identity)
    with reporting.quiet():
        interpreter = Interpreter(model_content=model, num_threads=len(os.sched_getaffinity(0)))
        interpreter.allocate_tensors()  # says what it delegates to
        runner = interpreter.get_signature_runner()
    (into,) = (details["index"] for details in interpreter.get_input_details())
    named = runner.get_output_details()
    names = [named[f"output_{index}"]["name"] for index in range(len(trunk.outputs))]

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        if tuple(interpreter.get_input_details()[0]["shape"]) != pixels.shape:
            interpreter.resize_tensor_input(into, pixels.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(into, pixels)
        interpreter.invoke()
        outputs = {details["name"]: details["index"] for details in interpreter.get_output_details()}
        return [interpreter.get_tensor(outputs[name]) for name in names]

    return run


def _converted(trunk: keras.Model, identity: Mapping[str, Any]) -> bytes:
    """The trunk as a LiteRT model. Converting takes seconds, so what it gave is kept."""

    def convert(folder: Path) -> None:
        failure = None
        with reporting.quiet(), redirect_stdout(io.StringIO()):
            try:
                (folder / "trunk.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(trunk).convert())
            except Exception as error:  # kept from `quiet`, which would show the pages that the converter wrote
                failure = error
        if failure:
            raise failure

    digest = cache.key(identity, modules=["backbones", "classifier", "trunk"])
    entry = cache.Entry("litert", digest, convert)
    model = (entry.folder / "trunk.tflite").read_bytes()
    entry.close()
    return model


def _compare(received: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for ours, theirs in zip(received, expected, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"a tensor of shape {ours.shape} instead of {theirs.shape}")
        difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
        if not difference <= tolerance * largest:
            raise ValueError(f"activations that differ by {difference:.3g}, with {largest:.3g} the largest")
