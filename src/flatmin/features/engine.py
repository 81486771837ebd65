"""Engines that run the frozen layers on pixels: LiteRT on a CPU if it agrees with TensorFlow, else TensorFlow.

LiteRT (XNNPACK) takes about half of TensorFlow's time on a CPU; bench/results.json has the ratio.
"""

from __future__ import annotations

import atexit
import functools
import io
import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime
from flatmin.features import cache
from flatmin.runtime import has_bfloat16, has_float16, machine

EXTRACTOR_BATCH = 32  # images that an engine gets at a time
# Largest difference of LiteRT from TensorFlow, relative to the norm of the activations. They are cached in float16,
# which rounds by 1e-3. In half precision TensorFlow rounds factors by 4e-3 (bfloat16), which adds up over layers.
TOLERANCE = {"float32": 1e-3, "half": 0.1}
FORCE_FP16 = 4  # XNNPACK's flag: everything between the float32 tensors at both ends is float16
MODEL, REASON = "frozen.tflite", "reason.txt"

Run = Callable[[np.ndarray], list[np.ndarray]]


class Engine:
    """Runs frozen layers: pixels, float32 [batch, size, size, 3], to their activations, a list of float32 arrays.

    Attributes:
        name: `litert` or `tensorflow`.
    """

    def __init__(self, name: str, load: Callable[[], Run]) -> None:
        self.name = name
        self._load = load

    @functools.cached_property
    def _run(self) -> Run:
        return self._load()

    def __call__(self, pixels: np.ndarray) -> list[np.ndarray]:
        return self._run(pixels)


def choose(
    frozen: keras.Model, identity: Mapping[str, Any], runtime: Runtime, sample: Callable[[], np.ndarray]
) -> Engine:
    """Decide which engine runs the frozen layers under `runtime.engine`. The decision is cached, and loads nothing.

    Args:
        frozen: pixels float32 [batch, size, size, 3] -> activations at the split.
        identity: distinguishes these frozen layers from all others, as `Classifier.frozen_identity` gives it.
        sample: gives pixels on which LiteRT must agree with TensorFlow to TOLERANCE; called if nothing is cached.

    Raises:
        InputError: `runtime.engine` is `litert`, and LiteRT can't convert the layers or disagrees.
    """
    pixels = tf.TensorSpec((None, *frozen.inputs[0].shape[1:]), tf.float32)
    forward = tf.function(lambda pixels: tf.nest.flatten(frozen(pixels, training=False)), input_signature=[pixels])

    def in_tensorflow(pixels: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(tf.cast(tensor, tf.float32)) for tensor in forward(pixels)]

    if runtime.engine == "tensorflow" or (runtime.engine == "auto" and _tensorflow_is_better(runtime)):
        return Engine("tensorflow", lambda: in_tensorflow)

    def load(model: bytes) -> Run:
        return _compiled(model, len(frozen.outputs), runtime.matmul == "half" and has_float16())

    def convert_and_compare(folder: Path) -> None:
        pixels = sample()  # an error of the augmenting processes is none of LiteRT's
        try:
            model = _converted(forward)
            received = load(model)(pixels)
            is_half = runtime.matmul != "float32" and (has_float16() or has_bfloat16())
            _compare(received, in_tensorflow(pixels), TOLERANCE["half" if is_half else "float32"])
        except Exception as error:  # an unknown network makes the converter raise anything
            if isinstance(error, InputError | MemoryError) or getattr(
                error, "errno", None
            ):  # such as a full disk: no refusal
                raise
            (folder / REASON).write_text(" ".join(str(error).split())[:200], encoding="utf-8")
        else:
            (folder / MODEL).write_bytes(model)

    depends_on = {"frozen": identity, "matmul": runtime.matmul, "machine": machine()}
    digest = cache.key(depends_on, rooms=cache.ENGINE_ROOMS)
    with closing(cache.open_entry("litert", digest, convert_and_compare)) as entry:
        model = entry.folder / MODEL
        if model.exists():
            content = model.read_bytes()
            return Engine("litert", lambda: load(content))
        reason = (entry.folder / REASON).read_text(encoding="utf-8")
    if runtime.engine == "litert":
        raise InputError(f"runtime.engine: expected frozen layers that LiteRT runs, received {reason}")
    console.log(f"engine: TensorFlow runs the frozen layers, since LiteRT does not: {reason}")
    return Engine("tensorflow", lambda: in_tensorflow)


def _tensorflow_is_better(runtime: Runtime) -> bool:
    """On a GPU, and in half precision."""
    return bool(tf.config.list_logical_devices("GPU")) or runtime.precision != "float32"


def _compiled(model: bytes, outputs: int, in_float16: bool) -> Run:
    """Load a LiteRT model whose graph names its outputs Identity, Identity_1, ..."""
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.options import Options

    options = Options.create()
    options.cpu_options.num_threads = len(os.sched_getaffinity(0))
    if in_float16:
        options.cpu_options.xnnpack_flags = FORCE_FP16
    with console.quiet():
        compiled = CompiledModel.from_buffer(model, environment=_environment(), options=options)
    names = compiled.get_signature_by_index(0)["outputs"]
    order = [names.index(f"Identity_{index}" if index else "Identity") for index in range(outputs)]
    buffers: dict[tuple[int, ...], tuple[list[Any], list[Any]]] = {}  # those of the last batch's shape

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        if pixels.shape in buffers:
            return run_again(pixels)
        with console.quiet():  # the first run writes to descriptor 2
            compiled.resize_input_tensor(0, pixels.shape, strict=False)
            buffers.clear()
            buffers[pixels.shape] = compiled.create_input_buffers(0), compiled.create_output_buffers(0)
            return run_again(pixels)

    def run_again(pixels: np.ndarray) -> list[np.ndarray]:
        into, out = buffers[pixels.shape]
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
    """LiteRT's environment, one a process. It logs to file descriptor 2 even at exit, which no setting turns off."""
    from ai_edge_litert.environment import Environment

    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))
    return Environment.create()


def _converted(forward: Any) -> bytes:
    """Convert the traced frozen layers.

    Converting the Keras model itself, which TensorFlow would write to disk and read again, takes five times as long.
    """
    failure: Exception | None = None
    model = b""
    with console.quiet(), redirect_stdout(io.StringIO()):
        try:
            model = tf.lite.TFLiteConverter.from_concrete_functions([forward.get_concrete_function()]).convert()
        except Exception as error:  # raised outside of `quiet`, which would show the pages that the converter wrote
            failure = error
    if failure:
        raise failure
    return model


def _compare(received: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for ours, theirs in zip(received, expected, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"a tensor of shape {ours.shape} instead of {theirs.shape}")
        difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        if not difference <= tolerance:
            raise ValueError(f"activations that differ by {difference:.3g} of their norm")
