"""How often the 95 % interval of `evaluation.comparison` over seeds and images covers the true difference.

Simulates studies that compare two classifiers, writes bench/coverage.json and prints it as a table, in a minute or two.
For contrast the same with Satterthwaite's degrees of freedom, and for a few settings by the bootstrap that draws seeds
and images with replacement. `PYTHONPATH=src python bench/coverage.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from flatmin.common import console, errors, files
from flatmin.evaluation.comparison import interval, mean_squares

RESULTS = Path(__file__).with_name("coverage.json")
STUDIES = 4000  # the standard error of a coverage of 95 % is 0.34 points
BOOTSTRAPPED = 1000  # studies, with as many resamples each
DIFFERENCE = 0.005  # the true difference in accuracy, a fraction
DISCORDANCE = 0.08  # share of the images that one classifier alone predicts correctly
CELLS = 2_000_000  # of seeds and images, that are simulated at once


@dataclass(frozen=True)
class Setting:
    """A study: its numbers of seeds and images, and how it varies.

    Attributes:
        deviation: the standard deviation over seeds of the true difference, a fraction.
        correlation: of an image's gains with two seeds.
    """

    seeds: int
    images: int
    deviation: float
    correlation: float


SETTINGS = [Setting(*each) for each in itertools.product((3, 5), (360, 1078, 10_000), (0.0, 0.003, 0.01), (0.3, 0.7))]
# Where images alone matter, where both do, and where seeds do.
CONTRASTED = [Setting(3, 1078, 0.0, 0.7), Setting(3, 1078, 0.01, 0.3), Setting(3, 10_000, 0.01, 0.3)]
CONTRASTED += [Setting(5, 10_000, 0.01, 0.3)]


def simulate(setting: Setting, studies: int) -> Iterator[np.ndarray]:
    """Yield gains of studies in parts: int8 [part, seeds, images], 1 or -1 where one classifier alone is right.

    A gain is read off a number in [0, 1), at thresholds that move with the seed. The number is the image's own or new
    for this seed, such that gains with two seeds of the same thresholds have the setting's correlation.
    """
    seeds, images = setting.seeds, setting.images
    random = np.random.default_rng([seeds, images, round(1e4 * setting.deviation), round(100 * setting.correlation)])
    part = max(1, CELLS // (seeds * images))
    for start in range(0, studies, part):
        count = min(part, studies - start)
        difference = DIFFERENCE + setting.deviation * random.standard_normal((count, seeds, 1), np.float32)
        difference = np.clip(difference, -DISCORDANCE, DISCORDANCE)
        shape = (count, seeds, images)
        shared = random.random(shape, np.float32) < setting.correlation**0.5
        own = random.random((count, 1, images), np.float32)
        place = np.where(shared, own, random.random(shape, np.float32))
        gained = place < (DISCORDANCE + difference) / 2
        lost = place >= 1 - (DISCORDANCE - difference) / 2
        yield gained.astype(np.int8) - lost.astype(np.int8)


def satterthwaite(gains: np.ndarray) -> np.ndarray:
    """The half-width with the degrees of freedom of Hillis (2007), after Satterthwaite."""
    seeds, images = gains.shape[-2:]
    squares = mean_squares(gains)
    total = np.maximum(squares.seeds + np.maximum(squares.images - squares.rest, 0), 1e-12)
    freedom = total**2 / np.maximum(squares.seeds**2 / (seeds - 1), 1e-12)
    return scipy.stats.t.ppf(0.975, freedom) * np.sqrt(total / (seeds * images))


def bootstrap(gains: np.ndarray, random: np.random.Generator, resamples: int) -> tuple[float, float]:
    """The 95 % percentile interval of one study [seeds, images] by drawing seeds and images with replacement."""
    seeds, images = gains.shape
    # A resample of images matters only by how often it draws each pattern of gains over the seeds.
    patterns, counts = np.unique(gains, axis=1, return_counts=True)
    drawn = random.multinomial(images, counts / images, resamples) @ patterns.T / images
    weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    low, high = np.quantile((drawn * weights).sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def measure(setting: Setting, studies: int) -> dict[str, float]:
    """Coverage and mean width (fractions) of the interval, and the coverage with Satterthwaite's degrees of freedom."""
    covered, width, contrast = 0, 0.0, 0
    for gains in simulate(setting, studies):
        mean, half_width = interval(gains)
        error = np.abs(mean - DIFFERENCE)
        covered += int((error <= half_width).sum())
        contrast += int((error <= satterthwaite(gains)).sum())
        width += float(2 * half_width.sum())
    return {"coverage": covered / studies, "mean_width": width / studies, "satterthwaite": contrast / studies}


def measure_bootstrap(setting: Setting, studies: int) -> float:
    """Coverage of the bootstrap's interval."""
    random = np.random.default_rng(0)
    intervals = (bootstrap(gains, random, studies) for part in simulate(setting, studies) for gains in part)
    return sum(low <= DIFFERENCE <= high for low, high in intervals) / studies


def table(rows: list[dict[str, Any]]) -> str:
    """The settings and what was measured, as Markdown."""
    lines = [
        "| seeds | images | sd of seeds, points | correlation | coverage | mean width, points | Satterthwaite "
        "| bootstrap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bootstrapped = f"{row['bootstrap']:.1%}" if "bootstrap" in row else ""
        lines.append(
            f"| {row['seeds']} | {row['images']:,} | {100 * row['deviation']:g} | {row['correlation']:g} "
            f"| {row['coverage']:.1%} | {100 * row['mean_width']:.2f} | {row['satterthwaite']:.1%} | {bootstrapped} |"
        )
    return "\n".join(lines).replace("%", " %")


def main() -> None:
    rows: list[dict[str, Any]] = []
    for setting in SETTINGS:
        rows.append(asdict(setting) | measure(setting, STUDIES))
        if setting in CONTRASTED:
            rows[-1]["bootstrap"] = measure_bootstrap(setting, BOOTSTRAPPED)
    results = {"studies": STUDIES, "bootstrapped": BOOTSTRAPPED, "difference": DIFFERENCE, "discordance": DISCORDANCE}
    files.write_json(RESULTS, results | {"settings": rows})
    console.log(table(rows))


if __name__ == "__main__":
    errors.run(main)
