"""Plots of evaluate: the confusion matrix, each class's accuracy, and the loss around the minima."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from flatmin.common import files

# The range of the loss plot: along the eigenvector in units of the weights, along filters as a share of their norms.
EIGENVECTOR_POSITIONS = np.linspace(-0.3, 0.3, 17)
RANDOM_POSITIONS = np.linspace(-0.3, 0.3, 17)


def write_confusion(path: Path | str, predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
    """Write one row for each image: its class and the predicted one."""
    pairs = ((names[label], names[prediction]) for label, prediction in zip(labels, predicted, strict=True))
    files.write_csv(path, ["actual", "predicted"], pairs)


def write_class_accuracy(
    path: Path | str, predicted: Mapping[str, Sequence[np.ndarray]], labels: np.ndarray, names: Sequence[str]
) -> None:
    """Write one row for each class that has images and each method: the share of the images predicted correctly.

    predicted: by method, each seed's predictions, int [n]; the share is their mean.
    """
    rows = (
        [name, method, f"{(np.array(predictions)[:, labels == index] == index).mean():.6g}"]
        for index, name in enumerate(names)
        for method, predictions in predicted.items()
        if (labels == index).any()
    )
    files.write_csv(path, ["class", "method", "accuracy"], rows)


def write_sharpness(path: Path | str, losses: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Write what `draw_sharpness` draws: a row for each model, direction and position."""
    directions = (("eigenvector", EIGENVECTOR_POSITIONS), ("random", RANDOM_POSITIONS))
    rows = (
        [name, direction, f"{position:.6g}", f"{loss:.6g}"]
        for name, pair in losses.items()
        for (direction, positions), line in zip(directions, pair, strict=True)
        for position, loss in zip(positions, line, strict=True)
    )
    files.write_csv(path, ["method", "direction", "position", "loss"], rows)


def draw_sharpness(path: Path | str, losses: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw the loss along two directions as a PNG.

    Args:
        losses: by model, the losses at `EIGENVECTOR_POSITIONS` and at `RANDOM_POSITIONS`.
    """
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    panels = (
        ("along the top eigenvector of the Hessian", "distance in weight space", EIGENVECTOR_POSITIONS),
        ("along a random filter-normalised direction", "distance (1 = the norm of each filter)", RANDOM_POSITIONS),
    )
    for column, (axis, (title, unit, positions)) in enumerate(zip(figure.subplots(1, 2), panels, strict=True)):
        for name, pair in losses.items():
            axis.plot(positions, pair[column], label=name, linewidth=1.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(unit)
        axis.set_ylabel("mean train loss (nats)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
