"""The preview shows the images that training sees, class by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from repository import ROOT

from flatmin.common import params
from flatmin.common.params import Augment
from flatmin.data import writer
from flatmin.inputs import preview, records
from flatmin.inputs.augment import AUGMENT_CHUNK, Augmentation
from flatmin.inputs.pixels import Task

CLASSES = [f"from_${digit}_to_$20" for digit in range(10)]  # no formulas


@pytest.mark.slow
def test_draw_row_has_stored_image_and_those_of_first_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = params.load(ROOT / "params.yaml").data.model_copy(update={"class_names": CLASSES})
    writer.write(data, tmp_path / "records")
    stored = records.Records(tmp_path / "records")
    shown: list[np.ndarray] = []
    imshow = Axes.imshow

    def watched(axes: Axes, image: np.ndarray, **more: Any) -> Any:
        shown.append(image)
        return imshow(axes, image, **more)

    monkeypatch.setattr(Axes, "imshow", watched)
    settings = Augment(n=1, m=9, flip=True)
    preview.draw(stored, settings, tmp_path / "preview.png")

    chunk = Task(stored.stored("train", range(AUGMENT_CHUNK)), preview.SIZE, "squash")
    images = chunk.run()
    labels = list(stored.labels("train")[:AUGMENT_CHUNK])
    firsts = sorted(map(labels.index, set(labels)))[: preview.ROWS]
    epochs = [
        chunk._replace(augmentation=Augmentation(settings, preview.SEED, epoch, 0)).run()
        for epoch in range(preview.EPOCHS)
    ]
    assert not np.array_equal(epochs[0], images)
    expected = [image for index in firsts for image in [images[index], *(epoch[index] for epoch in epochs)]]
    assert len(shown) == preview.ROWS * (1 + preview.EPOCHS)
    for drawn, image in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(drawn, image)
    with Image.open(tmp_path / "preview.png") as picture:
        assert len(picture.convert("L").getcolors(2**16) or []) > 50
