"""The backbones: how to build them, with which weights, and what they expect of an image.

`BACKBONES` is the one table. A name that stands in it can be used everywhere; adding a network is adding a
row. TensorFlow and Keras are imported inside the functions, since the table alone is what `params` needs to
check names.
"""

from __future__ import annotations

import math
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatmin.common.errors import InputError
from flatmin.models import efficientnet_lite, weights_files
from flatmin.models.registry import MEAN_RGB, STDDEV_RGB, Backbone, find

if TYPE_CHECKING:
    import keras


_DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte


def build(name: str, image_size: int, weights: str | Path = "imagenet") -> keras.Model:
    """Build a backbone without its classifier and without pooling.

    The model has the same layers, in the same order and under the same names, whatever the weights, and
    whatever was built before it in the process: Keras' own order, and the names that Keras gives in a fresh
    process.

    Args:
        name: a name in `BACKBONES`.
        image_size: height and width of the images in pixels.
        weights: what `resolve_weights` takes. A file is a Keras `.weights.h5` or legacy `.h5` file, with the ImageNet
            classifier or without, made at any image size; for EfficientNetLite it may also be a PyTorch `.pth`.

    Returns:
        A functional model: float32 [batch, image_size, image_size, 3], as `preprocess` gives it, to features [batch,
        rows, columns, channels].

    Raises:
        InputError: no such backbone or file, an image size that the network or its weights don't have, a file that is
            not of this network, a package or a download that is not there.
    """
    backbone = find(name)
    source = weights_files.resolve_weights(weights, name)
    if type(image_size) is not int or image_size < backbone.smallest:
        raise InputError(
            f"image_size of {name}: expected a whole number from {backbone.smallest}, received {image_size!r}"
        )
    if backbone.is_lite:
        model = efficientnet_lite.build(name.lower(), image_size, **backbone.options)
        if source == "imagenet":
            source = weights_files.lite_package_file(name)
        if isinstance(source, Path) and source.suffix == ".pth":
            weights_files.load_torch(model, source)
            source = None
    elif source == "imagenet":
        if backbone.imagenet_size not in (None, image_size):
            raise InputError(
                f"image_size of {name}: expected {backbone.imagenet_size}, "
                f"the only size of Keras' ImageNet weights, received {image_size}"
            )
        return _with_fresh_names(_download(name, backbone, image_size))
    else:
        model = _keras_model(backbone, image_size, None)
        if backbone.constructor.startswith("EfficientNetB"):
            model = _with_deviation(model)
    _with_fresh_names(model)
    if isinstance(source, Path):
        weights_files.load_keras(model, source, name)
    return model


def multiply_adds(model: keras.Model) -> int:
    """Count the multiply-additions of one forward pass of one image.

    What counts is `Conv2D` (grouped too), `DepthwiseConv2D`, `SeparableConv2D` and `Dense`, in nested models
    too; biases, normalisations and activations are left out, as is usual in publications.

    Args:
        model: a functional or sequential model of known image size, in which no layer is used twice.

    Raises:
        TypeError: a layer of another kind has a matrix of weights, so that the count would miss it.
    """
    import keras

    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            total += multiply_adds(layer)
        elif isinstance(layer, keras.layers.SeparableConv2D):
            kernels = math.prod(layer.depthwise_kernel.shape) + math.prod(layer.pointwise_kernel.shape)
            total += math.prod(layer.output.shape[1:-1]) * kernels
        elif isinstance(layer, (keras.layers.DepthwiseConv2D, keras.layers.Conv2D, keras.layers.Dense)):
            total += math.prod(layer.output.shape[1:-1]) * math.prod(layer.kernel.shape)
        elif any(len(variable.shape) > 1 for variable in layer.weights):
            raise TypeError(f"{layer.name}: expected a convolution or a dense layer, received {type(layer).__name__}")
    return total


# Keras' networks


def _keras_model(backbone: Backbone, image_size: int, weights: str | None) -> keras.Model:
    import keras

    constructor: Callable[..., keras.Model] = getattr(keras.applications, backbone.constructor)
    shape = (image_size, image_size, 3)
    return constructor(include_top=False, weights=weights, input_shape=shape, **backbone.options)


def _download(name: str, backbone: Backbone, image_size: int) -> keras.Model:
    """Build with the weights of Keras' download, or of its cache."""
    with warnings.catch_warnings(), _socket_timeout(_DOWNLOAD_TIMEOUT):
        # MobileNets have weights per image size and say that they take those of 224 pixels for all others.
        # Convolutions don't mind the size.
        warnings.filterwarnings("ignore", message=r"`input_shape` is undefined or non-square")
        try:
            return _keras_model(backbone, image_size, "imagenet")
        except Exception as error:  # Keras raises bare Exception where a download fails
            problem = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"extract.weights.{name}: expected Keras to load its ImageNet weights, received {problem}; "
                f"set extract.weights.{name} to a weights file or to none"
            ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # Keras opens its download without a timeout: behind a firewall that drops packets it would wait for ever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _with_deviation(model: keras.Model) -> keras.Model:
    """Give an EfficientNet without weights the layers and the input scaling of the one with Keras' ImageNet
    weights.

    Those files hold the deviation where the variance belongs, for which Keras adds a second rescaling, by the
    square root of the deviation, but only where it downloads the file itself. Without that layer the same
    file read from a path would work on differently scaled images, and all later layers would have another
    index.
    """
    import keras

    def call(layer: keras.layers.Layer, *arguments: Any, **options: Any) -> Any:
        outputs = layer(*arguments, **options)
        if isinstance(layer, keras.layers.Normalization):
            outputs = keras.layers.Rescaling([1.0 / math.sqrt(deviation) for deviation in STDDEV_RGB])(outputs)
        return outputs

    clone: keras.Model = keras.models.clone_model(model, call_function=call)
    for layer in clone.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.adapt_mean.assign(MEAN_RGB)
            layer.adapt_variance.assign(STDDEV_RGB)
            layer.finalize_state()
    return clone


def _with_fresh_names(model: keras.Model) -> keras.Model:
    """Rename layers that Keras numbered through the process (`activation_226`) as a fresh process would.

    A cut is given by name, and a name must not depend on what else the process has built.
    """
    import keras

    by_kind: dict[str, list[tuple[int, Any]]] = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):  # the one input; cloning calls it `keras_tensor_N`
            layer.name = "input_layer"
            continue
        # "ZeroPadding2D" -> "zero_padding2d", "ReLU" -> "re_lu": Keras' own way.
        kind = re.sub(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", type(layer).__name__).lower()
        if match := re.fullmatch(rf"{kind}(?:_(\d+))?", layer.name):
            by_kind.setdefault(kind, []).append((int(match[1] or 0), layer))
    for kind, numbered in by_kind.items():
        for index, (_, layer) in enumerate(sorted(numbered, key=lambda pair: pair[0])):
            layer.name = f"{kind}_{index}" if index else kind
    return model


# EfficientNet-Lite
