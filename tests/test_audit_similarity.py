"""Hashes, whitening and pairs of alike pictures."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from flatmin.audit import similarity
from flatmin.audit.similarity import BITS, SIDE, Whitening


def smooth_pictures(count: int, seed: int = 0) -> np.ndarray:
    """Pictures of a few low frequencies, as most are: float32 [count, SIDE, SIDE, 3] in [0, 255]."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (count, 8, 8, 3))
    return np.kron(coarse, np.ones((1, SIDE // 8, SIDE // 8, 1))).astype(np.float32)


def test_hashes_of_a_picture_brighter_or_with_more_contrast_are_its_own() -> None:
    pictures = smooth_pictures(20)
    found = similarity.hashes(pictures)
    assert found.shape == (20, BITS)
    assert set(np.unique(found)) == {-1, 1}
    assert (similarity.hashes(pictures + 20) == found).all()
    assert (similarity.different_bits(similarity.hashes(0.5 * pictures), found) == 0).all()


def test_different_bits_of_mirrored_pictures_are_none_and_of_others_about_half() -> None:
    pictures = smooth_pictures(50)
    found = similarity.hashes(pictures)
    mirrored = similarity.hashes(pictures[:, :, ::-1])
    assert (similarity.different_bits(mirrored, found) == 0).all()
    assert (mirrored != found).any(axis=1).all()
    upside_down = similarity.hashes(pictures[:, ::-1])
    assert similarity.different_bits(upside_down, found).min() > 10
    others = similarity.different_bits(np.roll(found, 1, axis=0), found)
    assert 20 < others.mean() < BITS / 2


def test_whitening_gives_components_of_like_variance_and_drops_what_all_have() -> None:
    random = np.random.default_rng(0)
    scales = np.array([100.0, 100.0, 10.0, 0.001])
    activations = 50 + scales * random.normal(size=(4000, 4))
    white = Whitening.fit(activations)(activations)
    assert white.dtype == np.float32
    assert np.abs(white.mean(axis=0)).max() < 0.01
    deviation = white.std(axis=0)
    assert deviation[0] == pytest.approx(deviation[1], rel=0.05)
    assert deviation[3] < 1e-3, "what hardly varies is not amplified"


def test_whitening_of_fewer_pictures_than_channels_has_no_more_components_than_they_span() -> None:
    activations = np.random.default_rng(0).normal(size=(5, 40))
    white = Whitening.fit(activations)(activations)
    assert white.shape == (5, 4)
    assert np.isfinite(white).all()


def test_equal_pictures_are_alike_also_where_there_are_no_others() -> None:
    """Whitening leaves nothing of what all have."""
    activations = np.ones((6, 3))
    white = Whitening.fit(activations)(activations)
    assert (white == 0).all()
    signs = np.ones((6, BITS), np.float32)
    assert sum(len(pairs.first) for pairs in similarity.alike(similarity.unit(white), signs, 1.0, 0)) == 15


def test_alike_gives_each_pair_once_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as by all products at once, whatever the size of a block."""
    random = np.random.default_rng(1)
    vectors = similarity.unit(random.normal(size=(50, 6)).astype(np.float32))
    signs = np.sign(random.normal(size=(50, BITS))).astype(np.float32)
    expected = {
        (first, second)
        for first in range(50)
        for second in range(first + 1, 50)
        for bits in [similarity.different_bits(signs[first : first + 1], signs[second : second + 1])[0]]
        if bits <= 30 and vectors[first] @ vectors[second] >= -0.7 + 0.03 * bits
    }
    for block in (7, 50, 64):
        monkeypatch.setattr(similarity, "BLOCK", block)
        found = [
            pair
            for pairs in similarity.alike(vectors, signs, -0.7, 30)
            for pair in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
        ]
        assert len(found) == len(set(found))
        assert set(found) == expected
    assert 10 < len(expected) < 600


def test_alike_of_equal_pictures_gives_all_pairs_in_bounded_memory() -> None:
    """All activations of both sides of all pairs at once would take 140 MB here, and grow with BLOCK squared."""
    count = 256
    vectors = similarity.unit(np.ones((count, similarity.COMPONENTS), np.float32))
    tracemalloc.start()
    found = sum(len(pairs.first) for pairs in similarity.alike(vectors, np.ones((count, BITS), np.float32), 0.9, 0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == count * (count - 1) // 2
    assert peak < 50e6


def test_alike_at_cosine_one_gives_equal_pictures() -> None:
    """Their cosine is 1 but for rounding."""
    vectors = similarity.unit(np.random.default_rng(0).normal(size=(100, 256)).astype(np.float32)).repeat(2, axis=0)
    found = list(similarity.alike(vectors, np.ones((200, BITS), np.float32), 1.0, 0))
    pairs = {pair for each in found for pair in zip(each.first.tolist(), each.second.tolist(), strict=True)}
    assert pairs == {(first, first + 1) for first in range(0, 200, 2)}
