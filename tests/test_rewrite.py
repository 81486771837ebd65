"""The quicker tail: the plain one's outputs, gradients, updates and variables, whatever the network and the cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework.config import disable_op_determinism

from flatmin import sam
from flatmin.models import classifier, cpu_kernels
from flatmin.models.classifier import Tail

SIZE = 64


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


def scatter(model: keras.Model, random: np.random.Generator) -> None:
    """Weights that keep activations and gradients in bounds; every BatchNorm with values other than 0 and 1."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D):
            each_output_sees = layer.kernel.shape[: 3 if isinstance(layer, keras.layers.Conv2D) else 2]
            layer.kernel.assign(random.normal(0.0, np.sqrt(2 / np.prod(each_output_sees)), layer.kernel.shape))
        if isinstance(layer, keras.layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(random.normal(0.0, 0.1, shape))
            layer.moving_variance.assign(random.uniform(0.5, 1.5, shape))
            if layer.scale:
                layer.gamma.assign(random.uniform(0.5, 1.5, shape))
            if layer.center:
                layer.beta.assign(random.normal(0.0, 0.1, shape))


def tail_of(name: str, at: str | int, policy: str = "float64") -> tuple[Tail, Any]:
    """A built tail, and what its trunk makes of three random images.

    Gradients are not continuous where a ReLU switches: in float32 and small images one that switches on rounding moves
    a layer's gradient by hundredths, as noise of 2e-6 in the plain network's inputs does too.
    """
    keras.config.set_dtype_policy(policy)
    random = np.random.default_rng(0)
    network = classifier.create(name, ["a", "b", "c", "d"], SIZE, 0.2, 0, "none")
    scatter(network.base, random)
    trunk, tail = network.cut(at)
    boundary = trunk(random.uniform(0.0, 255.0, (3, SIZE, SIZE, 3)).astype(np.float32), training=False)
    tail(boundary)
    return tail, boundary


def outputs_and_gradients(tail: Tail, boundary: Any) -> list[np.ndarray]:
    """Logits, and the gradients of a loss to each trained variable and each boundary tensor."""
    variables = [variable.value for variable in tail.trainable_variables]

    @tf.function
    def run(boundary: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(boundary)
            logits = tail(boundary, training=False)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(3), logits))
        return logits, tape.gradient(loss, [*variables, *tf.nest.flatten(boundary)])

    return [each.numpy() for each in tf.nest.flatten(run(boundary))]


def assert_same(received: list[np.ndarray], expected: list[np.ndarray], relative: float = 1e-6) -> None:
    """Compare the first array, an output in float32, to 1e-5 of its largest, and what is behind it by norm."""
    for index, (one, other) in enumerate(zip(received, expected, strict=True)):
        norm = np.linalg.norm(other)
        assert norm > 0
        if index:
            assert np.linalg.norm(one - other) <= relative * norm
        else:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_a_tail_in_float32_gives_the_same_outputs() -> None:
    tail, boundary = tail_of("EfficientNetLite0", "block5b_dwconv", "float32")
    assert len(boundary) == 2  # this cut, of the next test too, is inside a residual block
    fast = cpu_kernels.faster(tail)
    assert fast is not tail
    assert_same([fast(boundary).numpy()], [tail(boundary).numpy()])


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("MobileNet025", "conv_dw_8"),
        ("EfficientNetLite0", "block5b_dwconv"),
        pytest.param("MobileNetV2", "block_11_expand_relu", marks=pytest.mark.slow),
        pytest.param("EfficientNetLite0", 0, marks=pytest.mark.slow),
        pytest.param("ResNet50", "conv4_block4_3_bn", marks=pytest.mark.slow),
        pytest.param("EfficientNetB0", "block5a_expand_conv", marks=pytest.mark.slow),
        pytest.param("MobileNetV3Small", "expanded_conv_6_expand", marks=pytest.mark.slow),
        pytest.param("DenseNet121", "conv4_block13_0_bn", marks=pytest.mark.slow),
    ],
)
def test_networks_give_the_same(name: str, at: str | int) -> None:
    tail, boundary = tail_of(name, at)
    fast = cpu_kernels.faster(tail)
    assert fast is not tail
    assert_same(outputs_and_gradients(fast, boundary), outputs_and_gradients(tail, boundary))


