"""Faster CPU kernels for the trained layers, with the same results up to rounding.

BatchNorm is folded into convolutions, and gradients of wide depthwise kernels are computed in faster ways. On request,
gradients of 1x1 convolutions are computed as products of bfloat16 matrices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from flatmin.models.classifier import TrainedLayers
from flatmin.models.split import nodes

FULL_PRECISION = ("float32", "float64")
Convolve = Callable[[Any, Any], Any]  # (inputs, kernel) -> outputs
Replacements = dict[int, Callable[..., Any]]  # the id of an operation -> the function that is called instead


def optimize_for_cpu(
    layers: TrainedLayers,
    fold_batchnorm: bool = True,
    fast_depthwise_grad: bool = True,
    bfloat16_grad: bool = False,
) -> TrainedLayers:
    """Make trained layers faster on a CPU.

    Args:
        layers: the trained layers, which stay as they are.
        fold_batchnorm: multiply a convolution's kernel, instead of its outputs, by the scale of the BatchNorm after it,
            whose statistics are never trained. Gradients of kernel, gamma and beta then need no pass over activations.
        fast_depthwise_grad: compute gradients of depthwise kernels wider than three in faster ways
            (`_depthwise_conv`).
        bfloat16_grad: compute gradients of 1x1 convolutions in bfloat16, which has 8 significant bits
            (`_pointwise_conv`).

    Returns:
        A model with the same variables in the same order, and with the same outputs and gradients up to rounding. It is
        `layers` itself if there is a GPU or nothing to gain. Layers of other kinds, and those that compute in half
        precision, are called unchanged.
    """
    if layers.backbone_layers is None or tf.config.list_logical_devices("GPU"):
        return layers
    replacements = _replacements(layers.backbone_layers, fold_batchnorm, fast_depthwise_grad, bfloat16_grad)
    if not replacements:
        return layers
    return TrainedLayers(_WithReplacements(layers.backbone_layers, replacements), layers.head)


class _WithReplacements(keras.Model):
    """A functional model in which some operations are replaced, in inference mode only."""

    def __init__(self, original: keras.Model, replacements: Replacements) -> None:
        super().__init__(name=original.name)
        self.original = original
        self._replacements = replacements

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            return self.original(inputs, training=True)
        return self.original._run_through_graph(
            inputs, operation_fn=lambda operation: self._replacements.get(id(operation), operation)
        )


def _replacements(
    model: keras.Model, fold_batchnorm: bool, fast_depthwise_grad: bool, bfloat16_grad: bool
) -> Replacements:
    def faster_convolution(layer: Any) -> Convolve | None:
        """Return a faster function for the layer's convolution, if there is one."""
        if bfloat16_grad and _is_pointwise(layer):
            return _pointwise_conv
        if fast_depthwise_grad and _has_slow_kernel_gradient(layer):
            return partial(_depthwise_conv, stride=layer.strides[0], padding=layer.padding.upper())
        return None

    replacements: Replacements = {}
    if fold_batchnorm:
        for layer, norm in _foldable_pairs(model):
            replacements[id(layer)] = _replaced_call(layer, norm, faster_convolution(layer) or _own_convolution(layer))
            replacements[id(norm)] = lambda inputs, mask=None: inputs
    for layer in model.layers:
        if id(layer) not in replacements and _is_supported_convolution(layer) and (found := faster_convolution(layer)):
            replacements[id(layer)] = _replaced_call(layer, None, found)
    return replacements


def _foldable_pairs(model: keras.Model) -> Iterator[tuple[Any, Any]]:
    """Find each convolution whose outputs go to one BatchNorm and to nothing else, with this BatchNorm."""
    calls = [node for node in nodes(model) if not node.is_input]
    times_called = Counter(id(node.operation) for node in calls)
    times_used = Counter(id(tensor) for node in calls for tensor in node.input_tensors)
    times_used.update(id(tensor) for tensor in model.outputs)
    made_by = {id(tensor): node.operation for node in calls for tensor in node.output_tensors}
    for node in calls:
        norm = node.operation
        if not _is_supported_norm(norm) or times_called[id(norm)] > 1:
            continue
        layer: Any = made_by.get(id(node.input_tensors[0]))
        if not (_is_supported_convolution(layer) and layer.activation is keras.activations.linear):
            continue
        if times_called[id(layer)] == 1 and times_used[id(node.input_tensors[0])] == 1:
            yield layer, norm


