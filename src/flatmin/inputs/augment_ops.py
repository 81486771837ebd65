"""imgaug's RandAugment in TensorFlow: the same operations, magnitudes and fill value, for a stack of images at once.

NumPy draws all random numbers beforehand, so the operations themselves are pure functions. They reproduce what imgaug
0.4 does with Pillow and OpenCV, including Pillow's luma weights, its rounding to the nearest pixel, and the borders
that its filters leave unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

Operation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

FILL = 128  # the value of pixels that an operation has no input for
M_MAX = 30  # the largest magnitude
_LUMA = (19595, 38470, 7471)  # Pillow's weights of red, green and blue, in 1 / 2**16
# imgaug equalizes images of fewer values (pixels times channels) with Pillow, which takes another bin for the last.
_PILLOW_EQUALIZE = 64 * 64
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])
_BLUR = np.pad(np.zeros((3, 3), int), 1, constant_values=1)


def autocontrast(images: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    """Stretch each channel to [0, 255]."""
    wide = tf.cast(images, tf.float64)
    low, high = (reduce(wide, (1, 2), keepdims=True) for reduce in (tf.reduce_min, tf.reduce_max))
    scale = 255 / tf.maximum(high - low, 1)
    return tf.where(high > low, tf.cast(tf.clip_by_value(wide * scale - low * scale, 0, 255), tf.uint8), images)


def equalize(images: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    """Equalize each channel's histogram."""
    shape = tf.shape(images)
    pixels = shape[1] * shape[2]
    channels = tf.reshape(tf.transpose(tf.cast(images, tf.int32), (0, 3, 1, 2)), (-1, pixels))
    with tf.device("CPU"):  # a GPU has no deterministic bincount
        histogram = tf.math.bincount(channels, minlength=256, maxlength=256, axis=-1)
    last = tf.fill(tf.shape(channels)[:1], 255)
    last = tf.reduce_max(channels, axis=1) if pixels * 3 < _PILLOW_EQUALIZE else last
    step = (pixels - tf.gather(histogram, last, batch_dims=1))[:, None] // 255
    before = tf.cumsum(histogram, axis=1, exclusive=True)
    levels = tf.minimum((step // 2 + before) // tf.maximum(step, 1), 255)
    is_constant = tf.reduce_max(histogram, axis=1, keepdims=True) == pixels
    table = tf.where((step == 0) | is_constant, tf.range(256)[None], levels)
    equalized = tf.gather(table, channels, batch_dims=1)
    return tf.cast(tf.transpose(tf.reshape(equalized, tf.gather(shape, (0, 3, 1, 2))), (0, 2, 3, 1)), tf.uint8)


def solarize(images: tf.Tensor, thresholds: tf.Tensor) -> tf.Tensor:
    """Invert values at or above the threshold; thresholds [n, 1]."""
    return tf.where(tf.cast(images, tf.float32) >= thresholds[:, :, None, None], 255 - images, images)


def posterize(images: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
    """Round values down to multiples of a power of two; steps [n, 1]."""
    return images - images % tf.cast(steps, tf.uint8)[:, :, None, None]


def _blend(other: tf.Tensor, images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Interpolate from `other` (factor 0) to `images` (factor 1), and beyond; factors [n, 1]."""
    wide = tf.cast(other, tf.float32)
    mixed = wide + factors[:, :, None, None] * (tf.cast(images, tf.float32) - wide)
    return tf.cast(tf.clip_by_value(mixed, 0, 255), tf.uint8)


def _gray(images: tf.Tensor) -> tf.Tensor:
    """Convert images to gray levels, int32 [n, height, width, 1]."""
    return (tf.reduce_sum(tf.cast(images, tf.int32) * _LUMA, axis=3, keepdims=True) + 2**15) // 2**16


def color(images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Move colours away from gray (factors above 1) or towards it; factors [n, 1]."""
    return _blend(_gray(images), images, factors)


def contrast(images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Move values away from the mean gray level or towards it; factors [n, 1]."""
    mean = tf.reduce_mean(tf.cast(_gray(images), tf.float64), axis=(1, 2, 3), keepdims=True)
    return _blend(tf.floor(mean + 0.5), images, factors)


def brightness(images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Move values away from black or towards it; factors [n, 1]."""
    return _blend(tf.zeros_like(images), images, factors)


def sharpness(images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Move values away from those of the smoothed image or towards them; factors [n, 1]."""
    return _blend(smooth(images, factors), images, factors)


def _filter(images: tf.Tensor, kernel: np.ndarray) -> tf.Tensor:
    """Filter images with a kernel; a border half as wide as the kernel stays unchanged."""
    border = len(kernel) // 2
    height, width = tf.shape(images)[1], tf.shape(images)[2]
    if tf.minimum(height, width) < len(kernel):
        return images
    weights = tf.constant(np.repeat(kernel[:, :, None, None], 3, axis=2), tf.float32)
    sums = tf.nn.depthwise_conv2d(tf.cast(images, tf.float32), weights, (1, 1, 1, 1), "VALID")
    inside = tf.cast(tf.floor(sums / kernel.sum() + 0.5), tf.uint8)
    middle = tf.concat([images[:, border:-border, :border], inside, images[:, border:-border, -border:]], axis=2)
    return tf.concat([images[:, :border], middle, images[:, -border:]], axis=1)


def blur(images: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    """Replace each pixel by the mean of the 16 pixels at a distance of two."""
    return _filter(images, _BLUR)


def smooth(images: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    """Replace each pixel by the mean of 3x3 pixels, with a weight of five for the middle one."""
    return _filter(images, _SMOOTH)


def affine(images: tf.Tensor, matrices: tf.Tensor) -> tf.Tensor:
    """Apply affine maps; matrices [n, 6] take the output's (x, y), from the corner of the image, to the input's."""
    a, b, c, d, e, f = tf.unstack(matrices, 6, axis=1)
    # In TensorFlow's coordinates the middle of a pixel is at whole numbers.
    centred = tf.stack([a, b, (a + b) / 2 + c - 0.5, d, e, (d + e) / 2 + f - 0.5, 0 * a, 0 * a], axis=1)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=centred,
        output_shape=tf.shape(images)[1:3],
        fill_value=float(FILL),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )


def cutout(images: tf.Tensor, boxes: tf.Tensor) -> tf.Tensor:
    """Fill a rectangle; boxes [n, 4] are left, top, right and bottom in whole pixels."""
    left, top, right, bottom = (tf.cast(edge, tf.int32)[:, None] for edge in tf.unstack(boxes, 4, axis=1))
    rows, columns = tf.range(tf.shape(images)[1])[None], tf.range(tf.shape(images)[2])[None]
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
    return tf.where(inside[..., None], tf.constant(FILL, tf.uint8), images)


def zoom(images: tf.Tensor, crops: tf.Tensor) -> tf.Tensor:
    """Crop images and enlarge them to their old size, bilinearly.

    crops [n, 4] are the pixels to remove at the top, right, bottom and left.
    """
    top, right, bottom, left = tf.unstack(crops, 4, axis=1)
    result = images
    for axis, (before, after) in ((1, (top, bottom)), (2, (left, right))):
        size = tf.cast(tf.shape(images)[axis], tf.float32)
        remaining = (size - before - after)[:, None]
        positions = tf.clip_by_value((tf.range(size)[None] + 0.5) * remaining / size - 0.5, 0, remaining - 1)
        low = tf.floor(positions)
        high = tf.minimum(low + 1, remaining - 1)
        weight = tf.expand_dims((positions - low)[..., None], 3 - axis)
        at_low, at_high = (
            tf.cast(tf.gather(result, tf.cast(index + before[:, None], tf.int32), axis=axis, batch_dims=1), tf.float32)
            for index in (low, high)
        )
        result = at_low + weight * (at_high - at_low)
    return tf.cast(tf.round(result), tf.uint8)


# In the order of imgaug's list.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda images, _: images,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": lambda images, _: 255 - images,
    "rotate": affine,
    "posterize": posterize,
    "solarize": solarize,
    "color": color,
    "contrast": contrast,
    "brightness": brightness,
    "sharpness": sharpness,
    "shear_x": affine,
    "shear_y": affine,
    "translate_x": affine,
    "translate_y": affine,
    "cutout": cutout,
    "blur": blur,
    "smooth": smooth,
}
NAMES = tuple(OPERATIONS)


@dataclass(frozen=True)
class Draws:
    """The random numbers for a chunk of images.

    Attributes:
        zooms: float [images, 4], the fractions to crop at the top, right, bottom and left.
        order: int [18], the order in which the operations are applied.
        active: bool [images, 18], the operations that are applied to each image.
        signs: int [images, 18], -1 or 1: the direction of each operation.
        centres: float [images, 2], x and y of the cutout's centre, as fractions of the width and height.
    """

    zooms: np.ndarray
    order: np.ndarray
    active: np.ndarray
    signs: np.ndarray
    centres: np.ndarray


def draw(random: np.random.Generator, images: int, n: int, m: int) -> Draws:
    """Draw random numbers with the distributions of imgaug's RandAugment: one order for all images of a chunk."""
    kinds = len(NAMES)
    return Draws(
        zooms=random.uniform(0, m, (images, 4)) / 224,
        order=random.permutation(kinds),
        active=random.permuted(np.tile(np.arange(kinds) < n, (images, 1)), axis=1),
        signs=random.choice((-1, 1), (images, kinds)),
        centres=random.uniform(size=(images, 2)),
    )


def values(name: str, m: int, signs: np.ndarray, centres: np.ndarray, height: int, width: int) -> np.ndarray:
    """Compute the parameters of an operation at magnitude `m`: float [images, any], as its function expects them.

    Args:
        name: a name in `OPERATIONS`.
        m: the magnitude, from 0 to M_MAX.
        signs: [images], a column of `Draws.signs`.
        centres: [images, 2], as in `Draws`.
        height, width: of the images, in pixels.
    """
    level = signs * m / M_MAX
    match name:
        case "rotate":
            cosine, sine = np.cos(np.deg2rad(30 * level)), np.sin(np.deg2rad(30 * level))
            x, y = width / 2, height / 2
            return _matrices(cosine, sine, x - cosine * x - sine * y, -sine, cosine, y + sine * x - cosine * y)
        case "shear_x":
            return _matrices(1, -np.tanh(0.3 * level), 0, 0, 1, 0)
        case "shear_y":
            return _matrices(1, 0, 0, -np.tanh(0.3 * level), 1, 0)
        case "translate_x":
            return _matrices(1, 0, -0.33 * width * level, 0, 1, 0)
        case "translate_y":
            return _matrices(1, 0, 0, 0, 1, -0.33 * height * level)
        case "color" | "contrast" | "brightness" | "sharpness":
            return 1 + 0.9 * level[:, None]
        case "posterize":
            return np.full((len(signs), 1), 2 ** (6 * m // M_MAX))
        case "solarize":
            return np.full((len(signs), 1), 256 - 256 * m // M_MAX)
        case "cutout":
            half = 20 / 32 * m / M_MAX * height / 2  # a square, sized by the height alone
            pixels = centres * [width, height]
            boxes = np.concatenate([pixels - half, pixels + half], axis=1)
            return np.clip(boxes.astype(int), 0, [width, height, width, height])
    return np.zeros((len(signs), 1))


def _matrices(*numbers: np.ndarray | float) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*numbers), axis=1)


def randaugment(images: list[np.ndarray], n: int, m: int, random: np.random.Generator) -> list[np.ndarray]:
    """Zoom each image of a chunk a little, and apply `n` of the 18 operations to it.

    Args:
        images: uint8 [height, width, 3] each; sizes may differ.
        n, m: the number of operations and their magnitude.
        random: draws all random numbers.

    Returns:
        Images of the same sizes and dtype.
    """
    draws = draw(random, len(images), n, m)
    augmented = list(images)
    for shape in {image.shape for image in images}:
        rows = np.flatnonzero([image.shape == shape for image in images])
        stack = _apply(draws, rows, np.stack([images[row] for row in rows]), m)
        for row, image in zip(rows, stack, strict=True):
            augmented[row] = image
    return augmented


def _apply(draws: Draws, rows: np.ndarray, stack: np.ndarray, m: int) -> np.ndarray:
    """Augment those images of a chunk, at `rows`, that have one shape. `stack` may be overwritten."""
    _, height, width, _ = stack.shape
    crops = np.rint(draws.zooms[rows] * [height, width, height, width])
    if crops.any():
        stack = run("zoom", stack, crops)
    for index in draws.order:
        active = np.flatnonzero(draws.active[rows, index])
        if len(active) and NAMES[index] != "identity":
            chosen = rows[active]
            parameters = values(NAMES[index], m, draws.signs[chosen, index], draws.centres[chosen], height, width)
            # The images are selected here, because a scatter in TensorFlow would copy all the others too.
            stack[active] = run(NAMES[index], stack[active], parameters)
    return stack


def run(name: str, images: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """Apply an operation to images.

    Args:
        name: a name in `OPERATIONS`, or `zoom`.
        images: uint8 [n, height, width, 3].
        parameters: float [n, any], as the operation expects them.
    """
    operation = zoom if name == "zoom" else OPERATIONS[name]
    return np.array(_traced(operation)(images, tf.constant(parameters, tf.float32)))


@functools.cache
def _traced(operation: Operation) -> Operation:
    """Trace an operation, once for all shapes."""
    signature = [
        tf.TensorSpec((None, None, None, 3), tf.uint8, name="images"),
        tf.TensorSpec((None, None), tf.float32, name="parameters"),
    ]
    return tf.function(operation, input_signature=signature)