@pytest.mark.parametrize(("fold", "depthwise"), [(True, False), (False, True)])
def test_each_part_gives_the_same_alone(fold: bool, depthwise: bool) -> None:
    tail, boundary = tail_of("EfficientNetLite0", "block6a_expand_conv")
    fast = cpu_kernels.faster(tail, fold=fold, depthwise=depthwise)
    assert fast is not tail
    assert_same(outputs_and_gradients(fast, boundary), outputs_and_gradients(tail, boundary))


def test_half_precision_rounds_what_one_pixel_is_multiplied_with() -> None:
    tail, boundary = tail_of("EfficientNetLite0", "block6a_expand_conv", "float32")
    plain = cpu_kernels.faster(tail)
    expected = outputs_and_gradients(plain, boundary)
    received = outputs_and_gradients(cpu_kernels.faster(tail, half=True), boundary)
    away = [np.linalg.norm(one - other) / np.linalg.norm(other) for one, other in zip(received, expected, strict=True)]
    assert away[0] == 0  # forward it is oneDNN's mode that rounds, which is not on here
    assert 2**-12 < max(away) < 2**-4  # bfloat16 rounds to 8 bits


def test_variables_are_the_same_in_the_same_order() -> None:
    tail, boundary = tail_of("ResNet50", "conv5_block1_1_conv")  # convolutions beside each other, then BatchNorms
    fast = cpu_kernels.faster(tail)
    fast(boundary)
    for kind in ("variables", "trainable_variables", "non_trainable_variables"):
        assert [id(each) for each in getattr(fast, kind)] == [id(each) for each in getattr(tail, kind)]


def test_nothing_to_gain_leaves_the_tail_as_it_is() -> None:
    tail, _ = tail_of("MobileNet025", "conv_dw_8", "mixed_bfloat16")
    assert cpu_kernels.faster(tail) is tail
    linear = Tail(None, tail.head)
    assert cpu_kernels.faster(linear) is linear


def whole(build: Callable[[Any], Any]) -> tuple[Tail, Any]:
    """A tail around what `build` makes of a tensor [batch, 8, 8, 4]."""
    inputs = keras.Input((8, 8, 4))
    body = keras.Model(inputs, build(inputs))
    random = np.random.default_rng(0)
    scatter(body, random)
    head = keras.Sequential([keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)])
    tail = Tail(body, head)
    boundary = tf.constant(random.normal(size=(3, 8, 8, 4)), tf.float32)
    tail(boundary)
    return tail, boundary


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
def test_what_must_not_be_folded_is_not(build: Callable[[Any], Any]) -> None:
    tail, _ = whole(build)
    assert cpu_kernels.faster(tail) is tail


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


def test_a_product_of_bfloat16_matrices_convolves() -> None:
    random = np.random.default_rng(0)
    inputs, kernel, upstream = (  # integers, which bfloat16 holds exactly
        tf.constant(random.integers(-2, 3, shape), tf.float32) for shape in ((2, 3, 4, 5), (1, 1, 5, 6), (2, 3, 4, 6))
    )

    def run(convolve: Callable[[Any, Any], Any]) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            tape.watch([inputs, kernel])
            outputs = convolve(inputs, kernel)
        return [each.numpy() for each in (outputs, *tape.gradient(outputs, [inputs, kernel], upstream))]

    for one, other in zip(run(cpu_kernels._pointwise), run(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME")), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("build", [_bias, _multiplier, _groups, _wide_with_activation, _other_layers])
def test_kinds_of_layers_give_the_same(build: Callable[[Any], Any]) -> None:
    tail, boundary = whole(build)
    fast = cpu_kernels.faster(tail)
    assert fast is not tail
    assert_same(outputs_and_gradients(fast, boundary), outputs_and_gradients(tail, boundary), 1e-5)


@pytest.mark.parametrize(("size", "padding"), [(4, "same"), *itertools.product((7, 8), ("same", "valid"))])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(5, 5, 1), (3, 5, 1), (7, 7, 1), (2, 4, 1), (5, 5, 2)])  # two: of each channel
def test_gradients_of_wide_depthwise_kernels(
    kernel: tuple[int, int, int], size: int, stride: int, padding: str
) -> None:
    random = np.random.default_rng(0)
    inputs = tf.constant(random.normal(size=(2, size, size + 3, 3)), tf.float32)
    weights = tf.constant(random.normal(size=(*kernel[:2], 3, kernel[2])), tf.float32)

    def run(convolve: Callable[[Any, Any], Any]) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            tape.watch([inputs, weights])
            outputs = convolve(inputs, weights)
            loss = tf.reduce_sum(tf.sin(outputs))
        return [outputs.numpy(), *(each.numpy() for each in tape.gradient(loss, [inputs, weights]))]

    expected = run(lambda x, w: tf.nn.depthwise_conv2d(x, w, [1, stride, stride, 1], padding.upper()))
    assert_same(run(lambda x, w: cpu_kernels._depthwise(x, w, stride, padding.upper())), expected, 1e-5)


