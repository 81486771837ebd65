"""Data sources: where the images and labels come from."""

from __future__ import annotations

from collections.abc import Callable

from flatmin.common.params import Data
from flatmin.data.sources import roles
from flatmin.data.sources.base import Source
from flatmin.data.sources.bundled import DigitsSource
from flatmin.data.sources.folder import FolderSource
from flatmin.data.sources.table import TableSource
from flatmin.data.sources.tfds import TfdsSource

SOURCES: dict[str, Callable[[Data], Source]] = {
    "bundled": DigitsSource,
    "folder": FolderSource,
    "table": TableSource,
    "tfds": TfdsSource,
}


def open_source(data: Data) -> Source:
    """Open the source that the `data` section names. No image is read yet.

    `data.seed` decides the order of the examples (see `base.balanced_order`); TFDS keeps its own. `data.class_names`
    renames the classes.

    Raises:
        InputError: There is no such data set, it does not hold images with one label each, or its layout, splits and
            classes do not fit the settings.
    """
    source = SOURCES[data.source](data)
    source.class_names = roles.given_names(data, source.class_names)
    return source
