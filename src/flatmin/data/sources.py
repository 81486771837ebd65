"""Where images come from: an installed package, TensorFlow Datasets or a folder; and how one image is read.

A source streams encoded images in a fixed order and understands TFDS's split expressions: `train`,
`train[:90%]`, `train[100:200]+test`. What has no splits of its own has one called `train`, as in TFDS.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flatmin.common import errors
from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import images

SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pnm",
    }
)
NAME_FEATURES = ("name", "file_name", "filename", "image/filename", "image/file_name", "id")
UNKNOWN = -1


class Example(NamedTuple):
    """image: the encoded bytes as they came. label: a class's index, -1 where unknown. name: for people."""

    image: bytes
    label: int
    name: str


class Slice(NamedTuple):
    """The examples `start` to `stop` (not included) of a split."""

    split: str
    start: int
    stop: int


class Source(ABC):
    """A data set, read without keeping it in memory.

    class_names: in the order of the labels. version: of the data. splits: TFDS's SplitInfo of each.
    """

    class_names: list[str]
    version: str
    splits: Mapping[str, Any]

    def locate(self, expression: str, key: str = "data.splits") -> list[Slice]:
        """The slices that a split expression stands for; empty ones are left out.

        Raises:
            InputError: the expression, which is `key`'s value, is none, or names a split that isn't there.
        """
        import tensorflow_datasets as tfds

        try:
            parts = tfds.core.ReadInstruction.from_spec(expression).to_absolute(self.splits)
        except (ValueError, AssertionError) as error:
            there = ", ".join(f"{name} ({split.num_examples})" for name, split in self.splits.items())
            reason = errors.first_line(str(error))
            raise InputError(f"{key}: expected slices of {there}, received {expression!r}: {reason}") from None
        sizes = {name: split.num_examples for name, split in self.splits.items()}
        slices = [
            Slice(part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
            for part in parts
        ]
        return [part for part in slices if part.start < part.stop]

    @abstractmethod
    def examples(self, expression: str) -> Iterator[Example]:
        """Stream the examples of a split expression, in the same order each time."""

    @abstractmethod
    def labels(self, expression: str) -> np.ndarray:
        """int32 [n]: the labels that `examples` would give, without reading an image."""


def open_source(data: Data, seed: int) -> Source:
    """The source that the `data` section names; no image is read yet.

    `seed` orders what `bundled` and `folder` give (see `balanced_order`); TFDS keeps its own order.

    Raises:
        InputError: there is no such data set, or it is not one of images with one label each.
    """
    match data.source:
        case "bundled":
            return _Digits(data.name, seed)
        case "folder":
            return _Folder(data.name, seed)
        case _:
            return _Tfds(data.name)


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """int64 [n]: an order of the examples in which every slice holds the classes in proportion.

    A class of m examples, shuffled by the seed, is spread evenly: its r-th comes at (r + 0.5) / m of the way,
    and the seed decides between equals. If the classes are of one size, any beginning holds as many of one
    class as of another, or one more. Examples without labels stay in the order they are in.

    Args:
        labels: int32 [n], all of them -1 or none.
    """
    if len(labels) == 0 or labels.max() == UNKNOWN:
        return np.arange(len(labels))
    random = np.random.default_rng([seed, 0])
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((random.permutation(len(labels)), position))


class _Listed(Source):
    """A source whose names and labels are known beforehand."""

    def __init__(
        self, class_names: list[str], version: str, items: Mapping[str, Sequence[tuple[str, int]]], seed: int
    ) -> None:
        import tensorflow_datasets as tfds

        self.class_names, self.version = class_names, version
        self._names: dict[str, list[str]] = {}
        self._labels: dict[str, np.ndarray] = {}
        for split, pairs in items.items():
            labels = np.array([label for _, label in pairs], np.int32)
            order = balanced_order(labels, seed)
            self._names[split] = [pairs[index][0] for index in order]
            self._labels[split] = labels[order]
        self.splits = {
            split: tfds.core.SplitInfo(name=split, shard_lengths=[len(pairs)], num_bytes=0)
            for split, pairs in items.items()
        }

    def examples(self, expression: str) -> Iterator[Example]:
        for split, start, stop in self.locate(expression):
            for name, label in zip(
                self._names[split][start:stop], self._labels[split][start:stop].tolist(), strict=True
            ):
                yield Example(self._read(name), label, name)

    def labels(self, expression: str) -> np.ndarray:
        parts = [self._labels[split][start:stop] for split, start, stop in self.locate(expression)]
        return np.concatenate([np.empty(0, np.int32), *parts])

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """The encoded image of that name."""


class _Digits(_Listed):
    """scikit-learn's 1,797 scans of handwritten digits: grey, 8x8, 17 levels, here spread over 0 to 255."""

    def __init__(self, name: str, seed: int) -> None:
        if name != "digits":
            raise InputError(f"data.name: expected digits, which is what data.source bundled has, received {name!r}")
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        items = [(f"digits/{index:04d}", int(label)) for index, label in enumerate(digits.target)]
        super().__init__([str(name) for name in digits.target_names], version("scikit-learn"), {"train": items}, seed)

    def _read(self, name: str) -> bytes:
        return images.to_png(Image.fromarray(self._pixels[int(name.removeprefix("digits/"))]))


class _Folder(_Listed):
    """A folder for each class; or, for each split, a folder that holds these, or images without labels.

    They are splits where any image lies two folders deep or deeper. The classes are those of all the splits
    together, sorted. Images lie anywhere below their class's folder; the suffix tells what is one, and hidden
    files and folders are left out. The version is a digest of the names and sizes of the files.
    """

    def __init__(self, name: str, seed: int) -> None:
        self._root = Path(name).expanduser()
        if not self._root.is_dir():
            raise InputError(f"data.name: expected a folder, received {name!r}")
        files = sorted(_images(self._root))
        loose = [file for file in files if "/" not in file]
        if loose or not files:
            received = f"{loose[0]!r} outside of one" if loose else f"none in {name!r}"
            raise InputError(f"data.name: expected images in a folder for each class, received {received}")
        if all(file.count("/") == 1 for file in files):
            located = [("train", file.split("/")[0], file) for file in files]
        else:
            located = [_in_split(file) for file in files]
        class_names = sorted({class_name for _, class_name, _ in located if class_name})
        label_of = {class_name: label for label, class_name in enumerate(class_names)}
        items: dict[str, list[tuple[str, int]]] = {}
        for split, class_name, file in located:
            items.setdefault(split, []).append((file, label_of.get(class_name, UNKNOWN)))
        _refuse_half_labelled(items)
        super().__init__(class_names, _listing_digest(self._root, files), items, seed)

    def _read(self, name: str) -> bytes:
        try:
            return (self._root / name).read_bytes()
        except OSError:
            return b""  # as broken as an empty file; whoever decodes it names it and counts it


def _in_split(file: str) -> tuple[str, str, str]:
    """(split, class or nothing, file) of `split/class/.../file` or `split/file`."""
    split, *classes = file.split("/")[:-1]
    return split, classes[0] if classes else "", file


def _refuse_half_labelled(items: Mapping[str, Sequence[tuple[str, int]]]) -> None:
    for split, pairs in items.items():
        if len({label == UNKNOWN for _, label in pairs}) == 2:
            loose = next(file for file, label in pairs if label == UNKNOWN)
            raise InputError(
                f"data.name: expected all images of {split!r} in class folders, or none, received {loose!r}"
            )


def _images(root: Path) -> Iterator[str]:
    """Paths below `root`, with forward slashes. No link may lead out of it: that is hardly ever meant."""
    inside = root.resolve()
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise InputError(f"data.name: expected folders, received {Path(folder) / name}, a symbolic link")
        for name in files:
            path = Path(folder) / name
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise InputError(f"data.name: expected files within {root}, received {path}, a link that leaves it")
            if not _is_utf8(name) or not _is_utf8(folder):
                raise InputError(f"data.name: expected names in UTF-8, received {str(path)!r}")
            if path.is_file() or not path.exists():  # a link to nowhere is a broken image, a pipe is none at all
                yield path.relative_to(root).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listing_digest(root: Path, files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        path = root / file
        digest.update(f"{file}\0{path.stat().st_size if path.exists() else 'none'}\n".encode())
    return digest.hexdigest()[:16]


class _Tfds(Source):
    """A builder of TensorFlow Datasets, in TFDS's order."""

    def __init__(self, name: str) -> None:
        self._builder = _prepared_builder(name)
        info = self._builder.info
        self.version = str(self._builder.version)
        self.splits = info.splits
        self._image, self._label = _image_and_label(name, info)
        self._name = _name_feature(info.features)
        self.class_names = list(info.features[self._label].names)

    def examples(self, expression: str) -> Iterator[Example]:
        import tensorflow_datasets as tfds

        name = self._name or "tfds_id"
        decoders = {self._image: tfds.decode.SkipDecoding()}
        for features in self._read(expression, decoders, add_tfds_id=not self._name):
            text = features[name].decode("utf-8", "backslashreplace")
            yield Example(features[self._image], int(features[self._label]), text)

    def labels(self, expression: str) -> np.ndarray:
        import tensorflow_datasets as tfds

        label_only = tfds.decode.PartialDecoding({self._label: True})
        found = (features[self._label] for features in self._read(expression, label_only))
        return np.fromiter(found, np.int32)

    def _read(self, expression: str, decoders: Any, add_tfds_id: bool = False) -> Iterator[dict[str, Any]]:
        import tensorflow as tf
        import tensorflow_datasets as tfds

        with _without_deprecations():
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
                f"data.name: expected whole files in {self._builder.data_path}, received: {_first_line(error)}"
            ) from None


@contextmanager
def _without_deprecations() -> Iterator[None]:
    """TFDS calls what it and TensorFlow log to be deprecated; nobody who reads the log can act on it."""
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
    import tensorflow_datasets as tfds

    folder = os.environ.get("TFDS_DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=folder)
    except Exception as error:  # TFDS imports the builder's own code, which may raise anything
        raise InputError(f"data.name: expected a TFDS builder, received {name!r}: {_first_line(error)}") from None
    if not builder.is_prepared():
        try:
            builder.download_and_prepare()
        except Exception as error:  # the same
            raise InputError(
                f"data.name: expected {name} in {builder.data_path}, found none, and making it failed:"
                f" {_first_line(error)}; run `tfds build {name}` where there is a network, or set"
                " TFDS_DATA_DIR to where it is"
            ) from None
    return builder


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {errors.first_line(str(error))[:200]}"


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    """The keys of the two features: TFDS's supervised pair if it fits, else the only ones of their type."""
    import tensorflow_datasets as tfds

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
    """The key of the text that names an example, if there is one."""
    names = [key for key in NAME_FEATURES if key in features]
    return next((key for key in names if features[key].np_dtype in (str, np.str_, object, bytes)), None)
