"""Data sets that an installed package contains."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from PIL import Image

from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import images
from flatmin.data.sources.base import ListedSource


class DigitsSource(ListedSource):
    """scikit-learn's 1,797 scans of handwritten digits: grey, 8x8 pixels, 17 levels, here rescaled to 0..255."""

    def __init__(self, data: Data) -> None:
        if data.name != "digits":
            raise InputError(
                f"data.name: expected digits, the only data set with data.source bundled, received {data.name!r}"
            )
        from sklearn.datasets import load_digits  # takes about a second, which other sources need not wait for

        digits = load_digits()
        self._pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        items = [(f"digits/{index:04d}", str(label)) for index, label in enumerate(digits.target)]
        super().__init__(data, version("scikit-learn"), {"train": items})

    def _read(self, name: str) -> bytes:
        return images.to_png(Image.fromarray(self._pixels[int(name.removeprefix("digits/"))]))
