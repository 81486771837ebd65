"""What a number of images can show: the smallest difference in accuracy that is more than chance."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom

DISCORDANCE = 0.05  # share of the images that exactly one of two fine-tunings of a backbone predicts correctly
POWER = 0.8
LEVEL = 0.05
TAIL = 1e-9  # of the number of discordant images, on either side; moves the power by no more than that


@functools.cache
def smallest_difference(
    images: int, discordance: float = DISCORDANCE, power: float = POWER, level: float = LEVEL
) -> float | None:
    """The smallest difference in accuracy, a fraction, that McNemar's exact two-sided test shows with this power.

    Two classifiers predict the same images. `discordance` is the share that exactly one of them predicts correctly, so
    a difference cannot be larger; None if even that one has less power, as where no image is discordant. The test is
    the exact binomial one of McNemar (1947, Psychometrika 12:153-157) on the discordant images. Its power is computed
    as a sum over their number (Miettinen 1968, Biometrics 24:339-352), without an approximation.

    Args:
        discordance: in [0, 1]. level: of the test, the largest p-value that counts as a difference.
    """
    if not discordance:
        return None
    fewest, most = (int(binom.ppf(share, images, discordance)) for share in (TAIL, 1 - TAIL))
    discordant = np.arange(fewest, most + 1)
    weights = binom.pmf(discordant, images, discordance)
    rejected = _largest_rejected(discordant, level)

    def excess(difference: float) -> float:
        gained = (1 + difference / discordance) / 2  # share of the discordant images that the better one has right
        tails = binom.cdf(rejected, discordant, gained) + binom.sf(discordant - rejected - 1, discordant, gained)
        return float(weights @ tails) - power

    if excess(discordance) < 0:
        return None
    return float(brentq(excess, 0.0, discordance, xtol=1e-9))


def _largest_rejected(discordant: np.ndarray, level: float) -> np.ndarray:
    """The largest count of the rarer side that the test rejects, by the number of discordant images; -1 if none is."""
    count = binom.ppf(level / 2, discordant, 0.5)
    return np.where(binom.cdf(count, discordant, 0.5) > level / 2, count - 1, count)


def describe(counts: Mapping[str, int]) -> str:
    """One line on what differences the images of each role can show: `counts` are their numbers."""
    shown: list[str] = []
    for role, images in counts.items():
        smallest = smallest_difference(images)
        size = "none" if smallest is None else f"{100 * smallest:.2f} points"
        shown.append(f"{size} with {images:,} {role} images")
    conditions = f"McNemar's exact test, {POWER:.0%} power, {DISCORDANCE:.0%} of images discordant".replace("%", " %")
    return f"smallest difference that can be shown: {', '.join(shown)} ({conditions})"
