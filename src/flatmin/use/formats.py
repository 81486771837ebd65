"""The table of the formats that a model is exported to."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal, get_args

Name = Literal["keras", "savedmodel", "litert", "litert-int8", "onnx"]


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        file: the name of the exported file or folder.
        runtime: what answers with it, and proves it: the name of a Python package.
        any_size: whether it takes pictures of any size; else they come in the size of the network's input.
        load: the lines of Python that load it and answer one picture, uint8 `pixels` [height, width, 3].
        limit: the largest share of val's pictures that it may answer otherwise than the trained classifier.
        packages: what it needs and the pipeline's lock does not have; the extra `export` has them.
    """

    file: str
    runtime: str
    any_size: bool
    load: tuple[str, ...]
    limit: float = 0.005
    packages: tuple[str, ...] = ()


_LITERT = (
    "from ai_edge_litert.interpreter import Interpreter",
    'runner = Interpreter("{file}").get_signature_runner()',
    'probabilities = runner(pixels=pixels[None])["output_0"][0]',
)
FORMATS: dict[Name, Format] = {
    "keras": Format(
        "model.keras",
        "keras",
        True,
        (
            "import keras",
            'model = keras.models.load_model("{file}")',
            "probabilities = model(pixels[None]).numpy()[0]",
        ),
    ),
    "savedmodel": Format(
        "saved_model",
        "tensorflow",
        True,
        (
            "import tensorflow as tf",
            'model = tf.saved_model.load("{file}")',
            "probabilities = model.serve(pixels[None]).numpy()[0]",
        ),
    ),
    "litert": Format("model.tflite", "ai_edge_litert", False, _LITERT),
    "litert-int8": Format("model.int8.tflite", "ai_edge_litert", False, _LITERT, limit=0.02),
    "onnx": Format(
        "model.onnx",
        "onnxruntime",
        True,
        (
            "import onnxruntime",
            'session = onnxruntime.InferenceSession("{file}")',
            'probabilities = session.run(None, {{"pixels": pixels[None]}})[0][0]',
        ),
        packages=("tf2onnx", "onnx", "onnxruntime"),
    ),
}
assert tuple(FORMATS) == get_args(Name)  # noqa: S101


def missing(name: Name) -> list[str]:
    """The packages that a format needs and that are not installed."""
    return [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
