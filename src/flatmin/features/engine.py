"""Run a frozen trunk over batches of pixels: in LiteRT on CPU, where that gives what TensorFlow gives, else TensorFlow.

LiteRT (XNNPACK) took half of TensorFlow's time on CPU; bench/results.json has the ratio.
"""

from __future__ import annotations

import atexit
import functools
import io
import math
import os
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime
from flatmin.features import cache
from flatmin.runtime import has_bfloat16, has_float16

# Of the activations' norm. They are kept in float16, which rounds by 1e-3. In half precision TensorFlow rounds what it
# multiplies by 4e-3 (bfloat16), which adds up over layers.
TOLERANCE = {"float32": 1e-3, "half": 0.1}
FORCE_FP16 = 4  # XNNPACK's flag: everything between the float32 tensors at both ends is float16

Run = Callable[[np.ndarray], list[np.ndarray]]


def preferred(runtime: Runtime) -> str:
    """The name of the engine that `engine` gives, unless it is `litert` and does not run the trunk."""
    return (
        "tensorflow" if runtime.engine == "tensorflow" or (runtime.engine == "auto" and _unfit(runtime)) else "litert"
    )


def engine(trunk: keras.Model, identity: Mapping[str, Any], runtime: Runtime, sample: np.ndarray) -> tuple[str, Run]:
    """What runs the trunk under `runtime.engine`: `litert` or `tensorflow`, and the function that does it.

    Args:
        trunk: pixels float32 [batch, size, size, 3] -> boundary tensors.
        identity: what tells it from every other trunk, as `Classifier.trunk_identity` gives it.
        sample: pixels, on which LiteRT must agree with TensorFlow to TOLERANCE of the activations' norm.

    Returns:
        The engine's name; a function from pixels to the boundary tensors, float32 each.

    Raises:
        InputError: `runtime.engine` is `litert`, and the trunk can't be converted or differs.
    """
    pixels = tf.TensorSpec((None, *trunk.inputs[0].shape[1:]), tf.float32)
    forward = tf.function(lambda pixels: tf.nest.flatten(trunk(pixels, training=False)), input_signature=[pixels])

    def in_tensorflow(pixels: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(tf.cast(tensor, tf.float32)) for tensor in forward(pixels)]

    if preferred(runtime) == "tensorflow":
        return "tensorflow", in_tensorflow
    try:
        in_litert = _litert(forward, identity, runtime.matmul == "half" and has_float16())
        with console.quiet():  # the first run writes to file descriptor 2 as well
            received = in_litert(sample)
        is_half = runtime.matmul != "float32" and (has_float16() or has_bfloat16())
        _compare(received, in_tensorflow(sample), TOLERANCE["half" if is_half else "float32"])
    except Exception as error:  # whatever an unknown network makes the converter raise
        if isinstance(error, InputError) or getattr(error, "errno", None):  # a full disk is no reason to do without
            raise
        reason = " ".join(str(error).split())[:200]
        if runtime.engine == "litert":
            raise InputError(f"runtime.engine: expected a trunk that LiteRT runs, received {reason}") from None
        console.log(f"trunk: TensorFlow runs it, since LiteRT does not: {reason}")
        return "tensorflow", in_tensorflow
    return "litert", in_litert


def _unfit(runtime: Runtime) -> bool:
    """Where TensorFlow is the better one: on a GPU, and in half precision."""
    return bool(tf.config.list_logical_devices("GPU")) or runtime.precision != "float32"


def _litert(forward: Any, identity: Mapping[str, Any], in_float16: bool) -> Run:
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.options import Options

    options = Options.create()
    options.cpu_options.num_threads = len(os.sched_getaffinity(0))
    if in_float16:
        options.cpu_options.xnnpack_flags = FORCE_FP16
    function = forward.get_concrete_function()
    model = _converted(function, identity)
    with console.quiet():
        compiled = CompiledModel.from_buffer(model, environment=_environment(), options=options)
    names = compiled.get_signature_by_index(0)["outputs"]  # without a signature, as the graph calls them
    order = [names.index(f"Identity_{index}" if index else "Identity") for index in range(len(function.outputs))]
    made: dict[tuple[int, ...], tuple[list[Any], list[Any]]] = {}  # the buffers of the last batch's shape

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        if pixels.shape not in made:
            compiled.resize_input_tensor(0, pixels.shape, strict=False)
            made.clear()
            made[pixels.shape] = compiled.create_input_buffers(0), compiled.create_output_buffers(0)
        into, out = made[pixels.shape]
        into[0].write(pixels)
        compiled.run_by_index(0, into, out)
        shapes = [out[index].get_tensor_details()["shape"] for index in order]
        return [
            out[index].read(math.prod(shape), np.float32).reshape(shape)
            for index, shape in zip(order, shapes, strict=True)
        ]

    return run


@functools.cache
def _environment() -> Any:
    """LiteRT's, one for the process. It logs to file descriptor 2, which no setting turns off, to the process's end."""
    from ai_edge_litert.environment import Environment

    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))
    return Environment.create()


def _converted(function: Any, identity: Mapping[str, Any]) -> bytes:
    """The traced trunk as a LiteRT model. Converting takes seconds, so what it gave is kept.

    From the Keras model, which TensorFlow writes to disk and reads again, it would take five times as long.
    """

    def convert(folder: Path) -> None:
        failure = None
        with console.quiet(), redirect_stdout(io.StringIO()):
            try:
                converter = tf.lite.TFLiteConverter.from_concrete_functions([function])
                (folder / "trunk.tflite").write_bytes(converter.convert())
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
        difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        if not difference <= tolerance:
            raise ValueError(f"activations that differ by {difference:.3g} of their norm")
