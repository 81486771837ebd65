"""Near duplicates of each picture: the most alike one in each role, whatever the number of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from flatmin.audit.similarity import Pairs
from flatmin.inputs.records import Records

NONE = -1


@dataclass(frozen=True)
class Places:
    """The pictures of several roles in a row.

    Attributes:
        roles: their names, in the records' order.
        role: int8 [n], the index of each picture's role. position: int64 [n], its position there.
        labels: int32 [n], -1 where the label is not known.
    """

    roles: Sequence[str]
    role: np.ndarray
    position: np.ndarray
    labels: np.ndarray

    @classmethod
    def read(cls, records: Records) -> Self:
        roles = records.roles
        counts = [records.count(role) for role in roles]
        return cls(
            roles,
            np.repeat(np.arange(len(roles), dtype=np.int8), counts),
            np.concatenate([np.arange(count) for count in counts]),
            np.concatenate([records.labels(role) for role in roles]),
        )

    def of(self, roles: Iterable[str]) -> np.ndarray:
        """The places of the pictures of these roles, int64 [m]."""
        return np.flatnonzero(np.isin(self.role, [self.roles.index(role) for role in roles]))

    def contradict(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whether the labels of pictures differ, bool; unknown ones don't."""
        one, other = self.labels[first], self.labels[second]
        return (one != other) & (one >= 0) & (other >= 0)


class Match(NamedTuple):
    """A picture and the one that it is most like, among those of a role: places, and as in `Pairs`."""

    place: int
    like: int
    cosine: float
    bits: int


class Matches:
    """For each picture and each role up to its own, in the records' order: the picture there that it is most like.

    Memory grows with the pictures, not with the pairs, of which a thousand equal pictures make half a million.
    """

    def __init__(self, places: Places) -> None:
        shape = (len(places.roles), len(places.role))
        self._places = places
        self._like = np.full(shape, NONE, np.int64)
        self._cosine = np.full(shape, -np.inf, np.float32)
        self._bits = np.zeros(shape, np.int16)

    def add(self, pairs: Pairs) -> None:
        """Keep of these pairs what is more alike than what is known."""
        role = self._places.role
        place, like = np.concatenate([pairs[:2], pairs[1::-1]], axis=1)
        cosine, bits = np.tile(pairs.cosine, 2), np.tile(pairs.bits, 2)
        earlier = np.flatnonzero(role[like] <= role[place])
        key = np.ravel_multi_index((role[like[earlier]], place[earlier]), self._like.shape)
        order = np.lexsort((like[earlier], -cosine[earlier], key))
        keys, firsts = np.unique(key[order], return_index=True)
        best = earlier[order[firsts]]
        better = cosine[best] > self._cosine.flat[keys]
        keys, best = keys[better], best[better]
        self._like.flat[keys], self._cosine.flat[keys], self._bits.flat[keys] = like[best], cosine[best], bits[best]

    def has(self, role: str, like: str) -> np.ndarray:
        """Whether each picture of `role` has one in the role `like`: bool [pictures of role]."""
        return self._like[self._places.roles.index(like), self._places.of([role])] != NONE

    def __iter__(self) -> Iterator[Match]:
        """Each picture with each of its matches, in order."""
        for place, role in np.argwhere(self._like.T != NONE).tolist():
            at = role, place
            yield Match(place, int(self._like[at]), float(self._cosine[at]), int(self._bits[at]))


def find(pairs: Iterable[Pairs], places: Places) -> tuple[Matches, Matches]:
    """The matches of all pairs, and those whose labels contradict each other."""
    alike, contradicting = Matches(places), Matches(places)
    for block in pairs:
        alike.add(block)
        differ = places.contradict(block.first, block.second)
        if differ.any():
            contradicting.add(Pairs(*(values[differ] for values in block)))
    return alike, contradicting
