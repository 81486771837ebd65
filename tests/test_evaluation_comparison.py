"""The difference between two classifiers against closed forms, plain references and simulated studies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from flatmin.evaluation.comparison import crossed_difference, difference, interval, mean_squares

TRUTH = 0.005  # the true difference in accuracy of simulated studies
DISCORDANCE = 0.08  # share of the images that one classifier alone predicts correctly


def answers(gained: int, lost: int, both: int = 0, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whether two models are right, for the given numbers of images of each kind."""
    first = np.repeat([True, False, True, False], [gained, lost, both, neither])
    second = np.repeat([False, True, True, False], [gained, lost, both, neither])
    order = np.random.default_rng(0).permutation(len(first))
    return first[order], second[order]


@pytest.mark.parametrize(("both", "neither"), [(20, 0), (0, 20), (13, 7)])
def test_difference_of_equal_answers_is_within_three_images(both: int, neither: int) -> None:
    received = difference(*answers(0, 0, both, neither))
    assert received == {"accuracy": 0.0, "low": -3 / 20, "high": 3 / 20, "p_value": 1.0}


def test_difference_with_everything_gained_is_at_most_one() -> None:
    received = difference(*answers(10, 0))
    assert received == {"accuracy": 1.0, "low": 0.7, "high": 1.0, "p_value": pytest.approx(2 * 0.5**10)}


