"""The smallest difference that a number of images shows, against McNemar's test itself."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from flatmin import power
from flatmin.power import smallest_difference


def simulated_power(images: int, discordance: float, difference: float, studies: int) -> float:
    """The share of simulated studies of two classifiers in which McNemar's p-value is at most 0.05."""
    random = np.random.default_rng(0)
    discordant = random.binomial(images, discordance, studies)
    gained = random.binomial(discordant, (1 + difference / discordance) / 2)
    pairs, counts = np.unique(np.stack([gained, discordant]), axis=1, return_counts=True)
    significant = [binomtest(int(b), int(n)).pvalue <= 0.05 if n else False for b, n in pairs.T]
    return float(counts @ significant / studies)


def enumerated_power(images: int, discordance: float, difference: float, level: float) -> float:
    """The probability that McNemar's p-value is at most `level`, summed over every outcome of a study."""
    gained = (1 + difference / discordance) / 2
    return sum(
        float(binom.pmf(n, images, discordance) * binom.pmf(b, n, gained))
        for n in range(1, images + 1)
        for b in range(n + 1)
        if binomtest(b, n).pvalue <= level
    )


@pytest.mark.parametrize(("images", "discordance"), [(360, 0.05), (1078, 0.05), (720, 0.1)])
def test_smallest_difference_has_the_power_in_simulated_studies(images: int, discordance: float) -> None:
    smallest = smallest_difference(images, discordance)
    assert smallest is not None
    # The standard error of 20,000 studies is 0.003.
    assert simulated_power(images, discordance, smallest, 20_000) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("images", "discordance", "wanted", "level"), [(40, 0.5, 0.8, 0.05), (25, 1.0, 0.9, 0.01), (45, 0.25, 0.5, 0.1)]
)
def test_smallest_difference_has_the_power_of_all_outcomes(
    images: int, discordance: float, wanted: float, level: float
) -> None:
    smallest = smallest_difference(images, discordance, wanted, level)
    assert smallest is not None
    assert enumerated_power(images, discordance, smallest, level) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("images", "points"), [(360, 3.37), (1078, 1.96), (4000, 1.01), (10_000, 0.64)])
def test_smallest_difference_is_known(images: int, points: float) -> None:
    assert smallest_difference(images) == pytest.approx(points / 100, abs=6e-5)


def test_smallest_difference_of_a_million_images_is_that_of_the_normal_approximation() -> None:
    # (z_0.975 + z_0.8) times the standard error, which is sqrt(discordance / images) where the difference is small.
    assert smallest_difference(10**6) == pytest.approx((1.95996 + 0.84162) * (0.05 / 10**6) ** 0.5, rel=0.01)


def test_smallest_difference_of_too_few_images_is_none() -> None:
    # Five discordant images, all gained, have a p-value of 2 / 32.
    assert smallest_difference(5, 1.0) is None
    assert smallest_difference(6, 1.0) is not None
    assert smallest_difference(100) is None
    assert smallest_difference(0) is None


def test_describe_names_each_role_with_its_difference() -> None:
    conditions = "(McNemar's exact test, 80 % power, 5 % of images discordant)"
    assert power.describe({"test": 1078, "val": 360}) == (
        "smallest difference that can be shown: 1.96 points with 1,078 test images, 3.37 points with 360 val images "
        f"{conditions}"
    )
    assert power.describe({"test": 20}) == (
        f"smallest difference that can be shown: none with 20 test images {conditions}"
    )
