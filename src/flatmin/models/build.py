"""Builds the backbones of the table and loads their weights.

Keras is imported inside the functions, so that importing this module stays cheap.
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

    The layers, their order and their names are those that Keras gives in a fresh process. They depend neither on the
    weights nor on what the process has built before.

    Args:
        name: a name in `BACKBONES`.
        image_size: height and width of the images in pixels.
        weights: a setting that `weights_files.resolve_weights` accepts. A file is a Keras `.weights.h5` or a legacy
            `.h5` file, with or without the ImageNet classifier, saved at any image size; for EfficientNetLite it may
            also be a PyTorch `.pth` file.

    Returns:
        A functional model: float32 [batch, image_size, image_size, 3], as `registry.preprocess` returns it, to
        features [batch, rows, columns, channels].

    Raises:
        InputError: there is no such backbone, file, package or download; the network or its weights don't exist at
            this image size; or the file's weights belong to another network.
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
            model = _with_second_rescaling(model)
    _with_fresh_names(model)
    if isinstance(source, Path):
        weights_files.load_keras(model, source, name)
    return model


def multiply_adds(model: keras.Model) -> int:
    """Count the multiply-additions of one forward pass of one image.

    Counted are `Conv2D` (also with groups), `DepthwiseConv2D`, `SeparableConv2D` and `Dense`, in nested models too.
    Biases, normalisations and activations are left out, as is usual in publications.

    Args:
        model: a functional or sequential model of known image size, in which no layer is called twice.

    Raises:
        TypeError: a layer of another kind has a matrix of weights, which the count would miss.
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


def _keras_model(backbone: Backbone, image_size: int, weights: str | None) -> keras.Model:
    import keras

    constructor: Callable[..., keras.Model] = getattr(keras.applications, backbone.constructor)
    shape = (image_size, image_size, 3)
    return constructor(include_top=False, weights=weights, input_shape=shape, **backbone.options)


def _download(name: str, backbone: Backbone, image_size: int) -> keras.Model:
    """Build a network with Keras' ImageNet weights, downloaded or from Keras' cache."""
    with warnings.catch_warnings(), _socket_timeout(_DOWNLOAD_TIMEOUT):
        # MobileNets have weights for several image sizes, and warn that they use those of 224 pixels for all others.
        # That is no problem: a convolution's kernel does not depend on the image size.
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
    # Keras downloads without a timeout, and would wait for ever behind a firewall that drops packets.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _with_second_rescaling(model: keras.Model) -> keras.Model:
    """Give an EfficientNet without weights the layers and the input scaling that it has with Keras' ImageNet weights.

    Those weights files hold the standard deviation in place of the variance. Keras corrects this with a second
    rescaling, by one over the square root of the standard deviation, but only if it downloads the file itself. Without
    that layer the same file, read from a path, would work on images of another scale, and all later layers would have
    another index.
    """
    import keras

    def call(layer: keras.layers.Layer, *arguments: Any, **options: Any) -> Any:
        outputs = layer(*arguments, **options)
        if isinstance(layer, keras.layers.Normalization):
            outputs = keras.layers.Rescaling([1.0 / math.sqrt(stddev) for stddev in STDDEV_RGB])(outputs)
        return outputs

    clone: keras.Model = keras.models.clone_model(model, call_function=call)
    for layer in clone.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.adapt_mean.assign(MEAN_RGB)
            layer.adapt_variance.assign(STDDEV_RGB)
            layer.finalize_state()
    return clone


def _with_fresh_names(model: keras.Model) -> keras.Model:
    """Rename the layers that Keras numbered for the whole process (`activation_226`) as in a fresh process.

    A split point is given by a layer's name, which must not depend on what else the process has built.
    """
    import keras

    by_kind: dict[str, list[tuple[int, Any]]] = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):  # the only one; cloning names it `keras_tensor_N`
            layer.name = "input_layer"
            continue
        # As Keras does: "ZeroPadding2D" -> "zero_padding2d", "ReLU" -> "re_lu".
        kind = re.sub(r"(?<=.)(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])", "_", type(layer).__name__).lower()
        if match := re.fullmatch(rf"{kind}(?:_(\d+))?", layer.name):
            by_kind.setdefault(kind, []).append((int(match[1] or 0), layer))
    for kind, numbered in by_kind.items():
        for index, (_, layer) in enumerate(sorted(numbered, key=lambda pair: pair[0])):
            layer.name = f"{kind}_{index}" if index else kind
    return model
