"""The training loop on points: it resumes where it was interrupted, keeps the best epoch, and refuses to diverge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from trainings import interrupted_after, point_recipe, point_trainer

from flatmin import runtime
from flatmin.common.errors import InputError
from flatmin.common.params import Finetune, Sam
from flatmin.training import live
from flatmin.training.optimizer import updates
from flatmin.training.resume import State
from flatmin.training.schedule import Plan, best_epoch
from flatmin.training.step import TrainStep
from flatmin.training.validation import Validator

METHODS = {
    "plain": (None, "float32"),
    "sam": (Sam(), "float32"),
    # Two epochs are eight batches: interrupted with gradients waiting, and with one left for the next step.
    "friendly": (Sam(method="friendly", accumulate=3, num_batch_splits=2), "float32"),
    "looksam": (Sam(method="looksam", every=3), "float32"),
    "every": (Sam(every=2), "mixed_float16"),
}


def arrays(step: TrainStep) -> list[np.ndarray]:
    return [np.array(variable) for variable in step.variables]


@pytest.mark.slow
@pytest.mark.parametrize(("sam", "precision"), METHODS.values(), ids=METHODS)
def test_trainer_interrupted_and_resumed_ends_as_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sam: Sam | None, precision: str
) -> None:
    plateau = {"name": "plateau", "factor": 0.5, "patience": 1, "min_delta": 0.0, "minimum": 0.0}
    recipe = point_recipe(ema=0.9, schedule=plateau)
    with runtime.dtype_policy(precision):
        trainer, whole, points = point_trainer(recipe, sam)
        history = trainer.train(State(tmp_path / "whole"))
        assert points.epochs == [0, 1, 2, 3]
        assert best_epoch(history) >= 2, "the best weights are of an epoch after the interruption"
        state = State(tmp_path / "state")
        trainer, _, points = point_trainer(recipe, sam)
        with interrupted_after(2), pytest.raises(KeyboardInterrupt):
            trainer.train(state)
        capsys.readouterr()
        trainer, resumed, points = point_trainer(recipe, sam)
        assert trainer.train(state) == history
    assert "points: resuming after epoch 2\n" in capsys.readouterr().out
    assert points.epochs == [2, 3]
    for one, other in zip(arrays(whole), arrays(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert resumed.rule.gradient_evaluations == whole.rule.gradient_evaluations > 0


# Four validations of thirteen images in batches of four: within the first epoch, the second and the third.
WITHIN_EPOCHS = Plan(steps=10, steps_per_epoch=4, validations=4)
ENDS = [2, 5, 7, 10]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "looksam"])
@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_trainer_interrupted_within_an_epoch_resumes_at_its_next_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, interrupted: int
) -> None:
    sam, _ = METHODS[name]
    recipe = point_recipe(ema=0.9, schedule={"name": "cosine", "warmup_epochs": 1})
    trainer, whole, points = point_trainer(recipe, sam, WITHIN_EPOCHS)
    history = trainer.train(State(tmp_path / "whole"))
    assert [epoch["epoch"] for epoch in history] == [end / 4 for end in ENDS]
    assert points.epochs == [0, 0, 1, 1, 1, 2]
    state = State(tmp_path / "state")
    trainer, _, _ = point_trainer(recipe, sam, WITHIN_EPOCHS)
    with interrupted_after(interrupted), pytest.raises(KeyboardInterrupt):
        trainer.train(state)
    trainer, resumed, points = point_trainer(recipe, sam, WITHIN_EPOCHS)
    capsys.readouterr()
    assert trainer.train(state) == history
    assert f"points: resuming after epoch {ENDS[interrupted - 1] / 4:g}\n" in capsys.readouterr().out
    assert points.epochs == [0, 0, 1, 1, 1, 2][{1: 1, 2: 3, 3: 4}[interrupted] :]
    for one, other in zip(arrays(whole), arrays(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_trainer_validated_within_epochs_takes_the_same_steps(tmp_path: Path) -> None:
    """When val is scored changes neither the batches nor what they count for."""
    recipe = point_recipe(schedule={"name": "cosine"}, epochs=3)
    plans = {"whole": Plan(10, 4, 1), "within": WITHIN_EPOCHS}
    trained = {}
    for name, plan in plans.items():
        trainer, step, _ = point_trainer(recipe, plan=plan)
        state = State(tmp_path / name)
        history = trainer.train(state)
        assert state.epochs() == plan.validations
        state.load(plan.validations, step.variables)  # after the last step, in place of the best
        trained[name] = history, arrays(step)
        assert step.rule.gradient_evaluations == 13 + 13 + 8
        assert updates(step.optimizer) == 10
    ((epoch,), last), (parts, last_within) = trained.values()
    for one, other in zip(last, last_within, strict=True):
        np.testing.assert_array_equal(one, other)
    assert epoch["epoch"] == parts[-1]["epoch"] == 2.5
    images = [4 + 4, 4 + 1 + 4, 4 + 4, 1 + 4 + 4]
    for key in ("loss", "accuracy"):
        mean = np.average([part[key] for part in parts], weights=images)
        assert mean == pytest.approx(epoch[key], rel=1e-6)
    assert parts[-1]["val_loss"] == epoch["val_loss"]


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_trainer_with_ema_keeps_and_scores_the_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    updated: list[list[np.ndarray]] = []  # the weights after each update
    call = TrainStep.__call__

    def noted(self: TrainStep, batches: Any) -> np.ndarray:
        before = updates(self.optimizer)
        sums = call(self, batches)
        if updates(self.optimizer) > before:  # under mixed_float16 the first gradients may overflow
            updated.append([np.array(variable) for variable in self.layers.trainable_variables])
        return sums

    monkeypatch.setattr(TrainStep, "__call__", noted)
    with runtime.dtype_policy(precision):
        trainer, step, points = point_trainer(point_recipe(epochs=1, ema=0.7, learning_rate=0.005))
        (epoch,) = trainer.train(State(tmp_path))
    averages = updated[0]
    for weights in updated[1:]:
        averages = [0.7 * average + 0.3 * weight for average, weight in zip(averages, weights, strict=True)]
    for kept, average in zip(step.layers.trainable_variables, averages, strict=True):
        np.testing.assert_allclose(kept, average, rtol=1e-4, atol=1e-6)
    assert len(updated) >= 2
    assert any(np.any(kept != last) for kept, last in zip(averages, updated[-1], strict=True))
    assert validation_loss(points) == pytest.approx(epoch["val_loss"], rel=1e-6)


def validation_loss(points: Any) -> float:
    logits = points.val_logits().astype(np.float64)
    own = logits[np.arange(len(logits)), points.labels("val")]
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - own))


@pytest.mark.slow
def test_trainer_before_the_first_update_scores_the_start_and_not_the_averages(tmp_path: Path) -> None:
    """Keras' averages are zeros until an update, which takes eight batches here, two epochs."""
    trainer, _, points = point_trainer(point_recipe(epochs=3, ema=0.7), Sam(accumulate=8))
    start = validation_loss(points)
    losses = [epoch["val_loss"] for epoch in trainer.train(State(tmp_path))]
    assert losses[0] == pytest.approx(start, rel=1e-5)
    assert losses[1] != pytest.approx(start, rel=1e-4)


