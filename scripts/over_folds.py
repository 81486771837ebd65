"""The mean over folds of each setting in a grid's table, with an interval, as a Markdown table.

    python scripts/over_folds.py studies/NAME/folds.csv

The grid has `data.fold` among its keys, the same `data.folds` in all runs, and no targets, so that each run ends with a
report. Each fold is the test set once, and the methods are compared on it; docs/audit.md has an example.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import blocks  # which finds the package in a shell without PYTHONPATH
import scipy.stats
from runs_table import Row, is_result, read_table

from flatmin.common import console, errors, files
from flatmin.common.errors import InputError

FOLD, FOLDS = "data.fold", "data.folds"
GAINS = {
    "SAM - control": "evaluate/sam_minus_control.accuracy",
    "SAM - finetune": "evaluate/sam_minus_finetune.accuracy",
}
METHODS = {name: f"evaluate/{name}.test.accuracy" for name in ("extract", "finetune", "control", "sam")}
NOTE = (
    "Means over folds, in percent; differences in points, of methods with the same fold, start and seeds. The 95 %"
    " interval is that of the corrected t-test (Nadeau & Bengio 2003, Machine Learning 52:239-281): folds share"
    " training images, so their differences are not independent, and the variance of the mean is taken as"
    " s^2 (1 / k + 1 / (k - 1)) in place of s^2 / k. It is an approximation, of how the difference varies with the"
    " training and test images drawn from where these came from; no unbiased estimate of that exists (Bengio &"
    " Grandvalet 2004, JMLR 5:1089-1105)."
)


def interval(gains: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The mean of a difference over k folds, k >= 2, and the half-width of its interval (Nadeau & Bengio 2003).

    With equal folds a fold is 1 / (k - 1) of what the others train on.
    """
    count = len(gains)
    variance = statistics.variance(gains) * (1 / count + 1 / (count - 1))
    quantile = float(scipy.stats.t.ppf((1 + level) / 2, count - 1))
    return statistics.fmean(gains), quantile * math.sqrt(variance)


def settings(path: Path) -> dict[str, list[Row]]:
    """The runs of each setting, one for each fold, in the order of folds; a setting is named by what varies.

    Raises:
        InputError: the table is no grid over folds, or lacks one.
    """
    rows = list(read_table(path).values())
    if not rows or any(not row.get(key) for row in rows for key in (FOLD, FOLDS)):
        raise InputError(
            f"{path}: expected succeeded runs with {FOLD} and {FOLDS}, received {len(rows)} runs, not all so"
        )
    keys = [key for key in rows[0] if key not in ("name", "status", FOLD) and not is_result(key)]
    varying = [key for key in keys if len({row[key] for row in rows}) > 1]
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row[FOLD])):
        found.setdefault(", ".join(f"{key} {row[key]}" for key in varying) or "all", []).append(row)
    for name, runs in found.items():
        expected = list(range(int(runs[0][FOLDS])))
        if [int(run[FOLD]) for run in runs] != expected:
            received = ", ".join(run[FOLD] for run in runs)
            raise InputError(f"{path}: {name}: expected the folds 0 to {expected[-1]} once each, received {received}")
    return found


def table(path: Path) -> str:
    """The Markdown table."""
    rows = []
    for name, runs in settings(path).items():
        means = [f"{100 * statistics.fmean(float(run[column]) for run in runs):.1f}" for column in METHODS.values()]
        gains = []
        for column in GAINS.values():
            mean, half = interval([100 * float(run[column]) for run in runs])
            gains.append(f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})")
        rows.append([name, len(runs), *means, *gains])
    return f"{blocks.table(['setting', 'folds', *METHODS, *GAINS], rows)}\n{NOTE}\n"


def main() -> None:
    if len(sys.argv) != 2:
        raise InputError("expected the table of a grid over folds: python scripts/over_folds.py studies/NAME/folds.csv")
    path = Path(sys.argv[1])
    written = path.with_suffix(".folds.md")
    text = table(path)
    with files.atomic_write(written) as temporary:
        temporary.write_text(text, encoding="utf-8")
    console.log(text)


if __name__ == "__main__":
    errors.run(main)
