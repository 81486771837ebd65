"""Which images an epoch draws, and how much each class weighs."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from flatmin.inputs import sampling

LABELS = np.repeat([0, 1, 2, 4], [400, 20, 80, 3])


def draw(kind: str, seed: int = 0) -> np.ndarray:
    return sampling.draw(LABELS, kind, np.random.default_rng(seed))  # type: ignore[arg-type]


def test_draw_none_takes_each_image_once_in_the_order_that_it_always_was() -> None:
    assert (draw("none", 5) == np.random.default_rng(5).permutation(len(LABELS))).all()


@pytest.mark.parametrize("seed", range(5))
def test_draw_balanced_takes_each_class_equally_often_and_as_many_images(seed: int) -> None:
    drawn = draw("balanced", seed)
    assert len(drawn) == len(LABELS)
    sizes = np.bincount(LABELS[drawn], minlength=5)
    assert sizes[3] == 0, "a class without images"
    assert set(sizes[[0, 1, 2, 4]]) == {125, 126}
    times = np.bincount(drawn, minlength=len(LABELS))
    assert times[LABELS == 0].max() == 1
    for label in (1, 2, 4):
        assert np.ptp(times[label == LABELS]) <= 1, "an image twice more often than another"
    first = LABELS[drawn[: len(drawn) // 2]]
    assert np.bincount(first)[[0, 1, 2, 4]].min() > 40, "in an order by class"


def test_draw_balanced_takes_other_images_of_a_frequent_class_in_another_epoch() -> None:
    first, second = (set(draw("balanced", seed)[LABELS[draw("balanced", seed)] == 0]) for seed in (0, 1))
    assert 0 < len(first & second) < len(first)


def test_class_weights_are_scikit_learns_with_mean_one_over_images() -> None:
    labels = np.repeat([0, 1, 2], [400, 20, 80])
    weights = sampling.class_weights(labels, 3, "balanced")
    assert weights is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert weights == pytest.approx(expected)
    assert weights[labels].mean() == pytest.approx(1)
    assert sampling.class_weights(labels, 3, "none") is None
