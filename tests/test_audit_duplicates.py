"""Each picture's most alike ones."""

from __future__ import annotations

import numpy as np
import pytest

from flatmin.audit import duplicates
from flatmin.audit.duplicates import Match, Places
from flatmin.audit.similarity import Pairs


@pytest.fixture
def places() -> Places:
    """Three pictures of train, two of test and one to predict."""
    role = np.array([0, 0, 0, 1, 1, 2], np.int8)
    position = np.array([0, 1, 2, 0, 1, 0])
    return Places(["train", "test", "predict"], role, position, np.array([5, 6, 5, 5, 6, -1], np.int32))


def pairs(*rows: tuple[int, int, float, int]) -> Pairs:
    first, second, cosine, bits = zip(*rows, strict=True)
    return Pairs(np.array(first), np.array(second), np.array(cosine, np.float32), np.array(bits, np.int16))


def test_find_keeps_the_most_alike_of_each_role_whatever_the_blocks(places: Places) -> None:
    rows = [(0, 3, 0.75, 4), (1, 3, 0.875, 2), (2, 3, 0.5, 1), (0, 2, 0.25, 9), (3, 5, 0.75, 3)]
    expected = [Match(0, 2, 0.25, 9), Match(2, 0, 0.25, 9), Match(3, 1, 0.875, 2), Match(5, 3, 0.75, 3)]
    for blocks in ([pairs(*rows)], [pairs(row) for row in rows], [pairs(row) for row in reversed(rows)]):
        alike, _ = duplicates.find(blocks, places)
        assert list(alike) == expected
    assert alike.has("test", "train").tolist() == [True, False]
    assert alike.has("train", "train").tolist() == [True, False, True]
    assert alike.has("predict", "test").tolist() == [True]
    assert not alike.has("test", "test").any()


def test_find_contradictions_are_pairs_with_two_known_labels(places: Places) -> None:
    """The most alike picture with another label counts, though one with the same is more alike."""
    rows = [(0, 3, 0.875, 1), (1, 3, 0.75, 2), (4, 5, 0.75, 1), (3, 4, 0.5, 1)]
    alike, contradicting = duplicates.find([pairs(*rows)], places)
    assert next(iter(alike)) == Match(3, 0, 0.875, 1)
    assert list(contradicting) == [Match(3, 1, 0.75, 2), Match(3, 4, 0.5, 1), Match(4, 3, 0.5, 1)]


def test_find_without_pairs_has_none(places: Places) -> None:
    alike, contradicting = duplicates.find([], places)
    assert list(alike) == list(contradicting) == []
    assert not alike.has("train", "train").any()
