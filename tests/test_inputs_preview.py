"""The preview shows what training sees, class by class."""

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
from flatmin.inputs.augment import CHUNK, augment

CLASSES = [f"from_${digit}_to_$20" for digit in range(10)]  # no formulas


def test_a_row_has_the_stored_image_and_those_of_the_first_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = params.load(ROOT / "params.yaml").data.model_copy(update={"class_names": CLASSES})
    writer.write(data, 0, tmp_path / "records")
    found = records.Records(tmp_path / "records")
    shown: list[np.ndarray] = []
    imshow = Axes.imshow

    def watched(axes: Axes, image: np.ndarray, **more: Any) -> Any:
        shown.append(image)
        return imshow(axes, image, **more)

    monkeypatch.setattr(Axes, "imshow", watched)
    settings = Augment(n=1, m=9, flip=True)
    preview.draw(found, settings, 5, tmp_path / "preview.png")

    images = [image for image, _ in found.images("train").take(CHUNK).as_numpy_iterator()]
    labels = list(found.labels("train")[:CHUNK])  # training augments so many at a time
    firsts = sorted(map(labels.index, set(labels)))[: preview.ROWS]
    epochs = [augment(images, settings, 5, epoch, chunk=0) for epoch in range(preview.VERSIONS)]
    expected = [image for index in firsts for image in [images[index], *(epoch[index] for epoch in epochs)]]
    assert len(shown) == preview.ROWS * (1 + preview.VERSIONS)
    for drawn, image in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(drawn, image)
    with Image.open(tmp_path / "preview.png") as picture:
        assert len(picture.convert("L").getcolors(2**16) or []) > 50