def test_difference_of_one_image_is_any() -> None:
    received = difference(*answers(1, 0))
    assert received == {"accuracy": 1.0, "low": -1.0, "high": 1.0, "p_value": 1.0}


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (1, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (9, 1, 2 * (1 + 10) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_difference_p_value_is_mcnemars_by_hand(gained: int, lost: int, p_value: float) -> None:
    received = difference(*answers(gained, lost, 30, 10))
    assert received["p_value"] == pytest.approx(p_value)
    assert received["accuracy"] == pytest.approx((gained - lost) / (gained + lost + 40))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_difference_p_value_is_the_binomial_tests(gained: int, lost: int, both: int) -> None:
    received = difference(*answers(gained, lost, both))
    tails = min(1.0, 2 * scipy.stats.binom.cdf(min(gained, lost), gained + lost, 0.5)) if gained + lost else 1.0
    assert received["p_value"] == pytest.approx(tails)
    assert 0 <= received["p_value"] <= 1
    assert received["low"] <= received["high"]
    first, second = answers(gained, lost, both)
    reversed_ = difference(second, first)
    assert reversed_["accuracy"] == -received["accuracy"]
    assert reversed_["p_value"] == pytest.approx(received["p_value"])


def test_difference_interval_is_the_paired_bootstrap_over_images() -> None:
    first, second = answers(40, 22, 110, 28)
    received = difference(first, second)
    gains = first.astype(int) - second.astype(int)
    drawn = np.random.default_rng(2).integers(0, len(gains), (20_000, len(gains)))
    low, high = np.quantile(gains[drawn].mean(axis=1), [0.025, 0.975])
    # One image is 0.005; quantiles of so many resamples wander by less than that.
    assert received["low"] == pytest.approx(low, abs=0.0051)
    assert received["high"] == pytest.approx(high, abs=0.0051)
    deviation = gains.std() / math.sqrt(len(gains))
    assert received["high"] - received["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_mean_squares_are_those_of_plain_sums() -> None:
    gains = np.random.default_rng(0).integers(-1, 2, (4, 30)).astype(np.int8)
    of_seed, of_image, mean = gains.mean(axis=1), gains.mean(axis=0), gains.mean()
    received = mean_squares(gains)
    assert received.seeds == pytest.approx(sum(30 * (value - mean) ** 2 for value in of_seed) / 3)
    assert received.images == pytest.approx(sum(4 * (value - mean) ** 2 for value in of_image) / 29)
    rest = sum((gains[s, i] - of_seed[s] - of_image[i] + mean) ** 2 for s in range(4) for i in range(30))
    assert received.rest == pytest.approx(rest / (3 * 29))


def test_mean_squares_find_the_components_that_gains_were_made_with() -> None:
    # Seeds, images and the rest of variances 1 / 64, 1 / 4 and 1 / 16, times 100 as gains are integers.
    random = np.random.default_rng(0)
    parts = [sd * random.standard_normal(shape) for sd, shape in ((12.5, (400, 1)), (50, (1, 500)), (25, (400, 500)))]
    gains = np.rint(sum(parts))
    squares = mean_squares(gains)
    assert squares.images == pytest.approx(400 * 50**2 + 25**2, rel=0.1)
    assert squares.seeds == pytest.approx(500 * 12.5**2 + 25**2, rel=0.1)


def test_crossed_difference_of_one_seed_is_the_paired_one_over_images() -> None:
    first, second = answers(12, 7, 30, 20)
    alone = difference(first, second)
    del alone["p_value"]
    assert crossed_difference(first[None], second[None]) == {**alone, "covers": "images"}


def test_crossed_difference_of_equal_seeds_is_students_over_images() -> None:
    first, second = answers(40, 22, 110, 28)
    received = crossed_difference(np.stack([first] * 3), np.stack([second] * 3))
    gains = first.astype(int) - second.astype(int)
    low, high = scipy.stats.t.interval(0.95, 199, gains.mean(), scipy.stats.sem(gains))
    assert received == {
        "accuracy": pytest.approx(gains.mean()),
        "low": pytest.approx(low),
        "high": pytest.approx(high),
        "covers": "seeds and images",
    }


def test_crossed_difference_of_equal_images_is_students_over_seeds() -> None:
    gains = np.array([1, 0, 0, 0, 0, 0, 0, 1])
    first = np.repeat(gains[:, None] == 1, 1000, axis=1)
    received = crossed_difference(first, np.zeros_like(first))
    low, high = scipy.stats.t.interval(0.95, 7, gains.mean(), scipy.stats.sem(gains))
    assert (received["accuracy"], received["low"], received["high"]) == pytest.approx((0.25, low, high))


def test_crossed_difference_of_another_level_has_its_quantile() -> None:
    first = np.repeat(np.arange(8)[:, None] < 5, 100, axis=1)
    received = crossed_difference(first, np.zeros_like(first), level=0.99)
    gains = first[:, 0].astype(float)
    low, high = scipy.stats.t.interval(0.99, 7, gains.mean(), scipy.stats.sem(gains))
    assert (received["low"], received["high"]) == pytest.approx((low, min(1, high)))
    none = crossed_difference(first[:1], first[:1], level=0.99)
    assert none["high"] == -none["low"] == pytest.approx(math.log(100) / 100), "the rule of three, of 99 %"


def test_crossed_difference_by_hand_weighs_both_quantiles() -> None:
    # Two seeds, four images: mean squares 1/8, 11/24 and 1/8.
    gains = np.array([[1, 1, 0, 0], [1, 0, 0, 0]])
    assert mean_squares(gains) == pytest.approx((1 / 8, 11 / 24, 1 / 8))
    received = crossed_difference(gains == 1, np.zeros((2, 4), bool))
    quantile_seeds, quantile_images = scipy.stats.t.ppf(0.975, [1, 3])
    half_width = (quantile_seeds / 8 + quantile_images / 3) / (1 / 8 + 1 / 3) * math.sqrt((1 / 8 + 1 / 3) / 8)
    assert received["accuracy"] == 3 / 8
    assert interval(gains)[1] == pytest.approx(half_width)
    assert (received["low"], received["high"]) == (-1, 1)  # it is wider than any difference


@pytest.mark.parametrize("seeds", [2, 3])
def test_crossed_difference_without_a_difference_is_within_three_images(seeds: int) -> None:
    first = np.random.default_rng(0).random((seeds, 50)) < 0.5
    received = crossed_difference(first, first)
    assert received == {"accuracy": 0.0, "low": -3 / 50, "high": 3 / 50, "covers": "seeds and images"}
    received = crossed_difference(np.ones((seeds, 50), bool), np.zeros((seeds, 50), bool))
    assert received == {"accuracy": 1.0, "low": 1 - 3 / 50, "high": 1.0, "covers": "seeds and images"}


def test_crossed_difference_of_one_image_is_any() -> None:
    received = crossed_difference(np.array([[True], [True], [False]]), np.zeros((3, 1), bool))
    assert received == {"accuracy": pytest.approx(2 / 3), "low": -1.0, "high": 1.0, "covers": "seeds and images"}


@given(st.integers(1, 4), st.integers(1, 8), st.data())
def test_crossed_difference_is_finite_and_changes_sign_with_the_order(
    seeds: int, images: int, data: st.DataObject
) -> None:
    first, second = (data.draw(arrays.arrays(bool, (seeds, images))) for _ in range(2))
    received, reversed_ = crossed_difference(first, second), crossed_difference(second, first)
    assert -1 <= received["low"] <= received["accuracy"] <= received["high"] <= 1
    assert reversed_["accuracy"] == pytest.approx(-received["accuracy"])
    if seeds > 1:
        assert (reversed_["low"], reversed_["high"]) == pytest.approx((-received["high"], -received["low"]))


def test_interval_of_many_studies_is_that_of_each() -> None:
    studies = np.random.default_rng(0).integers(-1, 2, (5, 3, 40)).astype(np.int8)
    received = np.stack(interval(studies), axis=1)
    np.testing.assert_allclose(received, [interval(study) for study in studies])


def simulate(seeds: int, images: int, deviation: float, correlation: float, studies: int) -> Iterator[np.ndarray]:
    """Yield gains in parts: int8 [part, seeds, images], 1 or -1 where one classifier alone is right.

    deviation: the standard deviation over seeds of the true difference. correlation: of an image's gains with two
    seeds. A gain is read off a number in [0, 1), at thresholds that move with the seed; the number is the image's own
    or new for this seed, such that gains with two seeds of the same thresholds have the correlation.
    """
    random = np.random.default_rng([seeds, images, round(1e4 * deviation), round(100 * correlation)])
    part = max(1, 2_000_000 // (seeds * images))
    for start in range(0, studies, part):
        count = min(part, studies - start)
        shape = (count, seeds, images)
        means = np.clip(TRUTH + deviation * random.standard_normal((count, seeds, 1)), -DISCORDANCE, DISCORDANCE)
        shared = random.random(shape, np.float32) < correlation**0.5
        own = random.random((count, 1, images), np.float32)
        place = np.where(shared, own, random.random(shape, np.float32))
        yield (place < (DISCORDANCE + means) / 2).astype(np.int8) - (place >= 1 - (DISCORDANCE - means) / 2)


@pytest.mark.slow
def test_interval_covers_the_truth_in_simulated_studies() -> None:
    covered = {}
    for setting in itertools.product((3, 5), (360, 1078, 10_000), (0.0, 0.003, 0.01), (0.3, 0.7)):
        inside = []
        for gains in simulate(*setting, studies=200 if setting[1] == 10_000 else 500):
            mean, half_width = interval(gains)
            inside += [*(np.abs(mean - TRUTH) <= half_width)]
        covered[setting] = np.mean(inside)
    assert min(covered.values()) >= 0.92, covered
    assert 0.94 <= np.mean([*covered.values()]) <= 0.98, covered


def test_simulated_gains_have_the_mean_deviation_and_correlation_of_their_setting() -> None:
    gains = np.concatenate(list(simulate(2, 10_000, 0.003, 0.3, studies=200)))
    assert gains.shape == (200, 2, 10_000)
    of_seeds = gains.mean(axis=2)
    assert of_seeds.mean() == pytest.approx(TRUTH, abs=0.002)
    # Over seeds, and what images add to it.
    assert of_seeds.std() == pytest.approx((0.003**2 + 0.08 / 10_000) ** 0.5, rel=0.1)
    assert (gains != 0).mean() == pytest.approx(DISCORDANCE, rel=0.01)
    centred = gains - of_seeds[..., None]
    assert (centred[:, 0] * centred[:, 1]).mean() / (centred**2).mean() == pytest.approx(0.3, abs=0.02)
