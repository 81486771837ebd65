"""A training step against closed forms, and the count of its gradient evaluations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from trainings import Points, point_recipe, point_step

from flatmin.common.errors import InputError
from flatmin.common.params import Sam
from flatmin.sam.methods import METHODS
from flatmin.training.step import Sums, TrainStep, pad_empty_shard


def run_epochs(step: TrainStep, epochs: int = 1) -> np.ndarray:
    """Run whole epochs; the sums of each step."""
    sums = []
    for number in range(epochs):
        epoch = step.source.epoch(number, step.strategy)
        batches = iter(epoch)
        sums += [step(batches) for _ in range(len(epoch))]
    return np.array(sums)


def weights(step: TrainStep) -> list[np.ndarray]:
    return [np.array(variable) for variable in step.variables]


def test_train_step_plain_is_the_gradient_step_of_the_smoothed_loss_with_regularisation() -> None:
    recipe = point_recipe(optimizer="sgd", learning_rate=0.1, label_smoothing=0.2, batch_size=5)
    step, points = point_step(recipe, count=5)
    layers = points.layers
    layers.head.layers[1].rate = 0.0
    inputs, labels = next(iter(points.epoch(0, step.strategy)))
    kernel, bias, kernel_2, bias_2 = (tf.constant(variable.numpy()) for variable in layers.trainable_variables)
    with tf.GradientTape() as tape:
        tape.watch([kernel, bias, kernel_2, bias_2])
        logits = tf.nn.relu(inputs @ kernel + bias) @ kernel_2 + bias_2
        smoothed = 0.8 * tf.one_hot(labels, 3) + 0.2 / 3
        losses = -tf.reduce_sum(smoothed * tf.nn.log_softmax(logits), axis=1)
        loss = tf.reduce_mean(losses) + 0.01 * tf.reduce_sum(kernel**2)
    expected = [
        value - 0.1 * gradient
        for value, gradient in zip(
            (kernel, bias, kernel_2, bias_2), tape.gradient(loss, [kernel, bias, kernel_2, bias_2]), strict=True
        )
    ]
    ((total, correct, count, *wrong),) = run_epochs(step)
    assert total == pytest.approx(5 * float(loss), rel=1e-5)
    assert correct == np.sum(np.argmax(logits, axis=1) == labels.numpy())
    assert count == 5
    assert wrong == [0, 0]
    for variable, value in zip(layers.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", *METHODS])
def test_train_step_with_class_weights_is_that_of_images_that_are_there_more_often(method: str) -> None:
    """An image of weight 2 counts as two: in both passes of each method, and in the loss that is reported."""
    recipe = point_recipe(optimizer="sgd", learning_rate=0.1, batch_size=50, label_smoothing=0.1)
    sam = None if method == "plain" else Sam(method=method, rho=0.3)
    (twice, points), (plain, _) = (point_step(recipe, sam, count=12) for _ in range(2))
    own = points._labels[:12]
    doubled = np.repeat(np.arange(12), np.where(own == 1, 2, 1))
    assert 12 < len(doubled) < 24
    repeat(points, doubled)
    weighted, others = point_step(recipe, sam, count=12, weights=np.array([1, 2, 1], np.float32) * 12 / len(doubled))
    for layers in (points.layers, others.layers):
        layers.head.layers[1].rate = 0.0
    expected, received, other = (run_epochs(step, 3) for step in (twice, weighted, plain))
    np.testing.assert_allclose(received[:, 0] / 12, expected[:, 0] / len(doubled), rtol=1e-5)
    for one, two in zip(points.layers.trainable_variables, others.layers.trainable_variables, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)
    assert not np.allclose(received[:, 0], other[:, 0], rtol=1e-3)
    assert (received[:, 2] == 12).all()


def repeat(points: Points, examples: np.ndarray) -> None:
    """Let the points' train examples be these, of what they are."""
    points._inputs = np.concatenate([points._inputs[examples], points._inputs[points._count :]])
    points._labels = np.concatenate([points._labels[examples], points._labels[points._count :]])
    points._count = len(examples)


