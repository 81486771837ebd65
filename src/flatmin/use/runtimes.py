"""Answers pictures of the records with an exported file, in its own runtime: a program in a process of its own.

Nothing of Flatmin's networks is imported here, so a file that answers is complete in itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flatmin import images
from flatmin.common.errors import InputError
from flatmin.inputs.records import Records
from flatmin.use import formats

Answer = Callable[[np.ndarray], np.ndarray]


def answers(name: formats.Name, path: Path, records: Path, role: str, size: int) -> tuple[np.ndarray, float]:
    """Run this program on all pictures of a role, one at a time.

    Args:
        path: the exported file.
        size: of the network's input, to which pictures are resized before, if the format takes no others.

    Returns:
        Probabilities, float32 [pictures, classes], and the median of the milliseconds that a call took.

    Raises:
        InputError: the runtime refuses the file, or ends.
    """
    out = path.with_name("answers.npz")
    paths = [str(Path(images.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TF_CPP_MIN_LOG_LEVEL": "3"}
    arguments = [name, str(path), str(records), role, str(size), str(out)]
    command = [sys.executable, "-m", __name__, json.dumps(arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode:
        last = (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
        raise InputError(f"{name}: expected {formats.FORMATS[name].runtime} to run the file, received {last[:500]}")
    try:
        with np.load(out, allow_pickle=False) as found:
            probabilities, seconds = found["probabilities"], found["seconds"]
    finally:
        out.unlink(missing_ok=True)
    if not np.isfinite(probabilities).all():
        raise InputError(f"{name}: expected finite probabilities of the exported file, received others")
    return probabilities, 1000 * float(np.median(seconds))


def versions(name: formats.Name) -> dict[str, str]:
    """The versions of the packages that wrote a file and that answered with it."""
    names = {"keras", "tensorflow", formats.FORMATS[name].runtime.replace("_", "-"), *formats.FORMATS[name].packages}
    return {package: importlib.metadata.version(package) for package in sorted(names)}


def load(name: formats.Name, path: str) -> Answer:
    """Load an exported file: a function from uint8 [1, height, width, 3] to float32 [1, classes]."""
    if name == "keras":
        import keras
        import tensorflow as tf

        loaded = keras.models.load_model(path)
        pixels = tf.TensorSpec((None, *loaded.input.shape[1:]), tf.uint8)
        graph = tf.function(loaded, input_signature=[pixels])  # so that its speed is not that of Python
        return lambda pixels: graph(pixels).numpy()
    if name == "savedmodel":
        import tensorflow as tf

        served = tf.saved_model.load(path)  # kept, since its functions do not keep their weights
        return lambda pixels: served.serve(pixels).numpy()
    if name == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(None, {"pixels": pixels})[0]
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(path, num_threads=len(os.sched_getaffinity(0))).get_signature_runner()
    (output,) = runner.get_output_details()
    return lambda pixels: runner(pixels=pixels)[output]


def _main(name: formats.Name, path: str, folder: str, role: str, size: str, out: str) -> None:
    records = Records(folder)
    fit = records.fit(role)
    answer = load(name, path)
    probabilities, seconds = [], []
    for stored in records.stored(role, range(records.count(role))):
        picture = stored.read()
        if not formats.FORMATS[name].any_size:
            picture = images.to_square(picture, int(size), fit)
        pixels = np.asarray(picture)[None]
        started = time.perf_counter()
        probabilities.append(answer(pixels)[0])
        seconds.append(time.perf_counter() - started)
    with open(out, "wb") as file:
        np.savez(file, probabilities=np.array(probabilities, np.float32), seconds=np.array(seconds))


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
