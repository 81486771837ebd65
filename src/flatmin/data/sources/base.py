"""The interface of a data source, and the part that sources with a known list of examples share.

A source streams encoded images in a fixed order and understands TFDS's split expressions, such as `train`,
`train[:90%]` or `train[100:200]+test`. A source that has no splits gets a single one called `train`, as in TFDS.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from flatmin.common import console, errors
from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data.sources import roles
from flatmin.images import BrokenImageError

UNKNOWN = -1  # the label of an example whose class is not known


class Example(NamedTuple):
    """One example of a source.

    Attributes:
        image: The encoded bytes, unchanged; none if they cannot be read.
        label: Index of the class, or `UNKNOWN`.
        name: Identifies the example to a person.
        true_label: The source's label where another one may have been drawn; else None.
        unreadable: Why there are no bytes.
        group: The group of `data.group`; else None.
    """

    image: bytes
    label: int
    name: str
    true_label: int | None = None
    unreadable: str = ""
    group: str | None = None

    def encoded(self) -> bytes:
        """Return the encoded bytes.

        Raises:
            BrokenImageError: They cannot be read.
        """
        if self.unreadable:
            raise BrokenImageError(self.unreadable)
        return self.image


class Slice(NamedTuple):
    """The examples from `start` up to but not including `stop` of a split."""

    split: str
    start: int
    stop: int


class Source(ABC):
    """A data set that is read one example at a time.

    Attributes:
        class_names: Names of the classes in the order of the labels.
        version: Version of the data.
        splits: TFDS's SplitInfo of each split.
        expressions: The split expression of each role, in the order of `ROLES`.
        ignored: The number of files that are no examples, by reason and suffix.
        empty: The folders that hold no picture.
    """

    class_names: list[str]
    version: str
    splits: Mapping[str, Any]
    expressions: dict[str, str]
    ignored: Mapping[str, Mapping[str, int]] = {}
    empty: Sequence[str] = ()

    def locate(self, expression: str, key: str = "data.splits") -> list[Slice]:
        """Return the slices that a split expression stands for, without empty ones.

        Raises:
            InputError: The expression, the value of `key`, is malformed or names a split that does not exist.
        """
        sizes = {name: split.num_examples for name, split in self.splits.items()}
        plain = {name: name if re.fullmatch(r"[\w-]+", name) else f"odd-split-{i}" for i, name in enumerate(sizes)}
        split_of = {new: name for name, new in plain.items()}
        try:
            instruction = tfds.core.ReadInstruction.from_spec(_renamed(expression, plain))
            parts = instruction.to_absolute({new: self.splits[name] for new, name in split_of.items()})
        except (ValueError, AssertionError, NotImplementedError) as error:
            available = ", ".join(f"{name} ({size})" for name, size in sizes.items())
            reason = errors.first_line(str(error)).partition(". See format at")[0]
            raise InputError(f"{key}: expected slices of {available}, received {expression!r}: {reason}") from None
        absolute = [(split_of[part.splitname], part) for part in parts]
        slices = [
            Slice(split, part.from_ or 0, sizes[split] if part.to is None else part.to) for split, part in absolute
        ]
        return [part for part in slices if part.start < part.stop]

    @abstractmethod
    def examples(self, expression: str) -> Iterator[Example]:
        """Stream the examples of a split expression, always in the same order."""

    @abstractmethod
    def labels(self, expression: str) -> np.ndarray:
        """Return the labels of `examples(expression)`, int32 [n], without reading any image."""

    @abstractmethod
    def groups(self, expression: str) -> np.ndarray:
        """Return the groups of `examples(expression)`, text [n], without reading any image; only with `data.group`."""


def _renamed(expression: str, names: Mapping[str, str]) -> str:
    """Replace the names of splits in a split expression: TFDS takes no spaces in them, but folders have some."""
    parts = (part.strip().partition("[") for part in expression.split("+"))
    return "+".join(names.get(name, name) + bracket + rest for name, bracket, rest in parts)


class ListedSource(Source):
    """A source whose names and classes are known before any image is read.

    Classes are in the order of `roles.in_order`, and each split is in that of `balanced_order`. The classes of splits
    that are only predicted, or unused, do not count.
    """

    # How an example has its class, and how it has none.
    HAS_CLASS, HAS_NO_CLASS = "with a label", "without one"

    def __init__(
        self,
        data: Data,
        version: str,
        items: Mapping[str, Sequence[tuple[str, str]]],
        groups: Mapping[str, str] | None = None,
    ) -> None:
        """Take the examples.

        Args:
            data: The `data` section.
            version: Version of the data.
            items: The names of each split's examples, each with its class, "" if that is not known.
            groups: The group of each example by its name, with `data.group`.

        Raises:
            InputError: The classes or splits cannot be what the user means.
        """
        self.version = version
        if "all" in items:
            raise InputError("data.name: expected no split named 'all', which stands for all of them")
        self._groups = groups or {}
        sizes = {split: len(pairs) for split, pairs in items.items()}
        self.splits = {
            split: tfds.core.SplitInfo(name=split, shard_lengths=[size], num_bytes=0) for split, size in sizes.items()
        }
        self.expressions = roles.expressions(data, sizes)
        for role, expression in self.expressions.items():
            self.locate(expression, f"data.splits.{role}")
        roles.refuse_unused(data, self.expressions, sizes)
        scored = [roles.named_splits(text, items) for role, text in self.expressions.items() if role != "predict"]
        classes = {split: {name for _, name in items[split]} for split in sorted(set().union(*scored))}
        for split in classes:
            self._refuse_partly_labelled(split, items[split])
        classes = {split: names - {""} for split, names in classes.items()}
        for first, second in roles.refuse_spellings(classes):
            console.log(f"prepare: the classes {first!r} and {second!r} differ only in their spelling")
        roles.refuse_lacking(classes, self.expressions)
        names = set().union(*classes.values())
        self.class_names = roles.in_order(names)
        if self.class_names != sorted(names):
            console.log(f"prepare: the classes are in numeric order: {', '.join(self.class_names[:3])}, ...")
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._names: dict[str, list[str]] = {}
        self._labels: dict[str, np.ndarray] = {}
        for split, pairs in items.items():
            # All unknown, where the split counts for nothing.
            split_labels = [labels[name] if name and split in classes else UNKNOWN for _, name in pairs]
            self._labels[split] = np.array(split_labels, np.int32)
            order = balanced_order(self._labels[split], data.seed)
            self._labels[split] = self._labels[split][order]
            self._names[split] = [pairs[index][0] for index in order]

    def _refuse_partly_labelled(self, split: str, pairs: Sequence[tuple[str, str]]) -> None:
        unlabelled = [name for name, class_name in pairs if not class_name]
        if 0 < len(unlabelled) < len(pairs):
            raise InputError(
                f"data.name: expected all or none of the images of {split!r} {self.HAS_CLASS},"
                f" received {unlabelled[0]!r} {self.HAS_NO_CLASS}"
            )

    def examples(self, expression: str) -> Iterator[Example]:
        for split, start, stop in self.locate(expression):
            names, labels = self._names[split][start:stop], self._labels[split][start:stop].tolist()
            for name, label in zip(names, labels, strict=True):
                group = self._groups.get(name)
                try:
                    example = Example(self._read(name), label, name, group=group)
                except BrokenImageError as error:
                    example = Example(b"", label, name, group=group, unreadable=str(error))
                yield example

    def groups(self, expression: str) -> np.ndarray:
        names = [name for split, start, stop in self.locate(expression) for name in self._names[split][start:stop]]
        return np.array([self._groups[name] for name in names], np.str_)

    def labels(self, expression: str) -> np.ndarray:
        parts = [self._labels[split][start:stop] for split, start, stop in self.locate(expression)]
        return np.concatenate([np.empty(0, np.int32), *parts])

    @abstractmethod
    def _read(self, name: str) -> bytes:
        """Return the encoded image of that name.

        Raises:
            BrokenImageError: It cannot be read.
        """


def balanced_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Order the examples so that every slice holds the classes in proportion.

    A class of m examples is shuffled by the seed and spread evenly: its r-th example goes to position (r + 0.5) / m
    of the whole, and the seed breaks ties. If all classes have the same size, their counts in any first part differ
    by at most one. Examples without labels keep their order.

    Args:
        labels: int32 [n], either all `UNKNOWN` or none.

    Returns:
        int64 [n]: the examples' indices in their new order.
    """
    if len(labels) == 0 or labels.max() == UNKNOWN:
        return np.arange(len(labels))
    random = np.random.default_rng([seed, 0])
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((random.permutation(len(labels)), position))