def test_trainer_of_several_epochs_leaves_the_best_ones_weights(tmp_path: Path) -> None:
    trainer, step, points = point_trainer(point_recipe(epochs=6, learning_rate=1.0))
    history = trainer.train(State(tmp_path))
    best = best_epoch(history)
    assert best < 5, "the last epoch's weights would pass"
    assert validation_loss(points) == pytest.approx(history[best]["val_loss"], rel=1e-6)
    assert step.rule.gradient_evaluations == 6 * 13
    assert all(0 <= epoch["accuracy"] <= 1 for epoch in history)


def test_trainer_by_balanced_accuracy_keeps_its_best_weights_and_stops_by_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the made scores the plain ones would keep the first epoch, and stop after the third."""
    trainer, _, points = point_trainer(point_recipe(epochs=6, early_stopping={"patience": 2}))
    trainer.metric = "balanced_accuracy"
    rows = iter(
        [(0.9, 0.1, 1, 5), (0.8, 0.2, 2, 4), (0.7, 0.5, 3, 3), (0.6, 0.4, 4, 3), (0.5, 0.3, 5, 3), (1, 1, 0, 0)]
    )
    keys = ("val_accuracy", "val_balanced_accuracy", "val_loss", "val_balanced_loss")
    found: list[float] = []

    def scores(_: Any) -> dict[str, float]:
        found.append(validation_loss(points))
        return dict(zip(keys, next(rows), strict=True))

    monkeypatch.setattr(Validator, "scores", scores)
    history = trainer.train(State(tmp_path))
    assert len(history) == 5, "two epochs without a better balanced loss"
    assert validation_loss(points) == pytest.approx(found[2], rel=1e-6)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """By tag and step, the values of TensorBoard's event files, as its scalars plugin finds them."""
    found: dict[str, dict[int, float]] = {}
    for path in folder.glob("events.out.tfevents.*"):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    return found


