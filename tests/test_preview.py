"""The preview shows what training sees, class by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from flatmin import preview, records
from flatmin.augment import augment
from flatmin.params import Augment, Data

CLASSES = ("cat", "dog", "from_$10_to_$20")  # the last one is no formula


def test_a_row_has_the_stored_image_and_those_of_the_first_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for index in range(6):
            path = tmp_path / "source" / split / CLASSES[index % 3] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (12, 10, 3), np.uint8)).save(path)
    splits = {"train": "train", "val": "val", "test": "test"}
    data = Data.model_validate({"source": "folder", "name": str(tmp_path / "source"), "splits": splits})
    records.write(data, 0, tmp_path / "records")
    found = records.Records(tmp_path / "records")
    shown: list[np.ndarray] = []
    imshow = Axes.imshow

    def watched(axes: Axes, image: np.ndarray, **more: Any) -> Any:
        shown.append(image)
        return imshow(axes, image, **more)

    monkeypatch.setattr(Axes, "imshow", watched)
    settings = Augment(n=1, m=9, flip=True)
    preview.draw(found, settings, 5, tmp_path / "preview.png")

    images = [image for image, _ in found.images("train").as_numpy_iterator()]
    firsts = [list(found.labels("train")).index(label) for label in range(3)]
    epochs = [augment(images, settings, 5, epoch, chunk=0) for epoch in range(preview.VERSIONS)]
    expected = [image for index in sorted(firsts) for image in [images[index], *(epoch[index] for epoch in epochs)]]
    assert len(shown) == 3 * (1 + preview.VERSIONS)
    for drawn, image in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(drawn, image)
    with Image.open(tmp_path / "preview.png") as picture:
        assert len(picture.convert("L").getcolors(2**16) or []) > 50