def _is_supported_convolution(layer: Any) -> bool:
    return (
        type(layer) in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
        and layer.data_format == "channels_last"
        and layer.compute_dtype in FULL_PRECISION
        and layer.activity_regularizer is None
    )


def _is_supported_norm(layer: Any) -> bool:
    return (
        type(layer) is keras.layers.BatchNormalization
        and layer.axis in (-1, 3)
        and layer.compute_dtype in FULL_PRECISION
        and layer.activity_regularizer is None
    )


def _has_slow_kernel_gradient(layer: Any) -> bool:
    """Whether oneDNN, TensorFlow's library on many CPUs, is slow at the gradient of a depthwise layer's kernel."""
    return (
        isinstance(layer, keras.layers.DepthwiseConv2D)
        and layer.kernel_size[1] > 3
        and tuple(layer.dilation_rate) == (1, 1)
        and layer.strides[0] == layer.strides[1]
    )


def _is_pointwise(layer: Any) -> bool:
    """Whether a layer is a 1x1 convolution in float32 with kernels large enough for bfloat16 to pay."""
    return (
        isinstance(layer, keras.layers.Conv2D)
        and layer.compute_dtype == "float32"
        and min(layer.kernel.shape[2:]) >= 32  # with fewer channels, casting costs what multiplying saves
        and (layer.kernel_size, layer.strides, layer.groups) == ((1, 1), (1, 1), 1)
    )


def _own_convolution(layer: Any) -> Convolve:
    """Return the function by which the layer itself convolves."""
    if isinstance(layer, keras.layers.Conv2D):
        return layer.convolution_op
    return lambda inputs, kernel: keras.ops.depthwise_conv(
        inputs, kernel, layer.strides, layer.padding, layer.data_format, layer.dilation_rate
    )


def _replaced_call(layer: Any, norm: Any | None, convolve: Convolve) -> Callable[[Any], Any]:
    """Return a function to call instead of the layer and, if there is one, the BatchNorm after it.

    It reads the variables at every call.
    """

    def call(inputs: Any) -> Any:
        kernel = tf.convert_to_tensor(layer.kernel)
        bias = tf.convert_to_tensor(layer.bias) if layer.use_bias else None
        if norm is not None:
            scale = tf.math.rsqrt(norm.moving_variance + norm.epsilon)
            scale = scale * norm.gamma if norm.scale else scale
            mean = norm.moving_mean - bias if layer.use_bias else tf.convert_to_tensor(norm.moving_mean)
            bias = norm.beta - mean * scale if norm.center else -mean * scale
            # The outputs of a depthwise kernel are its last two axes.
            kernel = kernel * (scale if isinstance(layer, keras.layers.Conv2D) else tf.reshape(scale, kernel.shape[2:]))
        outputs = convolve(inputs, kernel)
        return layer.activation(outputs if bias is None else tf.nn.bias_add(outputs, bias))

    return call


def _pointwise_conv(inputs: Any, kernel: Any) -> Any:
    """Compute a 1x1 convolution whose gradients are products of bfloat16 matrices; all inputs and outputs are float32.

    oneDNN's BF16 mode takes up to twice as long for these gradients. It is as fast as this for the forward pass, and
    computes bias and ReLU in the same pass over memory, so the forward pass is left to it.
    """
    matrix = (-1, kernel.shape[2])

    @tf.custom_gradient
    def convolve(inputs: Any, kernel: Any) -> Any:
        def gradients(upstream: Any) -> Any:
            pixels = tf.cast(tf.reshape(inputs, matrix), "bfloat16")
            outputs_gradient = tf.cast(tf.reshape(upstream, (-1, kernel.shape[3])), "bfloat16")
            inputs_gradient = tf.matmul(outputs_gradient, tf.cast(kernel[0, 0], "bfloat16"), transpose_b=True)
            kernel_gradient = tf.matmul(pixels, outputs_gradient, transpose_a=True)
            return (
                tf.reshape(tf.cast(inputs_gradient, "float32"), tf.shape(inputs)),
                tf.cast(kernel_gradient, "float32")[None, None],
            )

        return tf.nn.conv2d(inputs, kernel, 1, "VALID"), gradients

    return convolve(inputs, kernel)


