"""Pillow's resize as a graph of Keras operations, so that an exported model takes pictures of any size.

`tf.image.resize` with antialiasing has the same filter but rounds nothing; Pillow rounds its weights to 22 bits, and
the values after either of its two passes. So does this: the values are equal to those of `flatmin.images.to_square`, to
the last bit where Pillow goes through the rows first. It goes through the columns first where that is quicker, as in
pictures that are much taller than wide; then they differ by 1 at most.

Only operations that every format has are used, and no layer of Flatmin's own, which a `.keras` file could not be
loaded without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from flatmin.images import PAD, Fit

_HALF = 2.0**11  # a weight of 22 bits is split into two of 11, whose products with pixels float32 adds without rounding


def to_square(pixels: Any, size: int, fit: Fit) -> Any:
    """Fit pictures to the network's input as `flatmin.images.to_square` does.

    Args:
        pixels: a symbolic tensor, uint8 [batch, height, width, 3] of unknown height and width.
        size: height and width of the result.

    Returns:
        float32 [batch, size, size, 3], whole numbers in [0, 255].
    """
    # The shape is unknown while the graph is made, so lengths are counted when it runs.
    columns = ops.cumsum(ops.cast(ops.ones_like(pixels[0, 0, :, 0]), "float64"))
    rows = ops.cumsum(ops.cast(ops.ones_like(pixels[0, :, 0, 0]), "float64"))
    width, height = columns[-1], rows[-1]
    used_width = used_height = ops.minimum(width, height)
    if fit != "crop":
        used_width, used_height = width, height
    filled_width = filled_height = width * 0.0 + float(size)
    if fit == "pad":
        filled_width = ops.round(ops.minimum(width / height, 1.0) * size)
        filled_height = ops.round(ops.minimum(height / width, 1.0) * size)
    across, is_column = _weights(columns, used_width, filled_width, size)
    down, is_row = _weights(rows, used_height, filled_height, size)
    wide = _rounded(ops.split(ops.einsum("bhwc,xw->bhxc", ops.cast(pixels, "float32"), across), 2, axis=2))
    square = _rounded(ops.split(ops.einsum("bhxc,yh->byxc", wide, down), 2, axis=1))
    if fit == "pad":
        border = 1.0 - ops.expand_dims(is_row, 1) * ops.expand_dims(is_column, 0)
        square = square + float(PAD) * ops.expand_dims(border, -1)
    return square


def _weights(positions: Any, used: Any, filled: Any, size: int) -> tuple[Any, Any]:
    """The weights of one pass, as Pillow's `precompute_coeffs` has them.

    Args:
        positions: 1, 2, ..., the picture's length: float64 [length].
        used: how much of the length becomes `filled` values in the middle of `size`: scalars.

    Returns:
        The upper and then the lower halves of the weights, whole numbers, float32 [2 * size, length]; and which of the
        `size` values are filled, float32 [size].
    """
    numbers = np.arange(size, dtype=np.float64)
    first = ops.round((float(size) - filled) * 0.5)
    is_filled = ops.cast(
        ops.logical_and(ops.less_equal(first, numbers), ops.greater(first + filled, numbers)), "float64"
    )
    scale = used / filled
    center = (positions[-1] - used) * 0.5 + ops.expand_dims((0.5 - first) + numbers, 1) * scale
    distance = ops.abs(ops.expand_dims(positions - 0.5, 0) - center)
    triangle = ops.relu(1.0 - distance * (1.0 / ops.maximum(scale, 1.0)))
    total = ops.sum(triangle, axis=1, keepdims=True)
    share = triangle / ops.where(total > 0.0, total, ops.ones_like(total))  # none beside the picture
    whole = ops.floor(share * _HALF**2 + 0.5) * ops.expand_dims(is_filled, 1)
    upper = ops.round(whole / _HALF)
    halves = ops.concatenate([upper, whole - upper * _HALF], axis=0)
    return ops.cast(halves, "float32"), ops.cast(is_filled, "float32")


def _rounded(halves: Any) -> Any:
    """The nearest whole numbers to sums weighted with the upper and with the lower halves of the weights."""
    upper, lower = halves
    whole = ops.floor(upper / _HALF)
    rest = (upper - whole * _HALF) * _HALF + lower
    return whole + ops.floor((rest + _HALF**2 / 2) / _HALF**2)
