"""Data sources: where the images and labels come from."""

from __future__ import annotations

from flatmin.common.params import Data
from flatmin.data.sources.base import Source
from flatmin.data.sources.bundled import DigitsSource
from flatmin.data.sources.folder import FolderSource
from flatmin.data.sources.tfds import TfdsSource


def open_source(data: Data) -> Source:
    """Open the source that the `data` section names. No image is read yet.

    `data.seed` decides the order of the examples of `bundled` and `folder` (see `base.balanced_order`). TFDS keeps its
    own order.

    Raises:
        InputError: There is no such data set, or it does not hold images with one label each.
    """
    match data.source:
        case "bundled":
            return DigitsSource(data.name, data.seed)
        case "folder":
            return FolderSource(data.name, data.seed)
        case _:
            return TfdsSource(data.name)
