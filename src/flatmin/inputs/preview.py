"""A picture of what augmentation does: originals on the left, what training sees of them beside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from flatmin.common import files
from flatmin.common.params import Augment
from flatmin.inputs.augment import AUGMENT_CHUNK, augment
from flatmin.inputs.records import Records

ROWS = 8
VERSIONS = 7


def draw(records: Records, settings: Augment, seed: int, path: Path | str) -> None:
    """Write a PNG: a row for each of the first images of different classes, as stored and in epochs 1 to 7."""
    images = [image for image, _ in records.images("train").take(AUGMENT_CHUNK).as_numpy_iterator()]
    labels = records.labels("train")[: len(images)]
    _, first_of_class = np.unique(labels, return_index=True)
    shown = sorted(first_of_class)[:ROWS]
    epochs = [augment(images, settings, seed, epoch, chunk=0) for epoch in range(VERSIONS)]
    figure = Figure(figsize=(1 + VERSIONS, len(shown)), dpi=100, layout="constrained")
    axes = figure.subplots(len(shown), 1 + VERSIONS, squeeze=False)
    for row, index in zip(axes, shown, strict=True):
        for axis, image in zip(row, [images[index], *(epoch[index] for epoch in epochs)], strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(records.class_names[labels[index]], fontsize=8, parse_math=False)
    for axis, title in zip(axes[0], ["stored", *(f"epoch {number + 1}" for number in range(VERSIONS))], strict=True):
        axis.set_title(title, fontsize=8)
    with files.atomic_write(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})
