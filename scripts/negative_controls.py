"""Write studies/digits/negative.md: the negative controls of the default study.

It reads the table of negative.yaml and the default study's data/records/; `make negative` makes both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats
from blocks import table
from runs_table import Row, read_table
from sklearn.neighbors import KNeighborsClassifier

from flatmin.common import console, errors, files
from flatmin.common.errors import InputError
from flatmin.inputs.records import Records

TABLE = Path("studies/digits/negative.csv")
METHODS = ("extract", "finetune", "control", "sam")  # in evaluate's metrics
PAGE = """# Negative controls of the default study

**If the study leaked labels, the first row would be above chance.** The numbers are test accuracies where something is
wrong on purpose, or without a network. The networks are the default study's, with one backbone and a third of the
epochs (negative.yaml). `make negative` writes this page.

{table}
- Labels permuted: among the training images and among those of val, while test keeps its true ones. The mean of {count}
  permutations, each of other images and with one training seed, and its 95 % interval (Student's t). Chance is
  {chance:g}. One in twenty such intervals misses it by chance.
- Random weights: the backbone starts from random weights, not from ImageNet's, with one training seed.
- Nearest neighbour: the label of the closest training image by its stored pixels (Euclidean), on the study's images.
"""


def main() -> None:
    rows = list(read_table(TABLE).values())
    permuted = [row for row in rows if row.get("data.shuffle_labels") == "true"]
    random_weights = [row for row in rows if row.get("extract.weights")]
    if len(permuted) < 2 or len(random_weights) != 1:
        received = f"{len(permuted)} and {len(random_weights)}"
        raise InputError(f"{TABLE}: expected runs of permuted labels and one of random weights, received {received}")
    records = Records("data/records")
    nearest = nearest_neighbour(*((stored_pixels(records, role), records.labels(role)) for role in ("train", "test")))
    page = describe(permuted, random_weights[0], nearest, 1 / len(records.class_names))
    with files.atomic_write(TABLE.with_suffix(".md")) as temporary:
        temporary.write_text(page, encoding="utf-8")
    console.log(f"{TABLE.with_suffix('.md')}: {len(permuted)} permutations, nearest neighbour {nearest:.4f}")


def stored_pixels(records: Records, role: str) -> np.ndarray:
    """All images of a role, which are of one size: uint8 [n, height, width, 3]."""
    return np.stack([np.asarray(each.read()) for each in records.stored(role, range(records.count(role)))])


def nearest_neighbour(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """The accuracy on test of the nearest training image's label. Both are images [n, ...] and labels [n]."""
    model = KNeighborsClassifier(n_neighbors=1).fit(_flat(train[0]), train[1])
    return float(model.score(_flat(test[0]), test[1]))


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32)


def describe(permuted: Sequence[Row], random_weights: Row, nearest: float, chance: float) -> str:
    """The page, from the rows of the table and the nearest neighbour's accuracy."""
    intervals = [interval([_accuracy(row, method) for row in permuted]) for method in METHODS]
    rows = [
        ["labels permuted", *("{:.4f} [{:.4f}, {:.4f}]".format(*each) for each in intervals)],
        ["chance inside", *("yes" if low <= chance <= high else "**no**" for _, low, high in intervals)],
        ["random weights", *(f"{_accuracy(random_weights, method):.4f}" for method in METHODS)],
        ["nearest neighbour", f"{nearest:.4f}", *[""] * (len(METHODS) - 1)],
    ]
    return PAGE.format(table=table(["", *METHODS], rows), count=len(permuted), chance=chance)


def _accuracy(row: Mapping[str, str], method: str) -> float:
    return float(row[f"evaluate/{method}.test.accuracy"])


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval by Student's t."""
    mean = float(np.mean(values))
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))
    return mean, mean - half, mean + half


if __name__ == "__main__":
    errors.run(main)
