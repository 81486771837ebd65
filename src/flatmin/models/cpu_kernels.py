"""The same tail, quicker on CPU: BatchNorm folded into convolutions, quicker gradients of wide depthwise kernels.

And, where half precision is asked for, the gradients of convolutions of one pixel as products of bfloat16 matrices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from flatmin.models.classifier import TrainedLayers

FULL = ("float32", "float64")
Calls = dict[int, Callable[..., Any]]  # the id of an operation -> what is called in its place


def optimize_for_cpu(
    layers: TrainedLayers,
    fold_batchnorm: bool = True,
    fast_depthwise_grad: bool = True,
    bfloat16_grad: bool = False,
) -> TrainedLayers:
    """A tail with the same variables in the same order, outputs and gradients, but for rounding.

    Args:
        fold: multiply a convolution's kernel by the scale of the BatchNorm behind it, whose statistics the tail never
            changes, in place of its outputs. Gradients of kernel, gamma and beta then need no pass over activations.
        depthwise: take the gradients of depthwise kernels wider than three in quicker ways (`_depthwise`).
        half: multiply for the gradients of convolutions of one pixel in bfloat16, of 8 bits (`_pointwise`).

    Returns:
        the tail itself where there is a GPU or nothing to gain. Layers that are of no such kind, or compute in half
        precision, are called as they are.
    """
    if layers.backbone_layers is None or tf.config.list_logical_devices("GPU"):
        return layers
    calls = _calls(layers.backbone_layers, fold_batchnorm, fast_depthwise_grad, bfloat16_grad)
    return TrainedLayers(_Rewritten(layers.backbone_layers, calls), layers.head) if calls else layers


class _Rewritten(keras.Model):
    """A functional model, some of whose operations are replaced in inference mode."""

    def __init__(self, plain: keras.Model, calls: Calls) -> None:
        super().__init__(name=plain.name)
        self.plain = plain
        self._calls = calls

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            return self.plain(inputs, training=True)
        return self.plain._run_through_graph(inputs, operation_fn=lambda each: self._calls.get(id(each), each))


def _calls(model: keras.Model, fold: bool, depthwise: bool, half: bool) -> Calls:
    def convolve(layer: Any) -> Callable[[Any, Any], Any] | None:
        """What convolves in the layer's place, where something does."""
        if half and _is_pointwise(layer):
            return _pointwise
        if depthwise and _is_wide(layer):
            return partial(_depthwise, stride=layer.strides[0], padding=layer.padding.upper())
        return None

    calls: Calls = {}
    if fold:
        for layer, norm in _pairs(model):
            calls[id(layer)] = _convolution(layer, norm, convolve(layer) or _own(layer))
            calls[id(norm)] = lambda inputs, mask=None: inputs
    for layer in model.layers:
        if id(layer) not in calls and _is_plain(layer) and (convolution := convolve(layer)):
            calls[id(layer)] = _convolution(layer, None, convolution)
    return calls


def _pairs(model: keras.Model) -> Iterator[tuple[Any, Any]]:
    """Convolutions and the BatchNorm that each one's outputs go to and nothing else."""
    nodes = [node for depth in model._nodes_by_depth.values() for node in depth if not node.is_input]
    calls = Counter(id(node.operation) for node in nodes)
    uses = Counter(id(tensor) for node in nodes for tensor in node.input_tensors)
    uses.update(id(tensor) for tensor in model.outputs)
    makers = {id(tensor): node.operation for node in nodes for tensor in node.output_tensors}
    for node in nodes:
        norm = node.operation
        if type(norm) is not keras.layers.BatchNormalization or norm.axis not in (-1, 3) or calls[id(norm)] > 1:
            continue
        layer: Any = makers.get(id(node.input_tensors[0]))
        if not (_is_plain(layer) and _is_plain_norm(norm) and layer.activation is keras.activations.linear):
            continue
        if calls[id(layer)] == 1 and uses[id(node.input_tensors[0])] == 1:
            yield layer, norm


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
        and layer.data_format == "channels_last"
        and layer.compute_dtype in FULL
        and layer.activity_regularizer is None
    )


def _is_plain_norm(norm: Any) -> bool:
    return norm.compute_dtype in FULL and norm.activity_regularizer is None


def _is_wide(layer: Any) -> bool:
    """Whether oneDNN, TensorFlow's library on many CPUs, has no quick gradient for a depthwise layer's kernel."""
    return (
        isinstance(layer, keras.layers.DepthwiseConv2D)
        and layer.kernel_size[1] > 3
        and tuple(layer.dilation_rate) == (1, 1)
        and layer.strides[0] == layer.strides[1]
    )


def _is_pointwise(layer: Any) -> bool:
    """Whether a layer in float32 multiplies each pixel's channels by one matrix, not too small."""
    return (
        isinstance(layer, keras.layers.Conv2D)
        and layer.compute_dtype == "float32"
        and min(layer.kernel.shape[2:]) >= 32  # below, casting takes what multiplying saves
        and (layer.kernel_size, layer.strides, layer.groups) == ((1, 1), (1, 1), 1)
    )


