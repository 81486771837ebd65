"""Builds EfficientNet-Lite, which keras.applications lacks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras


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


def build(name: str, image_size: int, width: float, depth: float) -> keras.Model:
    """Build EfficientNet (arXiv:1905.11946) as its authors changed it for small devices.

    It has no squeeze-and-excitation, and ReLU6 instead of swish. The stem, the last convolution and the repeats of the
    first and the last stage are not scaled. Layers are named as in Keras' EfficientNet.

    Args:
        name: the name of the model.
        image_size: height and width of the images in pixels.
        width, depth: factors of the number of filters and of the number of blocks.

    Returns:
        A functional model with random weights, without pooling and classifier.
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
    """Scale a number of filters and round it to a multiple of 8, never down by more than a tenth."""
    exact = filters * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded
