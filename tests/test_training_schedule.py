"""How long a training is, against a count of its images; decisions from the history, against Keras' own callbacks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flatmin.common.errors import InputError
from flatmin.common.params import EarlyStopping, Finetune, Plateau
from flatmin.training import schedule
from flatmin.training.schedule import Budget, Plan

# Multiples of 1/16, as are the differences asked for below: nothing is rounded, here or in Keras.
LOSSES = st.lists(st.integers(0, 48).map(lambda value: value / 16), min_size=1, max_size=30)


class Trained:
    """The part of a model that Keras' callbacks use."""

    def __init__(self) -> None:
        self.optimizer = SimpleNamespace(learning_rate=0.1)
        self.stop_training = False


def history(losses: list[float]) -> list[dict[str, float]]:
    return [{"val_loss": loss, "val_accuracy": 0.0} for loss in losses]


def rates(updates: float, warmup_epochs: float, epochs: int, count: int) -> list[float]:
    """The learning rates of the first updates, of at most 0.4."""
    cosine = {"name": "cosine", "warmup_epochs": warmup_epochs}
    values = {"optimizer": "sgd", "learning_rate": 0.4, "batch_size": 25, "epochs": epochs, "schedule": cosine}
    values["image_size"] = None
    return [schedule.cosine(update, updates, Finetune.model_validate(values)) for update in range(count)]


@pytest.mark.parametrize(("epochs", "steps", "warmup"), [(3, 7, 0.0), (3, 7, 1.0), (4, 5, 0.5), (1, 4, 0.25)])
def test_cosine_with_and_without_warmup_is_that_of_keras(epochs: int, steps: int, warmup: float) -> None:
    rising = round(warmup * steps)
    start = {"initial_learning_rate": 0.0, "warmup_target": 0.4, "warmup_steps": rising}
    peak = {"initial_learning_rate": 0.4}
    decay = keras.optimizers.schedules.CosineDecay(decay_steps=epochs * steps - rising, **(start if rising else peak))
    expected = [float(decay(step)) for step in range(epochs * steps + 1)]
    assert rates(epochs * steps, warmup, epochs, epochs * steps + 1) == pytest.approx(expected, abs=1e-6)


def test_cosine_of_other_updates_than_the_epochs_have_is_stretched() -> None:
    """As control's is: warm-up in proportion, and the half cosine ends at 0."""
    long, short = rates(24, 1.0, 4, 25), rates(8, 1.0, 4, 9)
    assert short[2] == long[6] == 0.4, "warmed up after 2 of 8, as after 6 of 24"
    assert short == pytest.approx(long[::3])
    assert long[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("updates", [0.4, 1.0, 2.5])
def test_cosine_of_few_updates_ends_at_zero(updates: float) -> None:
    """A batch alone, or fewer than are accumulated for an update."""
    found = rates(updates, 1.5, 2, 4)
    assert all(0 <= rate <= 0.4 for rate in found)
    assert found[-1] == pytest.approx(0, abs=1e-12)


@given(LOSSES)
def test_plateau_after_any_losses_is_keras_rule(losses: list[float]) -> None:
    callback = keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=2, min_delta=0.125, min_lr=0.02)
    model = Trained()
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
    rule = Plateau(name="plateau", factor=0.5, patience=2, min_delta=0.125, minimum=0.02)
    assert schedule.plateau(history(losses), rule, 0.1) == pytest.approx(float(model.optimizer.learning_rate))


@given(LOSSES)
def test_stops_after_any_losses_is_keras_rule(losses: list[float]) -> None:
    callback = keras.callbacks.EarlyStopping(monitor="val_loss", patience=3, min_delta=0.125)
    model = Trained()
    callback.set_model(model)
    callback.on_train_begin()
    setting = EarlyStopping(patience=3, min_delta=0.125)
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
        assert schedule.stops(history(losses[: epoch + 1]), setting) == model.stop_training
        if model.stop_training:
            break
    assert not schedule.stops(history(losses), None)


def test_stops_before_the_first_epoch_is_false() -> None:
    assert not schedule.stops([], EarlyStopping(patience=1))


def test_best_epoch_of_equal_accuracies_has_the_lowest_loss_then_is_the_first() -> None:
    epochs = [
        {"val_accuracy": accuracy, "val_loss": loss} for accuracy, loss in ((0.5, 1), (0.7, 2), (0.7, 1.5), (0.7, 1.5))
    ]
    assert schedule.best_epoch(epochs) == 2


def test_balanced_accuracy_decides_with_its_own_loss_alone() -> None:
    rows = ((0.9, 0.5, 1, 3), (0.8, 0.6, 2, 2), (0.7, 0.6, 3, 1), (0.6, 0.6, 4, 1))
    keys = ("val_accuracy", "val_balanced_accuracy", "val_loss", "val_balanced_loss")
    epochs = [dict(zip(keys, row, strict=True)) for row in rows]
    assert schedule.best_epoch(epochs) == 0
    assert schedule.best_epoch(epochs, "balanced_accuracy") == 2
    stopping = EarlyStopping(patience=3)
    assert schedule.stops(epochs, stopping)
    assert not schedule.stops(epochs, stopping, "balanced_accuracy")
    rule = Plateau(name="plateau", factor=0.5, patience=3)
    assert schedule.plateau(epochs, rule, 0.1) == 0.05
    assert schedule.plateau(epochs, rule, 0.1, "balanced_accuracy") == 0.1


# How long a training is

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 100))  # images and the batch's, which may be larger


def images_taken(plan: Plan, images: int, batch_size: int, first: int = 0, last: int | None = None) -> int:
    """The images of a plan's steps, step by step: an epoch's last batch may be smaller."""
    steps = range(first, plan.steps if last is None else last)
    return sum(min(batch_size, images - step % plan.steps_per_epoch * batch_size) for step in steps)


def ends(plan: Plan) -> list[int]:
    return [plan.end(number) for number in range(plan.validations + 1)]


@given(st.integers(1, 40), SIZES)
def test_plan_of_epochs_takes_all_images_before_each_validation(epochs: int, sizes: tuple[int, int]) -> None:
    images, _ = sizes
    plan = Plan.of_epochs(epochs, *sizes)
    assert (plan.epochs, plan.validations) == (epochs, epochs)
    assert (ends(plan)[0], ends(plan)[-1]) == (0, plan.steps)
    for first, last in zip(ends(plan), ends(plan)[1:], strict=False):
        assert images_taken(plan, *sizes, first, last) == images


@given(st.integers(1, 40), SIZES)
def test_plan_of_the_budget_of_whole_epochs_is_these_epochs(epochs: int, sizes: tuple[int, int]) -> None:
    assert Plan.of_budget(Budget(epochs * sizes[0], epochs), *sizes) == Plan.of_epochs(epochs, *sizes)


@example(evaluations=1, validations=5, sizes=(300, 100))
@given(evaluations=st.integers(1, 2000), validations=st.integers(1, 60), sizes=SIZES)
def test_plan_of_a_budget_takes_it_to_within_half_a_batch(
    evaluations: int, validations: int, sizes: tuple[int, int]
) -> None:
    images, batch_size = sizes
    plan = Plan.of_budget(Budget(evaluations, validations), images, batch_size)
    off = abs(images_taken(plan, *sizes) - evaluations)
    if plan.steps > 1:  # there is no training without a step
        assert 2 * off <= min(batch_size, images)
    else:
        assert off <= max(images_taken(plan, *sizes) - 1, min(batch_size, images) / 2)
    for other in (plan.steps - 1, plan.steps + 1):
        assert other == 0 or off <= abs(images_taken(plan, *sizes, last=other) - evaluations)
    assert 0 <= plan.epochs * plan.steps_per_epoch - plan.steps < plan.steps_per_epoch


@given(st.integers(1, 500), st.integers(1, 60), SIZES)
def test_plan_of_a_budget_spreads_its_validations_evenly(
    evaluations: int, validations: int, sizes: tuple[int, int]
) -> None:
    plan = Plan.of_budget(Budget(evaluations, validations), *sizes)
    assert plan.validations == min(validations, plan.steps), "a step lies before each"
    assert (ends(plan)[0], ends(plan)[-1]) == (0, plan.steps)
    parts = {last - first for first, last in zip(ends(plan), ends(plan)[1:], strict=False)}
    assert min(parts) >= 1
    assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize(
    ("evaluations", "validations", "expected", "points"),
    [
        (39, 2, Plan(15, 5, 2), [0, 7, 15]),  # of 13 images in batches of 3: three epochs
        (52, 4, Plan(20, 5, 4), [0, 5, 10, 15, 20]),
        (20, 3, Plan(7, 5, 3), [0, 2, 4, 7]),  # an epoch and 7 images, of which two batches take 6
        (25, 1, Plan(9, 5, 1), [0, 9]),  # and 12
        (4, 9, Plan(1, 5, 1), [0, 1]),
        (1, 1, Plan(1, 5, 1), [0, 1]),
    ],
)
def test_plan_of_a_budget_by_hand(evaluations: int, validations: int, expected: Plan, points: list[int]) -> None:
    plan = Plan.of_budget(Budget(evaluations, validations), 13, 3)
    assert plan == expected
    assert ends(plan) == points


def test_budget_written_and_read_is_the_same(tmp_path: Path) -> None:
    Budget(39, 2).write(tmp_path / "budget.json")
    assert json.loads((tmp_path / "budget.json").read_text()) == {"gradient_evaluations": 39, "validations": 2}
    assert Budget.read(tmp_path / "budget.json") == Budget(39, 2)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"gradient_evaluations": 39},
        {"gradient_evaluations": 39, "validations": 0},
        {"gradient_evaluations": 39.0, "validations": 2},
        {"gradient_evaluations": True, "validations": 2},
        {"gradient_evaluations": 39, "validations": 2, "epochs": 3},
        {"gradient_evaluations": None, "validations": [2]},
    ],
)
def test_budget_of_another_file_is_refused_in_one_line(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "budget.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"budget\.json: expected gradient_evaluations and validations above 0, rec"):
        Budget.read(tmp_path / "budget.json")
    with pytest.raises(InputError, match=r"none\.json: expected a file that an earlier stage wrote, found none$"):
        Budget.read(tmp_path / "none.json")