def _depthwise_conv(inputs: Any, kernel: Any, stride: int, padding: str) -> Any:
    """Compute a depthwise convolution with faster gradients than oneDNN's, which are slow for kernels wider than 3."""
    strides = [1, stride, stride, 1]
    if None in inputs.shape[1:3]:
        return tf.nn.depthwise_conv2d(inputs, kernel, strides, padding)
    is_centred = (stride, padding, kernel.shape[3]) == (1, "SAME", 1) and kernel.shape[0] * kernel.shape[1] % 2

    @tf.custom_gradient
    def convolve(inputs: Any, kernel: Any) -> Any:
        def gradients(upstream: Any) -> Any:
            if is_centred:
                inputs_gradient = tf.nn.depthwise_conv2d(upstream, tf.reverse(kernel, (0, 1)), strides, padding)
            else:
                inputs_gradient = tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
                    input_sizes=tf.shape(inputs), filter=kernel, out_backprop=upstream, strides=strides, padding=padding
                )
            if is_centred and kernel.shape[1] == 5 and inputs.shape[1] >= kernel.shape[0]:
                return inputs_gradient, _kernel_gradient_5_wide(inputs, upstream, kernel.shape)
            return inputs_gradient, _kernel_gradient(inputs, upstream, kernel.shape, stride, padding)

        return tf.nn.depthwise_conv2d(inputs, kernel, strides, padding), gradients

    return convolve(inputs, kernel)


def _kernel_gradient(inputs: Any, upstream: Any, shape: Any, stride: int, padding: str) -> Any:
    """Compute a depthwise kernel's gradient with TensorFlow's own code, which it uses if the padding is explicit."""
    pads = [0, 0, 0, 0, 0, 0, 0, 0]
    if padding == "SAME":
        for axis in (1, 2):
            missing = (upstream.shape[axis] - 1) * stride + shape[axis - 1] - inputs.shape[axis]
            pads[2 * axis : 2 * axis + 2] = max(missing, 0) // 2, max(missing, 0) - max(missing, 0) // 2
    return tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
        input=inputs,
        filter_sizes=shape,
        out_backprop=upstream,
        strides=[1, stride, stride, 1],
        padding="EXPLICIT",
        explicit_paddings=pads,
    )


def _kernel_gradient_5_wide(inputs: Any, upstream: Any, shape: Any) -> Any:
    """Compute the gradient of a depthwise kernel 5 wide (stride 1, padding SAME) as those of two kernels 3 wide.

    oneDNN has fast code for kernels 3 wide. Columns 0 to 2 of the gradient come from images shifted right by one pixel,
    columns 2 to 4 from images shifted left. Shifting costs nothing: rows are padded, so that they can run into each
    other, and the whole batch is read starting at another pixel.
    """
    height, width, channels = inputs.shape[1:]
    padded = tf.pad(inputs, ((0, 1), (0, 0), (1, 1), (0, 0)))  # one more image, because the shifted batch ends later
    pixels = tf.reshape(padded, (-1, channels))
    count = tf.shape(inputs)[0] * height * (width + 2)

    def three_columns(first: int) -> Any:
        shifted = tf.reshape(pixels[first : first + count], (-1, height, width + 2, channels))
        return tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=shifted,
            filter_sizes=(shape[0], 3, *shape[2:]),
            out_backprop=tf.pad(upstream, ((0, 0), (0, 0), (0, 2), (0, 0))),
            strides=[1, 1, 1, 1],
            padding="SAME",
        )

    return tf.concat([three_columns(0), three_columns(2)[:, 1:]], axis=1)
