"""One fold of a k-fold cross-validation: train's split without it is trained on, and the fold is test."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from flatmin.common.errors import InputError
from flatmin.common.params import ROLES
from flatmin.data.sources.base import Example, Slice, Source
from flatmin.data.splits import count_examples

FOLD, OTHERS = "the fold", "the other folds"  # of train's split: two expressions more


class Folded(Source):
    """A source whose test is a fold of train's split, and whose train is the other folds.

    Folds are stratified, and of whole groups where there are groups. Those of one seed and number are disjoint, and
    together all of the split.
    """

    def __init__(self, source: Source, folds: int, fold: int, seed: int, grouped: bool) -> None:
        """Wrap a source.

        Args:
            folds: Their number. fold: The one to test on, from 0 on.
            seed: Draws the folds.
            grouped: Whether the source has groups.

        Raises:
            InputError: There are too few images or groups, or an example is in two splits, or twice in one.
        """
        count_examples(source, source.expressions)  # here, since places among folds are no longer those of the split
        self.class_names, self.version, self.splits = source.class_names, source.version, source.splits
        self.ignored, self.empty = source.ignored, source.empty
        self._source, self._pool = source, source.expressions["train"]
        named = {**source.expressions, "train": OTHERS, "test": FOLD}
        self.expressions = {role: named[role] for role in ROLES if role in named}
        groups = source.groups(self._pool) if grouped else None
        self._in_fold = in_fold(source.labels(self._pool), groups, folds, fold, seed)

    def locate(self, expression: str, key: str = "data.splits") -> list[Slice]:
        """Return the slices of an expression: of FOLD and OTHERS, places in an order in which the fold comes first."""
        if expression not in (FOLD, OTHERS):
            return self._source.locate(expression, key)
        size, total = int(self._in_fold.sum()), len(self._in_fold)
        start, stop = (0, size) if expression == FOLD else (size, total)
        return [Slice(f"{self._pool}, its folds", start, stop)]

    def examples(self, expression: str) -> Iterator[Example]:
        pool, taken = self._reads(expression)
        for index, example in enumerate(self._source.examples(pool)):
            if taken is None or taken[index]:
                yield example

    def labels(self, expression: str) -> np.ndarray:
        pool, taken = self._reads(expression)
        labels = self._source.labels(pool)
        return labels if taken is None else labels[taken]

    def groups(self, expression: str) -> np.ndarray:
        pool, taken = self._reads(expression)
        groups = self._source.groups(pool)
        return groups if taken is None else groups[taken]

    def _reads(self, expression: str) -> tuple[str, np.ndarray | None]:
        """The source's expression to read, and which of its examples to take; None for all."""
        if expression in (FOLD, OTHERS):
            return self._pool, self._in_fold == (expression == FOLD)
        return expression, None


def in_fold(labels: np.ndarray, groups: np.ndarray | None, folds: int, fold: int, seed: int) -> np.ndarray:
    """Whether each example is in a fold: bool [n].

    Args:
        labels: int [n]. groups: text [n], or None.

    Raises:
        InputError: There are fewer groups than folds, or no class has as many images.
    """
    _, sizes = np.unique(labels, return_counts=True)
    most, what = (int(sizes.max()), "images of the largest class")
    if groups is not None and len(np.unique(groups)) < most:
        most, what = len(np.unique(groups)), "groups"
    if folds > most:
        raise InputError(f"data.folds: expected at most {most}, the number of {what}, received {folds}")
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        chosen = [left_out for _, left_out in splitter.split(labels, labels, groups)][fold]
    found = np.zeros(len(labels), bool)
    found[chosen] = True
    return found
