"""The plots of evaluate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from flatmin import reporting

# The positions on the plot: along the eigenvector in units of the weights, along filters relative to their norms.
EIGENVECTOR_POSITIONS = np.linspace(-0.3, 0.3, 17)
RANDOM_POSITIONS = np.linspace(-0.3, 0.3, 17)


def draw_sharpness(along: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path | str) -> None:
    """Write a PNG of the loss along two directions.

    Args:
        along: for each model the losses at `EIGENVECTOR_POSITIONS` and at `RANDOM_POSITIONS`.
    """
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    panels = (
        ("along the top eigenvector of the Hessian", "distance in weight space", EIGENVECTOR_POSITIONS),
        ("along a random filter-normalised direction", "distance (1 = the norm of each filter)", RANDOM_POSITIONS),
    )
    for column, (axis, (title, unit, positions)) in enumerate(zip(figure.subplots(1, 2), panels, strict=True)):
        for name, losses in along.items():
            axis.plot(positions, losses[column], label=name, linewidth=1.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(unit)
        axis.set_ylabel("mean train loss (nats)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    with reporting.whole(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})
