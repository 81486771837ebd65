"""Roles that share no group: slices in percent, and val out of train, take whole groups, with classes in proportion."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from flatmin.common.errors import InputError
from flatmin.data.sources.base import Example, Slice, Source

PARTS = 10  # into which groups are divided, each with the classes in proportion
ORDERS = 100  # of these parts, of which the one is taken whose cuts are nearest to what was asked
APART = ("train", "val", "test")  # roles that share no group; what predict shares spoils no figure


class Grouped(Source):
    """A source whose slices in percent are of whole groups, in an order of groups; other slices are as they were.

    The sizes are as near to the percentages as groups allow. A split of which any slice is by numbers keeps its order.
    """

    def __init__(self, source: Source, seed: int) -> None:
        """Wrap a source with groups.

        Args:
            seed: Draws the order of the groups.

        Raises:
            InputError: A split has fewer groups than slices.
        """
        self.class_names, self.version, self.splits = source.class_names, source.version, source.splits
        self.expressions, self.ignored, self.empty = source.expressions, source.ignored, source.empty
        self._source, self._seed = source, seed
        self._order = cache(self._order_of)
        parts = [part.strip() for expression in self.expressions.values() for part in expression.split("+")]
        in_percent = {part.partition("[")[0] for part in parts if "%" in part}
        by_numbers = {part.partition("[")[0] for part in parts if "[" in part and "%" not in part}
        self._bounds = {split: self._snap(split) for split in sorted(in_percent - by_numbers)}

    def _order_of(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Each example's place in the order of groups, int64 [n], and the places where a group ends."""
        groups = self._source.groups(split)
        order = in_order(groups, self._source.labels(split), self._seed, self._wanted(split))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return place, ends(groups[order])

    def _snap(self, split: str) -> dict[int, int]:
        """By the place where a slice of a split would begin or end, the place where it does."""
        size = self.splits[split].num_examples
        return {0: 0, size: size} | snap(self._wanted(split), self._order(split)[1], split)

    def _wanted(self, split: str) -> list[int]:
        """The places where slices of a split would begin or end, but its own beginning and end."""
        slices = [each for text in self.expressions.values() for each in self._source.locate(text)]
        places = {place for each in slices if each.split == split for place in each[1:]}
        return sorted(places - {0, self.splits[split].num_examples})

    def locate(self, expression: str, key: str = "data.splits") -> list[Slice]:
        """Return the slices that a split expression stands for, in the order of groups where that is followed."""
        found = []
        for split, start, stop in self._source.locate(expression, key):
            bounds = self._bounds.get(split)
            found.append(Slice(split, bounds[start], bounds[stop]) if bounds else Slice(split, start, stop))
        return found

    def examples(self, expression: str) -> Iterator[Example]:
        for text, taken in self._reads(expression):
            for example, is_taken in zip(self._source.examples(text), taken, strict=True):
                if is_taken:
                    yield example

    def labels(self, expression: str) -> np.ndarray:
        return np.concatenate([self._source.labels(text)[taken] for text, taken in self._reads(expression)])

    def groups(self, expression: str) -> np.ndarray:
        return np.concatenate([self._source.groups(text)[taken] for text, taken in self._reads(expression)])

    def _reads(self, expression: str) -> Iterator[tuple[str, np.ndarray]]:
        """What to read of the source for each slice, and which of it is in the slice, bool [n]."""
        for split, start, stop in self.locate(expression):
            if split in self._bounds:
                place, _ = self._order(split)
                yield split, (start <= place) & (place < stop)
            else:
                yield f"{split}[{start}:{stop}]", np.ones(stop - start, bool)


def in_order(groups: np.ndarray, labels: np.ndarray, seed: int, wanted: Sequence[int] = ()) -> np.ndarray:
    """Order examples group by group, so that any first part has the classes nearly in proportion.

    Args:
        groups: text [n]. labels: int [n].
        seed: draws the order.
        wanted: places where the examples are to be cut, sorted; large groups are where they are least in the way.

    Returns:
        int64 [n]: the examples' indices in their new order.
    """
    _, sizes = np.unique(labels, return_counts=True)
    folds = min(PARTS, len(np.unique(groups)), int(sizes.max()))
    if folds < 2:
        return np.argsort(groups, kind="stable")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        parts = [left_out for _, left_out in splitter.split(labels, labels, groups)]
    parts = [part[np.argsort(groups[part], kind="stable")] for part in parts]
    return np.concatenate([parts[index] for index in _nearest([groups[part] for part in parts], wanted, seed)])


def _nearest(parts: Sequence[np.ndarray], wanted: Sequence[int], seed: int) -> list[int]:
    """The order of parts (the groups of each, text [n], in order) whose cuts are nearest to the wanted ones.

    It is the best of ORDERS that are drawn, the parts' own first; of equals the first.
    """
    sizes = [np.diff([0, *ends(part), len(part)]) for part in parts]
    random = np.random.default_rng([seed, 3])

    def distance(order: Sequence[int]) -> int:
        possible = np.cumsum(np.concatenate([sizes[index] for index in order]))[:-1]
        if len(wanted) > len(possible):
            return 0  # no order has enough
        return sum(abs(place - cut) for place, cut in snap(wanted, possible, "").items())

    drawn = [random.permutation(len(parts)).tolist() for _ in range(ORDERS - 1)]
    return min([list(range(len(parts))), *drawn], key=distance)


def ends(groups: np.ndarray) -> np.ndarray:
    """The places where one group ends and another begins, int64, of groups in order, text [n]."""
    return np.flatnonzero(groups[1:] != groups[:-1]) + 1


def snap(wanted: Sequence[int], possible: np.ndarray, what: str) -> dict[int, int]:
    """By each place of a cut that is wanted, in order, the nearest possible one, such that no two are the same.

    Raises:
        InputError: There are too few groups, of `what`.
    """
    if len(wanted) > len(possible):
        raise InputError(
            f"data.group: expected at least {len(wanted) + 1} groups in {what}, one for each role, received"
            f" {len(possible) + 1}"
        )
    found: dict[int, int] = {}
    first = 0
    for left, place in zip(range(len(wanted) - 1, -1, -1), wanted, strict=True):
        choices = possible[first : len(possible) - left]
        chosen = int(np.abs(choices - place).argmin())
        found[place], first = int(choices[chosen]), first + chosen + 1
    return found


def carve(groups: np.ndarray, labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose whole groups of train for val. Returns bool [n], about `fraction` of the examples.

    Raises:
        InputError: There is one group alone.
    """
    wanted = max(1, round(fraction * len(groups)))
    order = in_order(groups, labels, seed, [wanted])
    chosen = np.zeros(len(order), bool)
    chosen[order[: snap([wanted], ends(groups[order]), "train's split")[wanted]]] = True
    return chosen


def refuse_shared(groups: Iterable[tuple[str, np.ndarray]]) -> None:
    """Refuse roles that share a group: given splits, or slices by numbers.

    Args:
        groups: each role with the groups of its examples, text [n].

    Raises:
        InputError: There is such a group.
    """
    owners: dict[str, str] = {}
    for role, names in groups:
        for name in np.unique(names).tolist():
            owner = owners.setdefault(name, role)
            if owner != role:
                raise InputError(
                    f"data.group: expected each group in one role, received {name!r} in {owner} and {role}; slices in"
                    " percent follow groups, slices by numbers and the splits of the source must not divide one"
                )
