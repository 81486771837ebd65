"""The table of backbones, and the preprocessing that each expects of an image.

A network whose name is in `BACKBONES` can be used everywhere; adding a network means adding a row. This module imports
no builder, and Keras only when an image is preprocessed, because params.yaml is checked with the table alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from flatmin.common.errors import InputError

Mode = Literal["caffe", "tf", "torch", "lite", "none"]

MEAN_RGB = (0.485, 0.456, 0.406)  # of ImageNet, for pixels in [0, 1]

STDDEV_RGB = (0.229, 0.224, 0.225)

_MEAN_BGR = (103.939, 116.779, 123.68)  # of ImageNet, for pixels in [0, 255]


@dataclass(frozen=True)
class Backbone:
    """A row of the table.

    Attributes:
        constructor: the name of the function in `keras.applications`, or `EfficientNetLite` for Flatmin's own.
        image_size: the default height and width of the images, in pixels.
        fine_tune_at: the default split point: the name of the first layer that fine-tuning trains, in the model that
            `build.build` returns. The layers before it in `model.layers` stay frozen.
        preprocessing: how `preprocess` scales pixels in [0, 255]: `caffe` (to BGR, minus ImageNet's mean), `tf` (to
            [-1, 1]), `torch` (to [0, 1], minus ImageNet's mean, divided by its standard deviation), `lite`
            ((x - 127) / 128) or `none` (the model scales them itself).
        options: further arguments of the constructor.
        smallest: the smallest image size that the constructor accepts, in pixels.
        imagenet_size: the only image size for which Keras has ImageNet weights; None if it has them for all.
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
        """Whether Flatmin builds the network itself, with weights from PyTorch."""
        return self.constructor == "EfficientNetLite"


def _lite(width: float, depth: float, image_size: int) -> Backbone:
    options = {"width": width, "depth": depth}
    return Backbone("EfficientNetLite", image_size, "block5b_expand_conv", "lite", options)


# The first six networks and their 180 pixels are the original study's. It gave split points as indices: 120 in ResNet50
# and 100 in MobileNetV2 are the layers named here. The other split points are the first layer of a block in the second
# half of the network.
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
    """Return the table's row with this name.

    Raises:
        InputError: there is no such backbone.
    """
    if name not in BACKBONES:
        raise InputError(f"backbones: expected one of {', '.join(BACKBONES)}, received {name!r}")
    return BACKBONES[name]


def preprocess(name: str, images: Any) -> Any:
    """Scale pixels as a backbone expects them, by the `preprocessing` of its row.

    Args:
        name: a name in `BACKBONES`.
        images: RGB in [0, 255], [..., 3], of any real dtype: a tensor, an array, or a symbolic tensor of a functional
            model.

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
        return (images / 255.0 - np.array(MEAN_RGB, np.float32)) / np.array(STDDEV_RGB, np.float32)
    if mode == "lite":
        return (images - 127.0) / 128.0
    return images
