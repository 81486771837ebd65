"""imgaug's RandAugment in TensorFlow: the same operations, magnitudes and fill, for a stack of images at once.

What is random is drawn before, by NumPy, so the operations themselves are pure. They copy what imgaug 0.4 does with
Pillow and OpenCV, down to Pillow's luma weights, the borders that its filters leave alone and its nearest pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

Operation = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

FILL = 128
M_MAX = 30
_LUMA = (19595, 38470, 7471)  # of 2**16
_PILLOW_EQUALIZE = 64 * 64  # values; imgaug equalizes smaller images with Pillow, whose last bin is another
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])
_BLUR = np.pad(np.zeros((3, 3), int), 1, constant_values=1)


def autocontrast(images: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    """Stretch each channel to 0 to 255."""
    wide = tf.cast(images, tf.float64)
    low, high = (reduce(wide, (1, 2), keepdims=True) for reduce in (tf.reduce_min, tf.reduce_max))
    scale = 255 / tf.maximum(high - low, 1)
    return tf.where(high > low, tf.cast(tf.clip_by_value(wide * scale - low * scale, 0, 255), tf.uint8), images)


def equalize(images: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    """Spread each channel's values evenly."""
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
    flat = tf.reduce_max(histogram, axis=1, keepdims=True) == pixels
    table = tf.where((step == 0) | flat, tf.range(256)[None], levels)
    equalized = tf.gather(table, channels, batch_dims=1)
    return tf.cast(tf.transpose(tf.reshape(equalized, tf.gather(shape, (0, 3, 1, 2))), (0, 2, 3, 1)), tf.uint8)


def solarize(images: tf.Tensor, thresholds: tf.Tensor) -> tf.Tensor:
    """Invert what is at or above the threshold."""
    return tf.where(tf.cast(images, tf.float32) >= thresholds[:, :, None, None], 255 - images, images)


