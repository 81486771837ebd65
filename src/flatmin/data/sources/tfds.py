"""Data sets of TensorFlow Datasets."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from flatmin.common import errors
from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data.sources import roles
from flatmin.data.sources.base import Example, Source

ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD

# Features that may hold an example's name, in the order in which they are looked for.
NAME_FEATURES = ("name", "file_name", "filename", "image/filename", "image/file_name", "id")


class TfdsSource(Source):
    """A TFDS builder, read in TFDS's own order."""

    def __init__(self, data: Data) -> None:
        self._builder = _prepared_builder(data.name)
        info = self._builder.info
        self.version = str(self._builder.version)
        self.splits = info.splits
        self.expressions = roles.expressions(data, {split: info.splits[split].num_examples for split in info.splits})
        self._image, self._label = _image_and_label(data, info.features, info.supervised_keys)
        self._name = _name_feature(info.features)
        self._group = _group_feature(data, info.features)
        self.class_names = list(info.features[self._label].names)

    def examples(self, expression: str) -> Iterator[Example]:
        for features in self._read(expression, self._name or "tfds_id"):
            text = _text(features[self._name or "tfds_id"])
            group = _text(features[self._group]) if self._group else None
            yield Example(features[self._image], int(features[self._label]), text, group=group)

    def labels(self, expression: str) -> np.ndarray:
        labels = (features[self._label] for features in self._read(expression))
        return np.fromiter(labels, np.int32)

    def groups(self, expression: str) -> np.ndarray:
        key = str(self._group)
        return np.array([_text(features[key]) for features in self._read(expression)], np.str_)

    def _read(self, expression: str, name: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield each example's label and group, and if `name` is given, that feature and the encoded image too."""
        in_order = self._read_indexed if self._builder.info.file_format == ARRAY_RECORD else self._read_in_order
        try:
            yield from in_order(expression, name)
        # What TFDS and its readers raise on files that are missing, damaged or of a format that needs another package.
        except (
            tf.errors.DataLossError,
            tf.errors.NotFoundError,
            RuntimeError,
            ImportError,
            OSError,
            ValueError,
        ) as error:
            kind = self._builder.info.file_format
            raise InputError(
                f"data.name: expected complete files in {self._builder.data_path}, which are of the format"
                f" {kind.value if kind else 'tfrecord'}, received: {_first_line(error)}"
            ) from None

    def _read_in_order(self, expression: str, name: str | None) -> Iterator[dict[str, Any]]:
        partial = tfds.decode.PartialDecoding({key: True for key in (self._label, self._group) if key})
        with _without_deprecation_warnings():
            dataset = self._builder.as_dataset(
                split=expression,
                decoders={self._image: tfds.decode.SkipDecoding()} if name else partial,
                read_config=tfds.ReadConfig(add_tfds_id=name == "tfds_id", try_autocache=False),
                shuffle_files=False,
            )
        yield from dataset.as_numpy_iterator()

    def _read_indexed(self, expression: str, name: str | None) -> Iterator[dict[str, Any]]:
        """Read array_record files, which TFDS does not stream. An example's `tfds_id` is its file format and index."""
        for split, start, stop in self.locate(expression):
            source = self._builder.as_data_source(split=split, decoders={self._image: tfds.decode.SkipDecoding()})
            for index in range(start, stop):
                features = source[index]
                if features[self._label] is None or not features[self._image]:  # what a damaged file gives
                    raise ValueError(f"no example {index} of {split}")
                yield {**features, "tfds_id": f"{self._builder.name}-{split}.array_record__{index}".encode()}


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


def _image_and_label(data: Data, features: Mapping[str, Any], pair: Any) -> tuple[str, str]:
    """Return the keys of the image and the label: those of `data.columns`, TFDS's supervised pair, the only ones.

    Raises:
        InputError: A key of `data.columns` does not fit, or it is needed, because there are several or none.
    """
    images = [key for key, feature in features.items() if _is_image(feature)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    fits = pair and len(pair) == 2 and pair[0] in images and pair[1] in labels
    usual = pair if fits else (None, None)
    image = _choose(data, "image", data.columns.image, usual[0], images, features)
    return image, _choose(data, "label", data.columns.label, usual[1], labels, features)


def _choose(
    data: Data, column: str, given: str | None, usual: str | None, fitting: list[str], features: Mapping[str, Any]
) -> str:
    key = given or usual or (fitting[0] if len(fitting) == 1 else None)
    if key in fitting:
        return str(key)
    kind = {"image": "Image of 8 or 16 bits", "label": "ClassLabel"}[column]
    received = ", ".join(f"{key} ({_describe(feature)})" for key, feature in features.items())
    if given is None and len(fitting) > 1:
        choices = " or ".join(fitting)
        raise InputError(
            f"data.columns.{column}: expected a choice, as {data.name} has several, received null: write {choices}"
        )
    received = f"{given!r} of {received}" if given else f"{data.name} with {received}"
    raise InputError(f"data.columns.{column}: expected one {kind}, received {received}")


def _describe(feature: Any) -> str:
    bits = f" of {np.dtype(feature.np_dtype).name}" if type(feature) is tfds.features.Image else ""
    return type(feature).__name__ + bits


def _is_image(feature: Any) -> bool:
    """Whether it is an image in a file format, and not TFDS's encoding of floating point numbers."""
    return type(feature) is tfds.features.Image and feature.np_dtype in (np.uint8, np.uint16)


def _name_feature(features: Any) -> str | None:
    """Return the key of the text feature that names an example, if there is one."""
    names = [key for key in NAME_FEATURES if key in features]
    return next((key for key in names if features[key].np_dtype in (str, np.str_, object, bytes)), None)


def _group_feature(data: Data, features: Mapping[str, Any]) -> str | None:
    """Return `data.group`, the key of a feature that is one text or integer, or None.

    Raises:
        InputError: There is no such feature.
    """
    if data.group is None:
        return None
    usable = [
        key
        for key, feature in features.items()
        if getattr(feature, "shape", None) == ()
        and (feature.np_dtype in (str, np.str_, object, bytes) or np.issubdtype(feature.np_dtype, np.integer))
    ]
    if data.group not in usable:
        raise InputError(f"data.group: expected one of {', '.join(usable)} in {data.name}, received {data.group!r}")
    return data.group


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