@pytest.mark.parametrize("shape", [(1, 5, 3, 2), (1, 6, 1, 1), (2, 9, 5, 3)])
def test_the_gradient_of_a_kernel_of_five_in_small_and_narrow_images(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    inputs, upstream = (tf.constant(random.normal(size=shape)) for _ in range(2))
    kernel = (5, 5, shape[3], 1)
    expected = cpu_kernels._kernel_of_any(inputs, upstream, kernel, 1, "SAME").numpy()
    np.testing.assert_allclose(cpu_kernels._kernel_of_five(inputs, upstream, kernel), expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_the_same() -> None:
    tail, boundary = tail_of("EfficientNetLite0", "block5b_expand_conv")

    def product(tail: Tail) -> list[np.ndarray]:
        """The Hessian times the vector of ones, variable by variable."""
        values = [variable.value for variable in tail.trainable_variables]
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                logits = tail(boundary, training=False)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(3), logits))
            gradients = inner.gradient(loss, values)
        found = outer.gradient(gradients, values, [tf.ones_like(value) for value in values])
        return [loss.numpy(), *(each.numpy() for each in found)]

    assert_same(product(cpu_kernels.faster(tail)), product(tail), 1e-5)


def updates(rewritten: bool, settings: sam.Settings) -> list[np.ndarray]:
    """Logits before a step of SGD, and how far it moves each weight of a tail."""
    keras.utils.set_random_seed(0)
    plain, boundary = tail_of("EfficientNetLite0", "block6c_expand_conv", "float32")
    tail = cpu_kernels.faster(plain) if rewritten else plain
    logits = tail(boundary).numpy()
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(tail.trainable_variables)
    step = sam.Step(settings, tail, optimizer)
    before = [variable.numpy() for variable in tail.trainable_variables]

    def forward(part: Any) -> tuple[Any, Any]:
        logits = tail(part, training=False)
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(3), logits)), logits

    tf.function(lambda: step(forward, boundary)[0])()
    after = [variable.numpy() for variable in tail.trainable_variables]
    return [logits, *(one - other for one, other in zip(after, before, strict=True))]


@pytest.mark.slow
def test_a_sharpness_aware_step_sees_perturbed_weights() -> None:
    sharp = updates(False, sam.Settings(rho=0.5))
    assert_same(updates(True, sam.Settings(rho=0.5)), sharp, 3e-2)
    with pytest.raises(AssertionError):  # the perturbation matters far more than rounding does
        assert_same(updates(True, sam.Settings(rho=0.0)), sharp, 3e-2)


@pytest.mark.slow
def test_gradients_are_the_same_in_every_run() -> None:
    tail, boundary = tail_of("EfficientNetLite0", "block3a_expand_conv")
    fast = cpu_kernels.faster(tail)
    tf.config.experimental.enable_op_determinism()
    try:
        first, second = (outputs_and_gradients(fast, boundary) for _ in range(2))
    finally:
        disable_op_determinism()
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_mode_is_the_plain_one() -> None:
    tail, boundary = whole(_bias)
    body: Any = tail.body
    fast: Any = cpu_kernels.faster(tail).body
    norm = body.layers[-1]
    before = norm.moving_mean.numpy()
    np.testing.assert_array_equal(fast(boundary, training=True), body(boundary, training=True))
    assert np.abs(norm.moving_mean.numpy() - before).max() > 0