@pytest.mark.parametrize("sam", [None, Sam(num_batch_splits=2)], ids=["plain", "sam in parts"])
def test_train_step_with_wrong_labels_counts_them_and_trains_on_them_as_on_any(sam: Sam | None) -> None:
    recipe = point_recipe(batch_size=5, learning_rate=1e-9)  # so that predictions stay
    (clean, points), (coded, others) = (point_step(recipe, sam, count=12) for _ in range(2))
    wrong = [1, 2, 4, 7, 8, 11]
    others._labels[wrong] += 3
    for layers in (points.layers, others.layers):
        layers.head.layers[1].rate = 0.0
    predicted = np.argmax(points.layers(points._inputs[:12], training=False), axis=1)
    right = predicted == points._labels[:12]
    assert 0 < right[wrong].sum() < right.sum() < 12
    expected, received = run_epochs(clean), run_epochs(coded)
    np.testing.assert_array_equal(received[:, :3], expected[:, :3])
    assert received.shape == (3, Sums.SIZE)
    assert received.sum(0)[1:].tolist() == [right.sum(), 12, right[wrong].sum(), len(wrong)]
    assert expected.sum(0)[3:].tolist() == [0, 0]
    for one, other in zip(weights(clean), weights(coded), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("totals", "expected"),
    [
        ([6, 3, 4, 0, 0], {"loss": 1.5, "accuracy": 0.75}),
        ([6, 3, 4, 3, 4], {"loss": 1.5, "accuracy": 0.75}),  # all are wrong
        ([5, 6, 10, 1, 4], {"loss": 0.5, "accuracy": 0.6, "accuracy_clean": 5 / 6, "accuracy_wrong": 0.25}),
    ],
    ids=["none wrong", "all wrong", "some wrong"],
)
def test_sums_means_of_clean_and_wrong_labels_where_there_are_both(
    totals: list[int], expected: dict[str, float]
) -> None:
    assert Sums(np.array(totals, np.float64)).means() == expected


@pytest.mark.slow
def test_train_step_of_sam_without_a_radius_is_the_plain_one_bit_for_bit() -> None:
    recipe = point_recipe(ema=0.7)
    plain, zero, perturbed = (point_step(recipe, sam)[0] for sam in (None, Sam(rho=0.0), Sam(rho=0.5)))
    np.testing.assert_array_equal(run_epochs(plain, 2), run_epochs(zero, 2))
    kept, same = ([*step.layers.variables, *step.optimizer.variables] for step in (plain, zero))
    for one, other in zip(kept, same, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))
    assert plain.rule.gradient_evaluations == zero.rule.gradient_evaluations
    run_epochs(perturbed, 2)
    pairs = zip(plain.layers.trainable_variables, perturbed.layers.trainable_variables, strict=True)
    assert any(np.any(np.array(one) != np.array(other)) for one, other in pairs)
    assert perturbed.rule.gradient_evaluations == 2 * plain.rule.gradient_evaluations


@pytest.mark.parametrize(
    ("sam", "expected"),
    [
        (None, 20),
        (Sam(), 40),
        (Sam(every=2), 20 + 4 + 2 + 4),  # of the batches of 4, 4, 2, 4, 4 and 2
        (Sam(accumulate=2, every=2), 20 + 4 + 4 + 4 + 2),
        (Sam(rho=0.0), 20),
        (Sam(method="gsam", rho_min=0.0, rho_max=0.0), 20),
    ],
    ids=["plain", "sam", "every", "accumulate and every", "rho 0", "gsam rho 0"],
)
@pytest.mark.slow
def test_gradient_evaluations_after_two_epochs_count_each_image_in_each_pass(sam: Sam | None, expected: int) -> None:
    step, _ = point_step(point_recipe(), sam, count=10)
    run_epochs(step, 2)
    assert step.rule.gradient_evaluations == expected


def test_train_step_that_accumulates_more_batches_than_there_are_is_refused() -> None:
    recipe = point_recipe(epochs=3)  # of four batches
    point_step(recipe, Sam(accumulate=12))
    with pytest.raises(InputError, match=r"sam.accumulate: expected at most 12, the batches of all.*received 13"):
        point_step(recipe, Sam(accumulate=13))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pad_empty_shard_adds_a_black_image_without_a_label_to_none(count: int) -> None:
    inputs: Any = (tf.ones((count, 2, 2), tf.float16), tf.ones((count, 3)))
    padded, labels = pad_empty_shard(inputs, tf.ones(count, tf.int32))
    expected = [-1] if count == 0 else [1] * count
    assert labels.numpy().tolist() == expected
    for tensor, given in zip(padded, inputs, strict=True):
        assert tensor.dtype == given.dtype
        np.testing.assert_array_equal(tensor, np.full((len(expected), *given.shape[1:]), int(count > 0)))
