"""Pillow's resizing as a graph of Keras operations, so that an exported model takes pictures of any size.

`tf.image.resize` with antialiasing has the same filters but rounds nothing; Pillow rounds its weights to 22 bits, and
the values after each of its two passes. So does this: the values are equal to those of `flatmin.images`, to the last
bit, but in pictures more than twice as tall as wide that are brought to their stored size: Pillow goes through their
columns first, and the values differ by a little.

Only operations that every format has are used, and no layer of Flatmin's own, which a `.keras` file could not be
loaded without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from flatmin.images import PAD, Fit, Stored

LONGEST = 3  # sides of a stored picture are at most this many times `Stored.side`: a longer one is squeezed to it
_HALF = 2.0**11  # a weight of 22 bits is split into two of 11, whose products with pixels float32 adds without rounding


@dataclass(frozen=True)
class _Axis:
    """The height or width of a picture. Tensors, since the graph is made before either is known.

    Attributes:
        positions: 1, 2, ..., as many as the array has: float64 [places].
        length: how many of these are the picture's; the others, if any, come after it: float64 scalar.
    """

    positions: Any
    length: Any


def to_square(pixels: Any, size: int, fit: Fit, stored: Stored) -> Any:
    """Bring pictures to the network's input as `stored.resize` and then `flatmin.images.to_square` do.

    Args:
        pixels: a symbolic tensor, uint8 [batch, height, width, 3] of unknown height and width.
        size: height and width of the result.

    Returns:
        float32 [batch, size, size, 3], whole numbers in [0, 255].
    """
    positions = (
        ops.cumsum(ops.cast(ops.ones_like(line), "float64")) for line in (pixels[0, 0, :, 0], pixels[0, :, 0, 0])
    )
    x, y = (_Axis(each, each[-1]) for each in positions)
    picture = ops.cast(pixels, "float32")
    if stored.side is not None:
        picture, x, y = _as_stored(picture, x, y, stored)
    return _fitted(picture, x, y, size, fit)


def _as_stored(picture: Any, x: _Axis, y: _Axis, stored: Stored) -> tuple[Any, _Axis, _Axis]:
    side, places = float(stored.side or 0), LONGEST * (stored.side or 0)
    shorter = ops.minimum(x.length, y.length)
    none = shorter * 0.0  # computed by the graph, as all constants are that meet no other tensor: ONNX has no others
    target = none + side if stored.enlarge else ops.minimum(shorter, side)
    longest = float(places)
    new_x, new_y = (ops.clip(ops.round(each.length * target / shorter), 1.0, longest) for each in (x, y))
    across, down = (
        _weights(axis, axis.length, length, none, places, _bicubic)[0] for axis, length in ((x, new_x), (y, new_y))
    )
    numbers = none + np.arange(1, places + 1, dtype=np.float64)
    return _rows_first(picture, across, down), _Axis(numbers, new_x), _Axis(numbers, new_y)


def _fitted(picture: Any, x: _Axis, y: _Axis, size: int, fit: Fit) -> Any:
    used_x = used_y = ops.minimum(x.length, y.length)
    if fit != "crop":
        used_x, used_y = x.length, y.length
    filled_x = filled_y = x.length * 0.0 + float(size)
    if fit == "pad":
        filled_x = ops.maximum(ops.round(ops.minimum(x.length / y.length, 1.0) * size), 1.0)
        filled_y = ops.maximum(ops.round(ops.minimum(y.length / x.length, 1.0) * size), 1.0)
    across, is_column = _weights(x, used_x, filled_x, ops.round((float(size) - filled_x) * 0.5), size, _triangle)
    down, is_row = _weights(y, used_y, filled_y, ops.round((float(size) - filled_y) * 0.5), size, _triangle)
    # Pillow's choice, from version 13 on. Both are made, since a graph of Keras operations has no branches.
    is_cheaper = ops.logical_and(
        ops.greater(y.length, filled_y), ops.less(2.0 * (x.length - filled_x), y.length - filled_y)
    )
    square = ops.where(is_cheaper, _columns_first(picture, across, down), _rows_first(picture, across, down))
    if fit == "pad":
        border = 1.0 - ops.expand_dims(is_row, 1) * ops.expand_dims(is_column, 0)
        square = square + float(PAD) * ops.expand_dims(border, -1)
    return square


def _rows_first(picture: Any, across: Any, down: Any) -> Any:
    """Resize float32 [batch, height, width, 3] by weights as `_weights` gives them."""
    return _resize_columns(_resize_rows(picture, across), down)


def _columns_first(picture: Any, across: Any, down: Any) -> Any:
    return _resize_rows(_resize_columns(picture, down), across)


def _resize_rows(picture: Any, weights: Any) -> Any:
    return _rounded(ops.split(ops.einsum("bhwc,xw->bhxc", picture, weights), 2, axis=2))


def _resize_columns(picture: Any, weights: Any) -> Any:
    return _rounded(ops.split(ops.einsum("bhwc,yh->bywc", picture, weights), 2, axis=1))


def _weights(
    axis: _Axis, used: Any, filled: Any, first: Any, places: int, kernel: Callable[[Any], Any]
) -> tuple[Any, Any]:
    """The weights of one pass, as Pillow's `precompute_coeffs` has them.

    Args:
        used: how much of the axis, in its middle, is resized.
        filled, first: to how many values, and before which of the `places` they begin: scalars.

    Returns:
        The upper and then the lower halves of the weights, whole numbers, float32 [2 * places, len(axis.positions)];
        and which of the places are filled, float32 [places].
    """
    numbers = np.arange(places, dtype=np.float64)
    is_filled = ops.logical_and(ops.less_equal(first, numbers), ops.greater(first + filled, numbers))
    is_filled = ops.cast(is_filled, "float64")
    scale = used / filled
    center = (axis.length - used) * 0.5 + ops.expand_dims((0.5 - first) + numbers, 1) * scale
    distance = ops.abs(ops.expand_dims(axis.positions - 0.5, 0) - center)
    values = kernel(distance * (1.0 / ops.maximum(scale, 1.0)))
    values = values * ops.cast(ops.less_equal(axis.positions, axis.length), "float64")
    total = ops.sum(values, axis=1, keepdims=True)
    share = values / ops.where(ops.equal(total, 0.0), ops.ones_like(total), total)  # places outside may have none
    whole = ops.sign(share) * ops.floor(ops.abs(share) * _HALF**2 + 0.5) * ops.expand_dims(is_filled, 1)
    upper = ops.round(whole / _HALF)
    halves = ops.concatenate([upper, whole - upper * _HALF], axis=0)
    return ops.cast(halves, "float32"), ops.cast(is_filled, "float32")


def _triangle(distance: Any) -> Any:
    return ops.relu(1.0 - distance)


def _bicubic(distance: Any) -> Any:
    """The cubic convolution of Keys (1981) with a = -0.5, which is Pillow's."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
    return ops.where(ops.less(distance, 1.0), near, ops.where(ops.less(distance, 2.0), far, ops.zeros_like(distance)))


def _rounded(halves: Any) -> Any:
    """The nearest whole numbers in [0, 255] to sums weighted with the upper and the lower halves of the weights."""
    upper, lower = halves
    whole = ops.floor(upper / _HALF)
    rest = (upper - whole * _HALF) * _HALF + lower
    return ops.clip(whole + ops.floor((rest + _HALF**2 / 2) / _HALF**2), 0.0, 255.0)