def _own(layer: Any) -> Callable[[Any, Any], Any]:
    """How a layer convolves."""
    if isinstance(layer, keras.layers.Conv2D):
        return layer.convolution_op
    return lambda inputs, kernel: keras.ops.depthwise_conv(
        inputs, kernel, layer.strides, layer.padding, layer.data_format, layer.dilation_rate
    )


def _convolution(layer: Any, norm: Any | None, convolve: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """What calls the layer, and the BatchNorm behind it if there is one, reading variables when it is called."""

    def call(inputs: Any) -> Any:
        kernel = tf.convert_to_tensor(layer.kernel)
        bias = tf.convert_to_tensor(layer.bias) if layer.use_bias else None
        if norm is not None:
            scale = tf.math.rsqrt(norm.moving_variance + norm.epsilon)
            scale = scale * norm.gamma if norm.scale else scale
            mean = norm.moving_mean - bias if layer.use_bias else tf.convert_to_tensor(norm.moving_mean)
            bias = norm.beta - mean * scale if norm.center else -mean * scale
            # A depthwise kernel's last two axes are those of the outputs.
            kernel = kernel * (scale if isinstance(layer, keras.layers.Conv2D) else tf.reshape(scale, kernel.shape[2:]))
        outputs = convolve(inputs, kernel)
        return layer.activation(outputs if bias is None else tf.nn.bias_add(outputs, bias))

    return call


def _pointwise(inputs: Any, kernel: Any) -> Any:
    """A convolution of one pixel whose gradients are products of bfloat16 matrices; in and out float32.

    oneDNN's BF16 mode takes up to twice as long for them. Forward it is as quick, and does bias and ReLU in one pass.
    """
    matrix = (-1, kernel.shape[2])

    @tf.custom_gradient
    def convolve(inputs: Any, kernel: Any) -> Any:
        def gradients(upstream: Any) -> Any:
            pixels = tf.cast(tf.reshape(inputs, matrix), "bfloat16")
            above = tf.cast(tf.reshape(upstream, (-1, kernel.shape[3])), "bfloat16")
            of_inputs = tf.matmul(above, tf.cast(kernel[0, 0], "bfloat16"), transpose_b=True)
            of_kernel = tf.matmul(pixels, above, transpose_a=True)
            return tf.reshape(tf.cast(of_inputs, "float32"), tf.shape(inputs)), tf.cast(of_kernel, "float32")[
                None, None
            ]

        return tf.nn.conv2d(inputs, kernel, 1, "VALID"), gradients

    return convolve(inputs, kernel)


def _depthwise(inputs: Any, kernel: Any, stride: int, padding: str) -> Any:
    """A depthwise convolution with quicker gradients than oneDNN's, which are slow for kernels wider than three."""
    strides = [1, stride, stride, 1]
    if None in inputs.shape[1:3]:
        return tf.nn.depthwise_conv2d(inputs, kernel, strides, padding)
    is_centred = (stride, padding, kernel.shape[3]) == (1, "SAME", 1) and kernel.shape[0] * kernel.shape[1] % 2

    @tf.custom_gradient
    def convolve(inputs: Any, kernel: Any) -> Any:
        def gradients(upstream: Any) -> Any:
            if is_centred:
                of_inputs = tf.nn.depthwise_conv2d(upstream, tf.reverse(kernel, (0, 1)), strides, padding)
            else:
                of_inputs = tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
                    input_sizes=tf.shape(inputs), filter=kernel, out_backprop=upstream, strides=strides, padding=padding
                )
            if is_centred and kernel.shape[1] == 5 and inputs.shape[1] >= kernel.shape[0]:
                return of_inputs, _kernel_of_five(inputs, upstream, kernel.shape)
            return of_inputs, _kernel_of_any(inputs, upstream, kernel.shape, stride, padding)

        return tf.nn.depthwise_conv2d(inputs, kernel, strides, padding), gradients

    return convolve(inputs, kernel)


def _kernel_of_any(inputs: Any, upstream: Any, shape: Any, stride: int, padding: str) -> Any:
    """The gradient of a depthwise kernel by TensorFlow's own code, which explicit padding chooses."""
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


def _kernel_of_five(inputs: Any, upstream: Any, shape: Any) -> Any:
    """The gradient of a depthwise kernel five wide (stride 1, padding SAME) as two of kernels three wide.

    Those oneDNN has quick code for. Columns 0 to 2 are of images moved right by one pixel, columns 2 to 4 of images
    moved left. Moving costs nothing: rows are padded so that they can run into each other, and the whole batch is read
    from another pixel on.
    """
    height, width, channels = inputs.shape[1:]
    padded = tf.pad(inputs, ((0, 1), (0, 0), (1, 1), (0, 0)))  # one image more to read on into
    pixels = tf.reshape(padded, (-1, channels))
    count = tf.shape(inputs)[0] * height * (width + 2)

    def columns(first: int) -> Any:
        moved = tf.reshape(pixels[first : first + count], (-1, height, width + 2, channels))
        return tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=moved,
            filter_sizes=(shape[0], 3, *shape[2:]),
            out_backprop=tf.pad(upstream, ((0, 0), (0, 0), (0, 2), (0, 0))),
            strides=[1, 1, 1, 1],
            padding="SAME",
        )

    return tf.concat([columns(0), columns(2)[:, 1:]], axis=1)
