"""Draws training images alongside augmented versions of them, as the network sees them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from flatmin.common import files
from flatmin.common.params import Augment
from flatmin.inputs import augment
from flatmin.inputs.augment import Augmentation
from flatmin.inputs.pixels import Task
from flatmin.inputs.records import Records

ROWS = 8  # classes
EPOCHS = 7
SEED = 0
SIZE = 96  # pixels, about as many as an image gets in the figure


def draw(records: Records, settings: Augment, path: Path | str) -> None:
    """Draw the first image of each of the first classes, as it is and as augmented in epochs 1 to 7.

    Args:
        records: their first chunk of train images is drawn from, augmented as in training.
        settings: the `augment` section of params.yaml.
        path: the PNG file to write.
    """
    chunk = Task(records.stored("train", augment.positions(0, records.count("train"))), SIZE, records.fit("train"))
    labels = records.labels("train")[: len(chunk.images)]
    _, first_of_class = np.unique(labels, return_index=True)
    shown = sorted(first_of_class)[:ROWS]
    drawn = [chunk.run()]
    if settings.engine == "none":
        drawn *= 1 + EPOCHS
    else:
        augmented = (Augmentation(settings, SEED, epoch, chunk=0) for epoch in range(EPOCHS))
        drawn += [chunk._replace(augmentation=each).run() for each in augmented]
    figure = Figure(figsize=(1 + EPOCHS, len(shown)), dpi=100, layout="constrained")
    axes = figure.subplots(len(shown), 1 + EPOCHS, squeeze=False)
    for row, index in zip(axes, shown, strict=True):
        for axis, images in zip(row, drawn, strict=True):
            axis.imshow(images[index], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(records.class_names[labels[index]], fontsize=8, parse_math=False)
    for axis, title in zip(axes[0], ["stored", *(f"epoch {number + 1}" for number in range(EPOCHS))], strict=True):
        axis.set_title(title, fontsize=8)
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