def test_trainer_with_flatmin_logs_writes_event_files_that_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = point_trainer(point_recipe(epochs=3))[0].train(State(tmp_path / "without"))
    monkeypatch.setenv("FLATMIN_LOGS", str(tmp_path / "logs"))
    history = point_trainer(point_recipe(epochs=3))[0].train(
        State(tmp_path / "with"), lambda history: live.write("points@7", len(history), history[-1])
    )
    assert history == without
    found = scalars(tmp_path / "logs/points/7")
    assert set(found) == set(history[0]) >= {"loss", "val_loss", "val_accuracy", "learning_rate"}
    for key, by_step in found.items():
        assert by_step == pytest.approx({number: each[key] for number, each in enumerate(history, 1)}, rel=1e-6)


def test_trainer_with_flatmin_logs_that_cannot_be_written_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLATMIN_LOGS", str(tmp_path / "file"))
    with pytest.raises(
        InputError, match=r"^\$FLATMIN_LOGS: expected a folder to write to, received '.*/file': [^\n]+$"
    ):
        live.write("points", 1, {"loss": 0.5})


@pytest.mark.slow
def test_trainer_with_plateau_and_early_stopping_lowers_the_rate_and_ends(tmp_path: Path) -> None:
    """No val loss falls by 100, so the first epoch stays the best."""
    recipe = point_recipe(
        epochs=9,
        learning_rate=0.001,
        schedule={"name": "plateau", "factor": 0.5, "patience": 2, "min_delta": 100.0},
        early_stopping={"patience": 4, "min_delta": 100.0},
    )
    trainer, step, _ = point_trainer(recipe)
    history = trainer.train(State(tmp_path))
    assert [epoch["learning_rate"] for epoch in history] == pytest.approx([0.001, 0.001, 0.001, 0.0005, 0.0005])
    assert step.rule.gradient_evaluations == 5 * 13


@pytest.mark.parametrize(
    ("recipe", "sam", "message"),
    [
        (
            point_recipe(learning_rate=1e30),
            None,
            r"^points: the training diverged in epoch \d: expected finite losses and gradients, received \S+ and val "
            r"\S+; try a lower learning_rate than 1e\+30$",
        ),
        (
            point_recipe(),
            Sam(rho=1e30),
            r"^points: .*received gradients that were not, in each of 4 batches; try a lower learning_rate than 0.02, "
            r"or a lower rho than 1e\+30$",
        ),
    ],
    ids=["learning rate", "rho"],
)
@pytest.mark.slow
def test_trainer_that_diverges_is_an_error_of_one_line(
    tmp_path: Path, recipe: Finetune, sam: Sam | None, message: str
) -> None:
    trainer, _, _ = point_trainer(recipe, sam)
    state = State(tmp_path)
    with pytest.raises(InputError, match=message):
        trainer.train(state)