def posterize(images: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
    """Round down to multiples of a power of two."""
    return images - images % tf.cast(steps, tf.uint8)[:, :, None, None]


def _blend(other: tf.Tensor, images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    wide = tf.cast(other, tf.float32)
    mixed = wide + factors[:, :, None, None] * (tf.cast(images, tf.float32) - wide)
    return tf.cast(tf.clip_by_value(mixed, 0, 255), tf.uint8)


def _gray(images: tf.Tensor) -> tf.Tensor:
    """int32 [n, h, w, 1]."""
    return (tf.reduce_sum(tf.cast(images, tf.int32) * _LUMA, axis=3, keepdims=True) + 2**15) // 2**16


def color(images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Away from gray (factor above 1) or towards it."""
    return _blend(_gray(images), images, factors)


def contrast(images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Away from the mean gray or towards it."""
    mean = tf.reduce_mean(tf.cast(_gray(images), tf.float64), axis=(1, 2, 3), keepdims=True)
    return _blend(tf.floor(mean + 0.5), images, factors)


def brightness(images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Away from black or towards it."""
    return _blend(tf.zeros_like(images), images, factors)


def sharpness(images: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Away from the smoothed image or towards it."""
    return _blend(smooth(images, factors), images, factors)


def _filter(images: tf.Tensor, kernel: np.ndarray) -> tf.Tensor:
    """Weigh each pixel's neighbourhood; a border as wide as half the kernel stays as it is."""
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
    """The mean of the 16 pixels two away."""
    return _filter(images, _BLUR)


def smooth(images: tf.Tensor, _: tf.Tensor) -> tf.Tensor:
    """The mean of 3x3 pixels, the middle one five times."""
    return _filter(images, _SMOOTH)


def affine(images: tf.Tensor, matrices: tf.Tensor) -> tf.Tensor:
    """Move pixels: matrices [n, 6] take the output's (x, y), from the corner of the image, to the input's."""
    a, b, c, d, e, f = tf.unstack(matrices, 6, axis=1)
    # From TensorFlow's coordinates, where the middle of a pixel is whole.
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
    """Fill a rectangle; boxes [n, 4] are left, top, right, bottom in whole pixels."""
    left, top, right, bottom = (tf.cast(edge, tf.int32)[:, None] for edge in tf.unstack(boxes, 4, axis=1))
    rows, columns = tf.range(tf.shape(images)[1])[None], tf.range(tf.shape(images)[2])[None]
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
    return tf.where(inside[..., None], tf.constant(FILL, tf.uint8), images)


def zoom(images: tf.Tensor, crops: tf.Tensor) -> tf.Tensor:
    """Cut off pixels and enlarge what is left to the old size, bilinearly; crops [n, 4]: top, right, bottom, left."""
    top, right, bottom, left = tf.unstack(crops, 4, axis=1)
    result = images
    for axis, (before, after) in ((1, (top, bottom)), (2, (left, right))):
        size = tf.cast(tf.shape(images)[axis], tf.float32)
        kept = (size - before - after)[:, None]
        places = tf.clip_by_value((tf.range(size)[None] + 0.5) * kept / size - 0.5, 0, kept - 1)
        low = tf.floor(places)
        high = tf.minimum(low + 1, kept - 1)
        weight = tf.expand_dims((places - low)[..., None], 3 - axis)
        one, other = (
            tf.cast(tf.gather(result, tf.cast(index + before[:, None], tf.int32), axis=axis, batch_dims=1), tf.float32)
            for index in (low, high)
        )
        result = one + weight * (other - one)
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
    """What is random about a chunk of images.

    zooms: float [images, 4], fractions cut off at top, right, bottom and left. order: int [18], in which the operations
    run. active: bool [images, 18], which ones an image goes through. signs: [images, 18] of -1 and 1. centres: float
    [images, 2], x and y of the cutout as fractions.
    """

    zooms: np.ndarray
    order: np.ndarray
    active: np.ndarray
    signs: np.ndarray
    centres: np.ndarray


def draw(random: np.random.Generator, images: int, n: int, m: int) -> Draws:
    """With the distributions of imgaug's RandAugment: as there, the order is one for all images of a chunk."""
    kinds = len(NAMES)
    return Draws(
        zooms=random.uniform(0, m, (images, 4)) / 224,
        order=random.permutation(kinds),
        active=random.permuted(np.tile(np.arange(kinds) < n, (images, 1)), axis=1),
        signs=random.choice((-1, 1), (images, kinds)),
        centres=random.uniform(size=(images, 2)),
    )


def values(name: str, m: int, signs: np.ndarray, centres: np.ndarray, height: int, width: int) -> np.ndarray:
    """The parameters of an operation at magnitude `m`: float [images, any], as its function takes them."""
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
            half = 20 / 32 * m / M_MAX * height / 2  # a square, by the height
            middles = centres * [width, height]
            boxes = np.concatenate([middles - half, middles + half], axis=1)
            return np.clip(boxes.astype(int), 0, [width, height, width, height])
    return np.zeros((len(signs), 1))


def _matrices(*numbers: np.ndarray | float) -> np.ndarray:
    return np.stack(np.broadcast_arrays(*numbers), axis=1)


def randaugment(images: list[np.ndarray], n: int, m: int, random: np.random.Generator) -> list[np.ndarray]:
    """One chunk of uint8 [height, width, 3] images, zoomed a little and put through `n` of the 18 operations each."""
    draws = draw(random, len(images), n, m)
    found = list(images)
    for shape in {image.shape for image in images}:
        rows = np.flatnonzero([image.shape == shape for image in images])
        changed = _of_one_shape(np.stack([images[row] for row in rows]), rows, draws, m)
        for row, image in zip(rows, changed, strict=True):
            found[row] = image
    return found


def _of_one_shape(stack: np.ndarray, rows: np.ndarray, draws: Draws, m: int) -> np.ndarray:
    """The images of one shape, which are at `rows` in the chunk; `stack` is written over."""
    _, height, width, _ = stack.shape
    crops = np.rint(draws.zooms[rows] * [height, width, height, width])
    if crops.any():
        stack = run("zoom", stack, crops)
    for index in draws.order:
        active = np.flatnonzero(draws.active[rows, index])
        if len(active) and NAMES[index] != "identity":
            of = rows[active]
            parameters = values(NAMES[index], m, draws.signs[of, index], draws.centres[of], height, width)
            # Only these go through TensorFlow: a scatter there would copy all the others, too.
            stack[active] = run(NAMES[index], stack[active], parameters)
    return stack


def run(name: str, images: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """An operation, or `zoom`, by name.

    Args:
        images: uint8 [n, height, width, 3].
        parameters: float [n, any], as the operation takes them.
    """
    operation = zoom if name == "zoom" else OPERATIONS[name]
    return np.array(_traced(operation)(images, tf.constant(parameters, tf.float32)))


@functools.cache
def _traced(operation: Operation) -> Operation:
    """Once for all shapes."""
    signature = [
        tf.TensorSpec((None, None, None, 3), tf.uint8, name="images"),
        tf.TensorSpec((None, None), tf.float32, name="parameters"),
    ]
    return tf.function(operation, input_signature=signature)
