"""Choosing the classifier to release by val."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatmin.selection.release import Trained, choose


def method(cost: int, *accuracies: float) -> list[Trained]:
    """The trainings of a method, one for each accuracy, that all cost the same."""
    return [Trained(seed, accuracy, 1.0, cost) for seed, accuracy in enumerate(accuracies)]


@pytest.mark.parametrize(
    ("methods", "tolerance", "expected"),
    [
        pytest.param({"a": method(1, 0.8), "b": method(2, 0.9)}, 0.0, "b", id="the best without a tolerance"),
        pytest.param({"a": method(1, 0.8), "b": method(2, 0.9)}, 0.2, "a", id="the cheapest within it"),
        pytest.param({"a": method(1, 0.8), "b": method(2, 0.95), "c": method(4, 0.96)}, 0.02, "b", id="none beyond it"),
        pytest.param({"a": method(1, 0.89), "b": method(2, 0.9)}, 0.01, "a", id="exactly the tolerance"),
        pytest.param({"a": method(1, 0.8899), "b": method(2, 0.9)}, 0.01, "b", id="just beyond the tolerance"),
        pytest.param({"a": method(2, 0.85), "b": method(2, 0.9)}, 0.1, "b", id="equal costs: the best"),
        pytest.param({"a": method(2, 0.9), "b": method(2, 0.9)}, 0.0, "a", id="equal in both: the first"),
        pytest.param({"a": method(2, 0.85, 0.85), "b": method(2, 0.8, 0.9)}, 0.0, "a", id="equal but for rounding"),
        pytest.param({"a": method(1, 0.99, 0.8), "b": method(2, 0.9, 0.91)}, 0.0, "b", id="by the mean, not the best"),
        pytest.param({"a": method(1, 0.9), "b": method(2, 0.9, 0.92)}, 0.005, "b", id="other numbers of seeds"),
        pytest.param(
            {"a": [*method(1, 0.9), *method(5, 0.9)], "b": method(2, 0.9)}, 0.0, "b", id="the mean cost decides"
        ),
    ],
)
def test_choose_method_is_the_cheapest_near_the_best(
    methods: dict[str, list[Trained]], tolerance: float, expected: str
) -> None:
    assert choose(methods, tolerance)[0] == expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param([(0.8, 0.1), (0.9, 2.0), (0.85, 0.1)], 1, id="the best accuracy"),
        pytest.param([(0.9, 0.3), (0.8, 0.1), (0.9, 0.2)], 2, id="equals: the lower loss"),
        pytest.param([(0.8, 0.1), (0.9, 0.3), (0.9, 0.3)], 1, id="equal in both: the first"),
        pytest.param([(0.8, 0.1)], 0, id="one"),
    ],
)
def test_choose_training_is_the_best_on_val(scores: list[tuple[float, float]], expected: int) -> None:
    trained = [Trained(seed, accuracy, loss, 3) for seed, (accuracy, loss) in enumerate(scores, start=7)]
    methods = {"extract": [Trained(None, 0.1, 1.0, 1)], "finetune": trained}
    assert choose(methods, 0.0) == ("finetune", expected)


@given(st.integers(1, 500), st.data())
def test_choose_difference_of_exactly_the_tolerance_is_within_it(count: int, data: st.DataObject) -> None:
    best = data.draw(st.integers(0, count))
    worse = data.draw(st.integers(0, best))
    methods = {"dear": method(2, best / count), "cheap": method(1, worse / count)}
    assert choose(methods, (best - worse) / count)[0] == "cheap"
    if worse < best:
        assert choose(methods, (best - worse - 0.5) / count)[0] == "dear"
