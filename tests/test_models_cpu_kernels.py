"""Faster CPU kernels: the same outputs, gradients, updates and variables, whatever the network and the split point."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import randomize, residual_network
from tensorflow.python.framework.config import disable_op_determinism

from flatmin import sam
from flatmin.models import classifier, cpu_kernels
from flatmin.models.classifier import TrainedLayers
from flatmin.models.cpu_kernels import optimize_for_cpu

SIZE = 64


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def of_backbone(name: str, at: str | int, policy: str = "float64") -> tuple[TrainedLayers, Any]:
    """Build a backbone's trained layers, and the activations at the split for three random images.

    Gradients are not continuous where a ReLU switches: in float32 and with small images a single ReLU that switches by
    rounding moves a layer's gradient by hundredths, as noise of 2e-6 in the original network's inputs does too. Hence
    float64.
    """
    keras.config.set_dtype_policy(policy)
    network = classifier.create(name, ["a", "b", "c", "d"], image_size=SIZE, dropout=0.2, seed=0, weights="none")
    randomize(network.base)
    frozen, layers = network.split(at)
    images = np.random.default_rng(0).uniform(0.0, 255.0, (3, SIZE, SIZE, 3)).astype(np.float32)
    activations = frozen(images, training=False)
    layers(activations)
    return layers, activations


def small(policy: str = "float64") -> tuple[TrainedLayers, Any]:
    """Make a small network all of whose layers are trained, and three random images."""
    keras.config.set_dtype_policy(policy)
    return with_head(residual_network(), (3, 12, 12, 3))


def with_head(backbone_layers: keras.Model, shape: tuple[int, ...]) -> tuple[TrainedLayers, Any]:
    head = keras.Sequential([keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4, dtype="float32")])
    layers = TrainedLayers(backbone_layers, head)
    activations = tf.constant(np.random.default_rng(0).normal(size=shape), tf.float32)
    layers(activations)
    return layers, activations


def around(build: Callable[[Any], Any]) -> tuple[TrainedLayers, Any]:
    """Make trained layers of the layers that `build` adds to a tensor [batch, 8, 8, 4], and activations for them."""
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, build(inputs))
    randomize(model)
    return with_head(model, (3, 8, 8, 4))


def loss_of(logits: Any) -> Any:
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(3), logits))


def outputs_and_gradients(layers: TrainedLayers, activations: Any) -> list[np.ndarray]:
    """Compute logits, and the gradients of a loss with respect to each trained variable and each input tensor."""
    variables = [variable.value for variable in layers.trainable_variables]

    @tf.function
    def run(activations: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(activations)
            logits = layers(activations, training=False)
            loss = loss_of(logits)
        return logits, tape.gradient(loss, [*variables, *tf.nest.flatten(activations)])

    return [each.numpy() for each in tf.nest.flatten(run(activations))]


def assert_same(received: list[np.ndarray], expected: list[np.ndarray], relative: float = 1e-6) -> None:
    """Compare the first arrays, outputs in float32, to 1e-5 of the largest, and all others by norm."""
    for index, (one, other) in enumerate(zip(received, expected, strict=True)):
        norm = np.linalg.norm(other)
        assert norm > 0
        if index:
            assert np.linalg.norm(one - other) <= relative * norm
        else:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def assert_same_variables(one: TrainedLayers, other: TrainedLayers) -> None:
    for kind in ("variables", "trainable_variables", "non_trainable_variables"):
        assert [id(each) for each in getattr(one, kind)] == [id(each) for each in getattr(other, kind)]


@pytest.mark.slow
@pytest.mark.parametrize(("fold", "depthwise"), [(True, True), (True, False), (False, True)])
def test_optimize_for_cpu_small_network_gives_the_same(fold: bool, depthwise: bool) -> None:
    layers, activations = small()
    fast = optimize_for_cpu(layers, fold_batchnorm=fold, fast_depthwise_grad=depthwise)
    assert fast is not layers
    assert_same(outputs_and_gradients(fast, activations), outputs_and_gradients(layers, activations))
    assert_same_variables(fast, layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("MobileNet025", "conv_dw_8"),
        ("EfficientNetLite0", "block5b_dwconv"),  # inside a residual block
        ("EfficientNetLite0", 0),
        ("MobileNetV2", "block_11_expand_relu"),
        ("ResNet50", "conv4_block4_3_bn"),  # later two convolutions in parallel, then their BatchNorms
        ("EfficientNetB0", "block5a_expand_conv"),
        ("MobileNetV3Small", "expanded_conv_6_expand"),
        ("DenseNet121", "conv4_block13_0_bn"),
    ],
)
def test_optimize_for_cpu_backbone_gives_the_same(name: str, at: str | int) -> None:
    layers, activations = of_backbone(name, at)
    fast = optimize_for_cpu(layers)
    assert fast is not layers
    assert_same(outputs_and_gradients(fast, activations), outputs_and_gradients(layers, activations))
    assert_same_variables(fast, layers)


@pytest.mark.slow
def test_optimize_for_cpu_bfloat16_rounds_gradients_of_pointwise_convolutions() -> None:
    layers, activations = of_backbone("EfficientNetLite0", "block6a_expand_conv", "float32")
    full = optimize_for_cpu(layers)
    assert_same([full(activations).numpy()], [layers(activations).numpy()])
    expected = outputs_and_gradients(full, activations)
    received = outputs_and_gradients(optimize_for_cpu(layers, bfloat16_grad=True), activations)
    errors = [
        np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in zip(received, expected, strict=True)
    ]
    assert errors[0] == 0  # in the forward pass it is oneDNN's mode that rounds, which is off here
    assert 2**-12 < max(errors) < 2**-4  # bfloat16 has 8 significant bits


def test_optimize_for_cpu_nothing_to_gain_returns_layers_themselves() -> None:
    layers, _ = small("mixed_bfloat16")
    assert optimize_for_cpu(layers) is layers
    head_alone = TrainedLayers(None, layers.head)
    assert optimize_for_cpu(head_alone) is head_alone


def _two_uses(x: Any) -> Any:
    made = keras.layers.Conv2D(4, 3, padding="same")(x)
    return keras.layers.BatchNormalization()(made) + made


def _activation(x: Any) -> Any:
    return keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3, activation="relu")(x))


def _shared_convolution(x: Any) -> Any:
    layer = keras.layers.Conv2D(4, 3, padding="same")
    return keras.layers.BatchNormalization()(layer(layer(x)))


def _shared_norm(x: Any) -> Any:
    norm = keras.layers.BatchNormalization()
    return norm(keras.layers.Conv2D(4, 3)(x)) + norm(keras.layers.Conv2D(4, 3)(x))


def _other_axis(x: Any) -> Any:
    return keras.layers.BatchNormalization(axis=1)(keras.layers.Conv2D(4, 3)(x))


@pytest.mark.parametrize("build", [_two_uses, _activation, _shared_convolution, _shared_norm, _other_axis])
def test_optimize_for_cpu_unfoldable_layers_are_left_alone(build: Callable[[Any], Any]) -> None:
    layers, _ = around(build)
    assert optimize_for_cpu(layers) is layers


def _bias(x: Any) -> Any:
    made = keras.layers.Conv2D(6, 3, bias_initializer="normal")(x)
    return keras.layers.BatchNormalization(center=False)(made)


def _multiplier(x: Any) -> Any:
    made = keras.layers.DepthwiseConv2D(5, depth_multiplier=2, padding="same", bias_initializer="normal")(x)
    return keras.layers.BatchNormalization(scale=False)(made)


def _groups(x: Any) -> Any:
    made = keras.layers.Conv2D(6, 3, groups=2, dilation_rate=2, use_bias=False)(x)
    return keras.layers.BatchNormalization()(made)


def _wide_with_activation(x: Any) -> Any:
    return keras.layers.DepthwiseConv2D((3, 5), activation="tanh", bias_initializer="normal")(x)


def _other_layers(x: Any) -> Any:
    x = keras.layers.SeparableConv2D(6, 3)(keras.layers.ZeroPadding2D()(x))
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(6, 3)(keras.layers.BatchNormalization()(x)))
    return keras.activations.gelu(x) * 2.0


@pytest.mark.slow
@pytest.mark.parametrize("build", [_bias, _multiplier, _groups, _wide_with_activation, _other_layers])
def test_optimize_for_cpu_each_kind_of_layer_gives_the_same(build: Callable[[Any], Any]) -> None:
    layers, activations = around(build)
    fast = optimize_for_cpu(layers)
    assert fast is not layers
    assert_same(outputs_and_gradients(fast, activations), outputs_and_gradients(layers, activations), 1e-5)


def test_optimize_for_cpu_training_mode_is_the_original() -> None:
    layers, activations = around(_bias)
    original: Any = layers.backbone_layers
    fast: Any = optimize_for_cpu(layers).backbone_layers
    norm = original.layers[-1]
    before = norm.moving_mean.numpy()
    np.testing.assert_array_equal(fast(activations, training=True), original(activations, training=True))
    assert np.abs(norm.moving_mean.numpy() - before).max() > 0


@pytest.mark.slow
def test_optimize_for_cpu_second_derivatives_are_the_same() -> None:
    layers, activations = small()

    def hessian_times_ones(layers: TrainedLayers) -> list[np.ndarray]:
        """The loss, and the Hessian times a vector of ones, variable by variable."""
        values = [variable.value for variable in layers.trainable_variables]
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                loss = loss_of(layers(activations, training=False))
            gradients = inner.gradient(loss, values)
        products = outer.gradient(gradients, values, [tf.ones_like(value) for value in values])
        return [loss.numpy(), *(each.numpy() for each in products)]

    assert_same(hessian_times_ones(optimize_for_cpu(layers)), hessian_times_ones(layers), 1e-5)


def updates(optimized: bool, rho: float) -> list[np.ndarray]:
    """Logits before a sharpness-aware step with SGD, and by how much it moves each weight of a small network."""
    keras.utils.set_random_seed(0)
    original, activations = small("float32")
    layers = optimize_for_cpu(original) if optimized else original
    logits = layers(activations).numpy()
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(layers.trainable_variables)
    step = sam.Step(sam.Settings(rho=rho), layers, optimizer)
    before = [variable.numpy() for variable in layers.trainable_variables]

    def forward(part: Any) -> tuple[Any, Any]:
        logits = layers(part, training=False)
        return loss_of(logits), logits

    tf.function(lambda: step(forward, activations)[0])()
    after = [variable.numpy() for variable in layers.trainable_variables]
    return [logits, *(one - other for one, other in zip(after, before, strict=True))]


@pytest.mark.slow
def test_optimize_for_cpu_sam_step_sees_perturbed_weights() -> None:
    expected = updates(False, rho=0.5)
    assert_same(updates(True, rho=0.5), expected, 1e-4)
    with pytest.raises(AssertionError):  # the perturbation changes far more than rounding does
        assert_same(updates(True, rho=0.0), expected, 1e-2)


@pytest.mark.slow
def test_optimize_for_cpu_deterministic_gradients_are_the_same_in_every_run() -> None:
    layers, activations = of_backbone("EfficientNetLite0", "block5b_dwconv")
    fast = optimize_for_cpu(layers)
    tf.config.experimental.enable_op_determinism()
    try:
        first, second = (outputs_and_gradients(fast, activations) for _ in range(2))
    finally:
        disable_op_determinism()
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def values_and_gradients(
    convolve: Callable[[Any, Any], Any], inputs: Any, kernel: Any, loss: Callable[[Any], Any]
) -> list[np.ndarray]:
    with tf.GradientTape() as tape:
        tape.watch([inputs, kernel])
        outputs = convolve(inputs, kernel)
        value = loss(outputs)
    return [outputs.numpy(), *(each.numpy() for each in tape.gradient(value, [inputs, kernel]))]


def test_pointwise_conv_of_integers_is_exact() -> None:
    random = np.random.default_rng(0)
    inputs, kernel, upstream = (  # integers, which bfloat16 represents exactly
        tf.constant(random.integers(-2, 3, shape), tf.float32) for shape in ((2, 3, 4, 5), (1, 1, 5, 6), (2, 3, 4, 6))
    )

    def loss(outputs: Any) -> Any:
        return tf.reduce_sum(outputs * upstream)

    received = values_and_gradients(cpu_kernels._pointwise_conv, inputs, kernel, loss)
    expected = values_and_gradients(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"), inputs, kernel, loss)
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("size", "padding"), [(4, "SAME"), *itertools.product((7, 8), ("SAME", "VALID"))])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(5, 5, 1), (3, 5, 1), (7, 7, 1), (2, 4, 1), (5, 5, 2)])  # the last: two per channel
@pytest.mark.slow
def test_depthwise_conv_wide_kernels_have_the_same_gradients(
    kernel: tuple[int, int, int], size: int, stride: int, padding: str
) -> None:
    random = np.random.default_rng(0)
    inputs = tf.constant(random.normal(size=(2, size, size + 3, 3)), tf.float32)
    weights = tf.constant(random.normal(size=(*kernel[:2], 3, kernel[2])), tf.float32)

    def loss(outputs: Any) -> Any:
        return tf.reduce_sum(tf.sin(outputs))

    def original(x: Any, w: Any) -> Any:
        return tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], padding)

    def fast(x: Any, w: Any) -> Any:
        return cpu_kernels._depthwise_conv(x, w, stride, padding)

    expected = values_and_gradients(original, inputs, weights, loss)
    assert_same(values_and_gradients(fast, inputs, weights, loss), expected, 1e-5)


@pytest.mark.parametrize("shape", [(1, 5, 3, 2), (1, 6, 1, 1), (2, 9, 5, 3)])
def test_kernel_gradient_5_wide_small_and_narrow_images_equals_the_general_one(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    inputs, upstream = (tf.constant(random.normal(size=shape)) for _ in range(2))
    kernel = (5, 5, shape[3], 1)
    expected = cpu_kernels._kernel_gradient(inputs, upstream, kernel, 1, "SAME").numpy()
    received = cpu_kernels._kernel_gradient_5_wide(inputs, upstream, kernel)
    np.testing.assert_allclose(received, expected, rtol=1e-12, atol=1e-12)
