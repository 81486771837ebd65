"""Draws training images alongside augmented versions of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from flatmin.common import files
from flatmin.common.params import Augment
from flatmin.inputs.augment import AUGMENT_CHUNK, augment
from flatmin.inputs.records import Records

ROWS = 8  # classes
EPOCHS = 7
SEED = 0


def draw(records: Records, settings: Augment, path: Path | str) -> None:
    """Draw the first image of each of the first classes, as stored and as augmented in epochs 1 to 7.

    Args:
        records: their first chunk of train images is drawn from, augmented as in training.
        settings: the `augment` section of params.yaml.
        path: the PNG file to write.
    """
    images = [image for image, _ in records.images("train").take(AUGMENT_CHUNK).as_numpy_iterator()]
    labels = records.labels("train")[: len(images)]
    _, first_of_class = np.unique(labels, return_index=True)
    shown = sorted(first_of_class)[:ROWS]
    epochs = [augment(images, settings, SEED, epoch, chunk=0) for epoch in range(EPOCHS)]
    figure = Figure(figsize=(1 + EPOCHS, len(shown)), dpi=100, layout="constrained")
    axes = figure.subplots(len(shown), 1 + EPOCHS, squeeze=False)
    for row, index in zip(axes, shown, strict=True):
        for axis, image in zip(row, [images[index], *(epoch[index] for epoch in epochs)], strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(records.class_names[labels[index]], fontsize=8, parse_math=False)
    for axis, title in zip(axes[0], ["stored", *(f"epoch {number + 1}" for number in range(EPOCHS))], strict=True):
        axis.set_title(title, fontsize=8)
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
