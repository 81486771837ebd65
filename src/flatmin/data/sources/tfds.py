"""Data sets of TensorFlow Datasets."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from flatmin.common import errors
from flatmin.common.errors import InputError
from flatmin.data.sources.base import Example, Source

# Features that may hold an example's name, in the order in which they are looked for.
NAME_FEATURES = ("name", "file_name", "filename", "image/filename", "image/file_name", "id")


class TfdsSource(Source):
    """A TFDS builder, read in TFDS's own order."""

    def __init__(self, name: str) -> None:
        self._builder = _prepared_builder(name)
        info = self._builder.info
        self.version = str(self._builder.version)
        self.splits = info.splits
        self._image, self._label = _image_and_label(name, info)
        self._name = _name_feature(info.features)
        self.class_names = list(info.features[self._label].names)

    def examples(self, expression: str) -> Iterator[Example]:
        name = self._name or "tfds_id"
        decoders = {self._image: tfds.decode.SkipDecoding()}
        for features in self._read(expression, decoders, add_tfds_id=not self._name):
            text = features[name].decode("utf-8", "backslashreplace")
            yield Example(features[self._image], int(features[self._label]), text)

    def labels(self, expression: str) -> np.ndarray:
        label_only = tfds.decode.PartialDecoding({self._label: True})
        labels = (features[self._label] for features in self._read(expression, label_only))
        return np.fromiter(labels, np.int32)

    def _read(self, expression: str, decoders: Any, add_tfds_id: bool = False) -> Iterator[dict[str, Any]]:
        with _without_deprecation_warnings():
            dataset = self._builder.as_dataset(
                split=expression,
                decoders=decoders,
                read_config=tfds.ReadConfig(add_tfds_id=add_tfds_id, try_autocache=False),
                shuffle_files=False,
            )
        try:
            yield from dataset.as_numpy_iterator()
        except (tf.errors.DataLossError, tf.errors.NotFoundError) as error:
            raise InputError(
                f"data.name: expected complete files in {self._builder.data_path}, received: {_first_line(error)}"
            ) from None


@contextmanager
def _without_deprecation_warnings() -> Iterator[None]:
    """Silence the deprecation warnings of TFDS and TensorFlow, about which a user can do nothing."""
    loggers = [logging.getLogger("absl"), logging.getLogger("tensorflow")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _prepared_builder(name: str) -> Any:
    """Return the builder of that name, its data downloaded and prepared."""
    folder = os.environ.get("TFDS_DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=folder)
    except Exception as error:  # TFDS imports the builder's own code, which may raise anything
        raise InputError(f"data.name: expected a TFDS builder, received {name!r}: {_first_line(error)}") from None
    if not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except Exception as error:  # as above
            raise InputError(
                f"data.name: expected {name} in {builder.data_path}, found none, and preparing it failed:"
                f" {_first_line(error)}; run `tfds build {name}` on a machine with network access, or set"
                " TFDS_DATA_DIR to the folder that holds it"
            ) from None
    return builder


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {errors.first_line(str(error))[:200]}"


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    """Return the keys of the image and the label: TFDS's supervised pair if it fits, else the only ones there are."""
    features = info.features
    images = [key for key, feature in features.items() if type(feature) is tfds.features.Image and _is_8_bit(feature)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    pair = info.supervised_keys
    if pair and len(pair) == 2 and pair[0] in images and pair[1] in labels:
        return pair
    if len(images) != 1 or len(labels) != 1:
        received = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        raise InputError(f"data.name: expected one Image and one ClassLabel, received {name} with {received}")
    return images[0], labels[0]


def _is_8_bit(image: Any) -> bool:
    return bool(image.np_dtype == np.uint8)


def _name_feature(features: Any) -> str | None:
    """Return the key of the text feature that names an example, if there is one."""
    names = [key for key in NAME_FEATURES if key in features]
    return next((key for key in names if features[key].np_dtype in (str, np.str_, object, bytes)), None)
