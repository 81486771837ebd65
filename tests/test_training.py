"""The loop: its rules against Keras' own, its results byte for byte."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from loopback import free_ports
from networks import spread
from PIL import Image
from repository import ROOT, TINY

from flatmin import runtime, selection
from flatmin.common import params
from flatmin.data import writer
from flatmin.inputs import records
from flatmin.models import classifier, registry, scores
from flatmin.training import stages

pass
from flatmin.common.errors import InputError
from flatmin.common.params import EarlyStopping, Params, Plateau
from flatmin.features import store
from flatmin.inputs import batches
from flatmin.inputs.augment import Augmenter

# Multiples of 1/16, as the differences asked for below are: nothing is rounded, here or in Keras.
LOSSES = st.lists(st.integers(0, 48).map(lambda value: value / 16), min_size=1, max_size=30)


class Trained:
    """What Keras' callbacks touch of a model."""

    def __init__(self) -> None:
        self.optimizer = keras.optimizers.SGD(0.1)
        self.stop_training = False


def history(losses: list[float]) -> list[dict[str, float]]:
    return [{"val_loss": loss, "val_accuracy": 0.0} for loss in losses]


@given(LOSSES)
def test_plateau_is_keras_rule(losses: list[float]) -> None:
    callback = keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=2, min_delta=0.125, min_lr=0.02)
    model = Trained()
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
    schedule = Plateau(name="plateau", factor=0.5, patience=2, min_delta=0.125, minimum=0.02)
    assert stages.plateau(history(losses), schedule, 0.1) == pytest.approx(float(model.optimizer.learning_rate))


@given(LOSSES)
def test_early_stopping_is_keras_rule(losses: list[float]) -> None:
    callback = keras.callbacks.EarlyStopping(monitor="val_loss", patience=3, min_delta=0.125)
    model = Trained()
    callback.set_model(model)
    callback.on_train_begin()
    setting = EarlyStopping(patience=3, min_delta=0.125)
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"val_loss": loss})
        assert stages.stops(history(losses[: epoch + 1]), setting) == model.stop_training
        if model.stop_training:
            break
    assert not stages.stops(history(losses), None)


def test_best_epoch_is_the_most_accurate_then_the_surest() -> None:
    epochs = [
        {"val_accuracy": accuracy, "val_loss": loss} for accuracy, loss in ((0.5, 1), (0.7, 2), (0.7, 1.5), (0.7, 1.5))
    ]
    assert stages.best_epoch(epochs) == 2


def recipe(**changes: Any) -> Params:
    values = copy.deepcopy(TINY)
    values["finetune"].update(changes)
    return params.parse(values)


def test_cosine_warms_up_and_ends_at_zero() -> None:
    settings = recipe(schedule={"name": "cosine", "warmup_epochs": 1.0}, epochs=5, learning_rate=0.4)
    rate = stages.make_optimizer(settings.finetune, 10)._learning_rate
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0, 0.2, 0.4])
    assert float(rate(30)) == pytest.approx(0.2)
    assert float(rate(50)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(("epochs", "steps", "warmup"), [(3, 7, 0.0), (3, 7, 1.0), (4, 5, 0.5), (1, 4, 0.25)])
def test_cosine_is_the_closed_form(epochs: int, steps: int, warmup: float) -> None:
    schedule = {"name": "cosine", "warmup_epochs": warmup}
    settings = recipe(schedule=schedule, epochs=epochs, learning_rate=0.4)
    optimizer = stages.make_optimizer(settings.finetune, steps)
    weight = keras.Variable(np.ones(2, np.float32))
    optimizer.build([weight])
    rising = round(warmup * steps)
    falling = epochs * steps - rising
    for step in range(epochs * steps):
        after = (step - rising) / falling
        expected = 0.4 * step / rising if step < rising else 0.4 * (1 + math.cos(math.pi * after)) / 2
        assert float(optimizer.learning_rate) == pytest.approx(expected, abs=1e-6)
        optimizer.apply([tf.ones(2)], [weight])
    assert float(optimizer.learning_rate) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weight_decay_is_decoupled_and_times_the_learning_rate(name: str, decay: float) -> None:
    settings = recipe(optimizer=name, learning_rate=0.5, weight_decay=decay, schedule=None)
    optimizer = stages.make_optimizer(settings.finetune, 10)
    weight = keras.Variable(np.full(2, 4, np.float32))
    optimizer.build([weight])
    optimizer.apply([tf.zeros(2)], [weight])
    np.testing.assert_allclose(np.array(weight), 4 * (1 - 0.5 * decay))


def test_mixed_float16_scales_the_loss() -> None:
    assert not isinstance(stages.make_optimizer(recipe().finetune, 10), keras.optimizers.LossScaleOptimizer)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        assert isinstance(stages.make_optimizer(recipe().finetune, 10), keras.optimizers.LossScaleOptimizer)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (None, 20),
        (params.Sam(), 40),
        (params.Sam(every=2), 20 + 4 + 2 + 4),  # of the batches of 4, 4, 2, 4, 4 and 2
        (params.Sam(accumulate=2, every=2), 20 + 4 + 4 + 4 + 2),
        (params.Sam(rho=0.0), 20),
        (params.Sam(method="gsam", rho_min=0.0, rho_max=0.0), 20),
    ],
    ids=str,
)
def test_gradient_evaluations_are_counted_batch_by_batch(step: params.Sam | None, expected: int) -> None:
    assert stages.gradient_evaluations(10, 4, 2, step) == expected


def test_state_is_whole_or_not_there(tmp_path: Path) -> None:
    state = stages.State(tmp_path / "state")
    variables = [keras.Variable(np.arange(3.0)), keras.Variable(7, dtype="int32")]
    assert (state.epochs(), state.has(1)) == (0, False)
    state.save([{"val_loss": 0.1 + 0.2}], variables, [np.ones(2)])
    for variable in variables:
        variable.assign(variable * 0)
    assert (state.epochs(), state.has(1)) == (1, True)
    found, best = state.load(1, variables)
    assert found == [{"val_loss": 0.1 + 0.2}]
    np.testing.assert_array_equal(best[0], np.ones(2))
    np.testing.assert_array_equal(np.array(variables[0]), np.arange(3.0))
    state.remove()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, None])
def test_a_state_that_was_not_all_written_or_is_damaged_is_done_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float | None
) -> None:
    state = stages.State(tmp_path / "state")
    state.save([{"val_loss": 1.0}], [keras.Variable(np.arange(300.0))], [np.ones(2)])
    content = state.file.read_bytes()
    if share is None:
        content = content[:900] + bytes([content[900] ^ 1]) + content[901:]
    else:
        content = content[: int(share * len(content))]
    state.file.write_bytes(content)
    assert state.epochs() == 0
    assert "worker_0.npz: expected a resume state, found a broken file; doing without" in capsys.readouterr().out
    state.remove()
    assert not (tmp_path / "state").exists()


def test_states_that_nobody_goes_on_with_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path))
    stages.forget_states()
    for name, days in (("given-up", 31), ("slow", 29)):
        stages.State(tmp_path / "state" / name).save([{"val_loss": 1.0}], [], [])
        for path in (tmp_path / "state" / name, tmp_path / "state" / name / "worker_0.npz"):
            os.utime(path, (time.time() - days * 86400,) * 2)
    stages.forget_states()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["slow"]


def test_of_several_workers_each_keeps_two_epochs(tmp_path: Path) -> None:
    alone, one_of_two = stages.State(tmp_path / "alone"), stages.State(tmp_path / "together", 1, 2)
    variables = [keras.Variable(0.0)]
    for epochs in (1, 2, 3):
        variables[0].assign(float(epochs))
        for state in (alone, one_of_two):
            state.save([{"val_loss": 1.0}] * epochs, variables, [])
    assert [alone.has(epochs) for epochs in (1, 2, 3)] == [False, False, True]
    assert [one_of_two.has(epochs) for epochs in (1, 2, 3)] == [False, True, True]
    assert one_of_two.load(2, variables)[0] == [{"val_loss": 1.0}] * 2
    assert float(variables[0]) == 2.0
    # Gone on with after two, and lost again while the third was saved by the others.
    one_of_two.save([{"val_loss": 1.0}] * 3, variables, [])
    assert [one_of_two.has(epochs) for epochs in (1, 2, 3)] == [False, True, True]
    one_of_two.remove()
    assert not (tmp_path / "together").exists()


def test_half_a_state_is_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = stages.State(tmp_path / "state")
    variables = [keras.Variable(np.arange(3.0))]
    state.save([{"val_loss": 1.0}], variables, [np.ones(2)])
    savez = np.savez

    def interrupted(file: Any, **arrays: Any) -> None:
        savez(file, **arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.save([{"val_loss": 1.0}, {"val_loss": 0.5}], variables, [np.zeros(2)])
    assert state.epochs() == 1
    assert state.load(1, variables)[0] == [{"val_loss": 1.0}]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["worker_0.npz"]


# Real runs, of a network that random weights leave something to see: a quarter of MobileNet at 32 pixels.

NAMES = ("blue", "green", "red")
TRAIN = 13  # leaves a batch of one
VARIED = {"engine": "tensorflow", "n": 0, "flip": True, "crop": 4}


def small(**changes: Any) -> Params:
    recipe = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 4, "epochs": 2, "image_size": 32}
    values: dict[str, Any] = {
        "seed": 3,
        "runtime": changes.pop("runtime", {}),
        "data": {"source": "folder", "name": "images", "splits": {"train": "train", "val": "val", "test": "test"}},
        "augment": changes.pop("augment", {"engine": "none"}),
        "backbones": ["MobileNet025"],
        "extract": recipe | {"weights": {"MobileNet025": "base.weights.h5"}} | changes.pop("extract", {}),
        "select": {},
        "finetune": recipe | {"fine_tune_at": {"MobileNet025": "conv_dw_12"}} | changes,
        "sam": {"rho": 0.05},
        "evaluate": {},
    }
    return params.parse(values)


def write_images(folder: Path, train: int) -> None:
    """Images of coloured noise, and their records."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", 9), ("test", 3)):
        for index in range(count):
            pixels = random.integers(0, 180, (32, 32, 3), np.uint8)
            pixels[..., 2 - index % 3] += 60
            path = folder / f"images/{split}/{NAMES[index % 3]}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    writer.write(small().data, 3, "data/records")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records of three classes of coloured noise and a classifier selected."""
    folder = tmp_path_factory.mktemp("template")
    with chdir(folder):
        write_images(folder, TRAIN)
        model = classifier.create("MobileNet025", NAMES, 32, 0.0, 1, "none")
        spread(model.base)
        model.base.save_weights("base.weights.h5")
        model.save("models/select")
    return folder


@pytest.fixture
def study(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, the working directory."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def written(study: Path, name: str) -> dict[str, bytes]:
    files = [*(study / "models" / name).iterdir(), study / f"metrics/{name}.json", study / f"plots/{name}.csv"]
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "views", "precision"),
    [
        (params.Sam(), 0, "float32"),
        # Two epochs are eight batches: interrupted with gradients waiting, and with one kept for the next step.
        (params.Sam(method="friendly", accumulate=3, num_batch_splits=2), 0, "float32"),
        (params.Sam(method="looksam", every=3), 0, "float32"),
        (params.Sam(every=2), 3, "mixed_float16"),
    ],
    ids=lambda value: getattr(value, "method", str(value)),
)
def test_a_run_interrupted_and_resumed_gives_the_same_bytes(
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: params.Sam,
    views: int,
    precision: str,
) -> None:
    recipe: dict[str, Any] = {"epochs": 4, "learning_rate": 0.001, "ema": 0.9, "dropout": 0.5, "views": views}
    recipe |= {"schedule": {"name": "plateau", "factor": 0.5, "patience": 1, "min_delta": 0.0, "minimum": 0.0}}
    settings = small(augment=VARIED, runtime={"precision": precision}, **recipe)
    stages.finetune(settings, step)
    assert metrics("sam")["best_epoch"] > 2, "what is saved is of before the interruption"
    whole = written(study, "sam")
    save = stages.State.save

    def interrupted(self: stages.State, history: Any, variables: Any, best: Any) -> None:
        save(self, history, variables, best)
        if len(history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(stages.State, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.finetune(settings, step)
    monkeypatch.setattr(stages.State, "save", save)
    capsys.readouterr()
    stages.finetune(settings, step)
    assert "going on after epoch 2" in capsys.readouterr().out
    assert written(study, "sam") == whole
    assert not list((study / "cache").rglob("*.npz"))


@pytest.mark.slow
def test_sam_without_a_radius_is_finetune_byte_for_byte(study: Path) -> None:
    settings = small()
    stages.finetune(settings)
    stages.finetune(settings, params.Sam(rho=0.0))
    plain, sharp = written(study, "finetune"), written(study, "sam")
    assert plain["classifier.weights.h5"] == sharp["classifier.weights.h5"]
    stages.finetune(settings, params.Sam(rho=0.5))
    assert written(study, "sam")["classifier.weights.h5"] != plain["classifier.weights.h5"]
    assert metrics("sam")["gradient_evaluations"] == 2 * metrics("finetune")["gradient_evaluations"]


@pytest.mark.slow
def test_sam_may_take_epochs_of_its_own(study: Path) -> None:
    stages.finetune(small(epochs=4))
    stages.finetune(small(epochs=4), params.Sam(epochs=2))
    one, two = metrics("finetune"), metrics("sam")
    assert (one["epochs"], two["epochs"]) == (4, 2)
    assert one["gradient_evaluations"] == two["gradient_evaluations"]
    sharp = written(study, "sam")
    stages.finetune(small(epochs=2), params.Sam())
    assert written(study, "sam") == sharp


@pytest.mark.slow
def test_a_training_that_diverges_is_an_error_and_no_file(study: Path) -> None:
    with pytest.raises(InputError, match="finetune: the training diverged in epoch"):
        stages.finetune(small(learning_rate=1e30))
    with pytest.raises(InputError, match=r"sam: .* gradients that were not, in each of 4 batches; .* rho than 1e\+30"):
        stages.finetune(small(), params.Sam(rho=1e30))
    assert [path.name for path in (study / "models").iterdir()] == ["selected"]
    assert not (study / "metrics").exists()


def trained_weights(folder: str) -> list[np.ndarray]:
    model = classifier.load(folder)
    return [np.array(variable) for variable in model.cut(model.description.fine_tune_at)[1].trainable_variables]


def metrics(name: str) -> dict[str, Any]:
    return json.loads(Path(f"metrics/{name}.json").read_text())


def scores_on_val(folder: str) -> dict[str, float]:
    found = records.Records("data/records")
    logits = classifier.load(folder).logits(batches.plain(found, "val", 32, 4))
    return scores.score(logits, found.labels("val"))


HEADS = [{}, {"levels": "all", "hidden_units": 8}]


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS, ids=["linear", "levels"])
def test_the_stages_write_what_they_trained(head: dict[str, Any], study: Path) -> None:
    settings = small(extract=head)
    stages.extract(settings, "MobileNet025")
    selection.select(settings.backbones, 0.0)
    stages.finetune(settings)
    stages.finetune(settings, settings.sam)
    for name, passes in (("extract/MobileNet025", 1), ("finetune", 1), ("sam", 2)):
        found = metrics(name)
        expected = {
            "backbone",
            "best_epoch",
            "epochs",
            "gradient_evaluations",
            "image_size",
            "multiply_adds",
            "trunk",
            "val",
        }
        assert set(found) == expected
        assert set(found["val"]) == {"accuracy", "top5_accuracy", "loss"}
        assert found["epochs"] == 2
        assert found["gradient_evaluations"] == TRAIN * 2 * passes
        assert found["val"]["top5_accuracy"] == 1
        # What was saved is the best epoch's, and scores what the metrics say.
        assert scores_on_val(f"models/{name}") == pytest.approx(found["val"], rel=1e-4)
        rows = Path(f"plots/{name}.csv").read_text().splitlines()
        assert rows[0] == "epoch,learning_rate,loss,accuracy,val_loss,val_accuracy"
        assert len(rows) == 3
        best = rows[found["best_epoch"]].split(",")
        assert float(best[5]) == pytest.approx(found["val"]["accuracy"], rel=1e-5)
    layers = ["conv_dw_11", classifier.STANDARDIZED] if head else ["conv_dw_11"]
    frozen = [
        [np.array(v) for name in layers for v in classifier.load(folder).features.get_layer(name).weights]
        for folder in ("models/select", "models/finetune", "models/sam")
    ]
    for one, two, three in zip(*frozen, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    moved = zip(trained_weights("models/finetune"), trained_weights("models/sam"), strict=True)
    assert any(np.abs(one - other).max() > 1e-5 for one, other in moved)
    if head:  # of the other one, resumed runs give the same bytes
        before = {name: written(study, name) for name in ("extract/MobileNet025", "finetune", "sam")}
        stages.extract(settings, "MobileNet025")
        stages.finetune(settings)
        stages.finetune(settings, settings.sam)
        assert before == {name: written(study, name) for name in before}
    with pytest.raises(InputError, match=r"^backbones: expected one of MobileNet025, received ResNet50$"):
        stages.extract(settings, "ResNet50")


@pytest.mark.slow
def test_extract_may_see_images_as_they_are(study: Path) -> None:
    seen = {}
    plain = {"engine": "none"}
    for name, augment, own in (("plain", plain, True), ("as they are", VARIED, False), ("not", VARIED, True)):
        stages.extract(small(augment=augment, extract={"augment": own, "views": 1}), "MobileNet025")
        seen[name] = written(study, "extract/MobileNet025")
    assert seen["plain"] == seen["as they are"] != seen["not"]


class Watched(stages.Trainer):
    """Keeps the trained weights after every step."""

    after: list[list[np.ndarray]]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Watched.after = []
        step = self.train_step

        def watched(batches: Any) -> tf.Tensor:
            sums = step(batches)
            Watched.after.append([np.array(variable) for variable in self.tail.trainable_variables])
            return sums

        self.train_step = watched


@pytest.mark.slow
@pytest.mark.usefixtures("study")
def test_before_the_first_update_the_averages_are_the_start() -> None:
    """Keras' averages are zeros then; an update takes eight batches here, two epochs."""
    start = scores_on_val("models/select")["loss"]
    stages.finetune(small(epochs=3, ema=0.7), params.Sam(accumulate=8))
    losses = [float(row.split(",")[4]) for row in Path("plots/sam.csv").read_text().splitlines()[1:]]
    assert losses[0] == pytest.approx(start, rel=1e-4)
    assert losses[1] != pytest.approx(start, rel=1e-4)
    with pytest.raises(InputError, match=r"sam.accumulate: expected at most 12, the batches of all.*received 13"):
        stages.finetune(small(epochs=3), params.Sam(accumulate=13))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_with_ema_the_averages_are_kept(study: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(training, "Trainer", Watched)
    try:
        stages.finetune(small(epochs=1, ema=0.7, runtime={"precision": precision}))
    finally:
        keras.config.set_dtype_policy("float32")
    steps = Watched.after
    assert len(steps) == 4
    averages = steps[0]
    for weights in steps[1:]:
        averages = [0.7 * average + 0.3 * weight for average, weight in zip(averages, weights, strict=True)]
    for kept, average in zip(trained_weights("models/finetune"), averages, strict=True):
        np.testing.assert_allclose(kept, average, rtol=1e-4, atol=1e-6)
    assert any(np.any(kept != last) for kept, last in zip(averages, steps[-1], strict=True))
    assert scores_on_val("models/finetune")["loss"] == pytest.approx(metrics("finetune")["val"]["loss"], rel=0.02)


@pytest.mark.slow
def test_plateau_and_early_stopping_in_a_run(study: Path) -> None:
    # No val loss falls by 100, so the first epoch stays the best.
    stages.finetune(
        small(
            epochs=9,
            learning_rate=0.001,
            schedule={"name": "plateau", "factor": 0.5, "patience": 2, "min_delta": 100.0},
            early_stopping={"patience": 4, "min_delta": 100.0},
        )
    )
    rows = [line.split(",") for line in Path("plots/finetune.csv").read_text().splitlines()[1:]]
    assert [float(row[1]) for row in rows] == pytest.approx([0.001, 0.001, 0.001, 0.0005, 0.0005])
    assert metrics("finetune")["epochs"] == 5
    assert metrics("finetune")["gradient_evaluations"] == TRAIN * 5


def view_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.glob("views/*/boundary_*.npy"))}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS, ids=["linear", "levels"])
def test_kept_views_train_as_the_images_do(
    head: dict[str, Any], study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without augmentation a view is the image: an epoch in the same order differs by float16's rounding alone."""
    if head:
        stages.extract(small(extract=head), "MobileNet025")
        selection.select(["MobileNet025"], 0.0)
        capsys.readouterr()
    plain = small(dropout=0.0, optimizer="sgd", learning_rate=0.02, batch_size=TRAIN, epochs=3)
    stages.finetune(plain)
    expected, scores = trained_weights("models/finetune"), metrics("finetune")
    kept = small(dropout=0.0, optimizer="sgd", learning_rate=0.02, batch_size=TRAIN, epochs=3, views=1)
    stages.finetune(kept)
    start = classifier.load("models/select", fine_tune_at="conv_dw_12").cut("conv_dw_12")[1].trainable_variables
    moved = np.concatenate([(one - np.array(two)).ravel() for one, two in zip(expected, start, strict=True)])
    pairs = zip(expected, trained_weights("models/finetune"), strict=True)
    apart = np.concatenate([(one - two).ravel() for one, two in pairs])
    assert np.linalg.norm(apart) < np.linalg.norm(moved) / 50
    found = metrics("finetune")
    assert found["val"]["loss"] == pytest.approx(scores["val"]["loss"], rel=1e-2)
    assert (scores["trunk"], found["trunk"]) == ("tensorflow", "litert")
    assert found["val_from_images"] == {"images": 9, "accuracy": found["val"]["accuracy"], "accuracy_difference": 0.0}
    assert not list(study.rglob(".*.part"))
    assert "val activations: 9 images" in capsys.readouterr().out
    # sam-finetune takes the same views, and makes none.
    before = view_files(study / "cache")
    stages.finetune(kept, params.Sam())
    assert "activations" not in capsys.readouterr().out
    assert view_files(study / "cache") == before
    assert len(before) == 2 * (5 if head else 1), "of each tensor that crosses the cut"


def test_finetune_draws_other_views_than_extract(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, jobs = small(), list[stages.Job]()
    monkeypatch.setattr(training, "_run", jobs.append)
    stages.extract(settings, settings.backbones[0])
    stages.finetune(settings)
    stages.finetune(settings, params.Sam())
    extract, finetune, sam = (job.params.seed for job in jobs)
    assert extract == settings.seed
    assert finetune == sam != extract


@pytest.mark.slow
def test_epochs_take_the_views_in_turn(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three views of a training with fresh augmentation in each of three epochs are what those epochs saw."""
    settings = small(augment=VARIED, views=3, epochs=7, dropout=0.0)
    seen = []
    read = store.Activations.read

    def noted(self: store.Activations, examples: Any) -> Any:
        found = read(self, examples)
        if self.count == TRAIN:
            seen.append((id(self), list(examples), found))
        return found

    monkeypatch.setattr(store.Activations, "read", noted)
    stages.finetune(settings)
    in_turn = [seen[start : start + 4] for start in range(0, len(seen), 4)]  # 13 images in batches of 4
    assert len(in_turn) == 7
    assert [epoch[0][0] == in_turn[0][0][0] for epoch in in_turn] == [True, False, False, True, False, False, True]
    for epoch in in_turn:
        assert sorted(example for _, examples, _ in epoch for example in examples) == list(range(TRAIN))
    assert len({str([examples for _, examples, _ in epoch]) for epoch in in_turn}) == 7  # each in an order of its own
    # Image by image what the trunk makes of the augmenter's images of epoch 1.
    model = classifier.load("models/select", fine_tune_at="conv_dw_12", image_size=32)
    trunk, _ = model.cut("conv_dw_12")
    with Augmenter(settings.augment, batches.derived_seed(settings.seed, 1)) as augmenter:
        images = (image for image, _ in records.Records("data/records").images("train").as_numpy_iterator())
        (chunk,) = augmenter.chunks(images, 1)
    expected = trunk(np.stack([batches.resize(image, 32) for image in chunk]), training=False).numpy()
    for _, examples, (boundary,) in in_turn[1]:
        np.testing.assert_allclose(boundary, expected[examples], rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_views_go_on_and_are_mended(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small(augment=VARIED, views=3, epochs=3, dropout=0.5)
    stages.finetune(settings)
    whole, files = written(study, "finetune"), view_files(study / "cache")
    assert len(files) == 4
    for path in files:
        shutil.rmtree(Path(path).parent)
    halved = store._halved

    def interrupted(tensor: np.ndarray) -> np.ndarray:
        if len(list(study.glob("cache/views/*/checksums.json"))) == 2:
            raise KeyboardInterrupt
        return halved(tensor)

    monkeypatch.setattr(views, "_halved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.finetune(settings)
    monkeypatch.setattr(views, "_halved", halved)
    capsys.readouterr()
    stages.finetune(settings)
    printed = capsys.readouterr().out
    assert [f"view {view}/3:" in printed for view in (1, 2, 3)] == [False, True, True]
    assert written(study, "finetune") == whole
    assert view_files(study / "cache") == files
    damaged = Path(next(iter(files)))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    stages.finetune(settings)
    assert written(study, "finetune") == whole
    assert view_files(study / "cache") == files


@pytest.mark.slow
def test_too_little_room_is_an_error_before_the_work_begins(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small(augment=VARIED, views=2)
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", "1000")
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE_LIMIT: expected at least (\d+) bytes") as error:
        stages.finetune(settings)
    values = 3 * 3 * 128  # what conv_dw_12 gets of 32 pixels, padded
    needed = (2 * TRAIN + 9) * values * 2 + 3 * store.BESIDE
    assert f"({needed} for this, 0 in use), received 1000" in str(error.value)
    assert capsys.readouterr().out == ""
    assert not view_files(study / "cache")
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", str(needed))
    stages.finetune(settings)
    monkeypatch.setattr(trunk, "engine", None)  # with nothing missing no trunk is converted
    stages.finetune(settings, params.Sam())


def test_activations_that_float16_cannot_hold_are_an_error() -> None:
    np.testing.assert_array_equal(store._halved(np.array([65504, 1e-9], np.float32)), [65504, 0])
    for beyond in (1e6, np.inf, np.nan):
        with pytest.raises(InputError, match=r"views: expected activations that float16 holds, received"):
            store._halved(np.array([1, beyond], np.float32))


MIRRORED = """
import shutil, sys
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from flatmin.common import params
from flatmin.training import stages
for views in (2, 0):
    for strategy in ("one", "mirrored"):
        values = params.load("params.json").model_dump()
        values["runtime"]["strategy"] = strategy
        values["finetune"]["views"] = views
        settings = params.parse(values)
        stages.finetune(settings)
        name = strategy + "_views" * bool(views)
        shutil.move("models/finetune", "models/" + name)
        shutil.move("metrics/finetune.json", "metrics/" + name + ".json")
values["finetune"] |= {"ema": 0.7, "schedule": {"name": "cosine"}, "learning_rate": 0.01}
settings = params.parse(values)
stages.finetune(settings, settings.sam)
shutil.move("models/sam", "models/whole")
shutil.move("plots/sam.csv", "plots/whole.csv")
save = stages.State.save
def interrupted(self, *arguments):
    save(self, *arguments)
    raise KeyboardInterrupt
stages.State.save = interrupted
try:
    stages.finetune(settings, settings.sam)
except KeyboardInterrupt:
    stages.State.save = save
stages.finetune(settings, settings.sam)
"""


@pytest.mark.slow
def test_two_devices_give_what_one_gives(study: Path) -> None:
    # The last batch holds one image: the second device has none of it.
    settings = small(augment=VARIED, dropout=0.0, optimizer="sgd", learning_rate=0.05)
    Path("params.json").write_text(settings.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", MIRRORED],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    start = [np.array(variable) for variable in classifier.load("models/select").head.trainable_variables]
    for kept in ("_views", ""):
        one, two = trained_weights(f"models/one{kept}"), trained_weights(f"models/mirrored{kept}")
        for first, second in zip(one, two, strict=True):
            np.testing.assert_allclose(first, second, atol=1e-4)
    assert np.abs(one[-2] - start[0]).max() > 1e-3
    assert metrics("one")["val"] == pytest.approx(metrics("mirrored")["val"], abs=1e-3)
    assert metrics("one")["gradient_evaluations"] == metrics("mirrored")["gradient_evaluations"]
    assert metrics("sam")["gradient_evaluations"] == 2 * TRAIN * 2
    assert math.isfinite(metrics("sam")["val"]["loss"])
    assert "going on after epoch 1" in done.stdout
    for name in ("classifier.weights.h5", "model.json"):
        assert Path(f"models/sam/{name}").read_bytes() == Path(f"models/whole/{name}").read_bytes()
    assert Path("plots/sam.csv").read_bytes() == Path("plots/whole.csv").read_bytes()


@pytest.mark.usefixtures("study")
def test_the_default_cut_is_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = list[stages.Job]()
    monkeypatch.setattr(training, "_run", jobs.append)
    stages.finetune(small(fine_tune_at=None))
    model = jobs[0].start(records.Records("data/records"))
    assert model.description.fine_tune_at == registry.find("MobileNet025").fine_tune_at


def test_the_state_is_keyed_by_what_the_result_depends_on(study: Path) -> None:
    def folder(settings: Params, machines: tuple[int, int] = (1, 1), **depends_on: Any) -> str:
        files = (stages.SELECTED / classifier.MODEL, stages.SELECTED / classifier.WEIGHTS)
        job = stages.Job(
            "finetune",
            settings,
            settings.finetune,
            lambda _: pytest.fail("started"),
            files=files,
            depends_on=depends_on,
        )
        return job.state(records.Records("data/records"), *machines).name

    base = folder(small())
    assert base == folder(small())
    assert base.startswith("finetune-")
    others = [
        folder(small(learning_rate=0.02)),
        folder(small(ema=0.5)),
        folder(small(runtime={"deterministic": False})),
        folder(small(), sam={"rho": 0.05}),
        folder(small(), (1, 2)),
        folder(small(), (2, 2)),
        folder(small().model_copy(update={"seed": 4})),
        folder(small().model_copy(update={"augment": params.Augment(engine="none", crop=1)})),
    ]
    # What `evaluate` is told changes nothing here.
    assert base == folder(small().model_copy(update={"evaluate": params.Evaluate(resamples=7)}))
    (study / "models/select/model.json").write_text("{}")
    others.append(folder(small()))
    assert len({base, *others}) == 10


def test_a_cache_that_cannot_be_written_is_an_error_before_the_first_epoch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE: expected a folder to write to, received .*file/state"):
        stages.State(tmp_path / "file" / "state")


WORKER = """
import sys
import time
from flatmin.common import params
from flatmin.common import errors
from flatmin.training import stages
settings = params.load("../params.json")
errors.run(lambda: stages.finetune(settings, settings.sam if sys.argv[1] == "sam" else None))
"""


def start_workers(
    study: Path, ports: list[int], name: str, namespaces: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    """Two workers, each with a folder and a cache of its own: on loopback, or each in a network namespace."""
    hosts = [f"{NETWORK}.{index}" for index in (1, 2)] if namespaces else ["127.0.0.1"] * 2
    cluster = {"worker": [f"{host}:{port}" for host, port in zip(hosts, ports, strict=True)]}
    started = []
    for index in range(2):
        folder = study / f"worker_{index}"
        folder.mkdir(exist_ok=True)
        for shared in ("data", "models/select"):
            (folder / shared).parent.mkdir(exist_ok=True)
            if not (folder / shared).exists():
                (folder / shared).symlink_to(study / shared)
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        environment = {
            "PYTHONPATH": str(ROOT / "src"),
            "FLATMIN_CACHE": str(folder / "cache"),
            "TF_CONFIG": json.dumps(config),
        }
        with (folder / "log").open("w") as log:
            within = ["ip", "netns", "exec", namespaces[index]] if namespaces else []
            command = [*within, sys.executable, "-u", "-c", WORKER, name]
            started.append(
                subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=log, stderr=log, text=True)
            )
    return started


@pytest.mark.slow
def test_two_workers_share_the_views(study: Path) -> None:
    """Each computes its half of each view, and both train on the batches that one alone would get."""
    write_images(study, 90)  # three chunks: two of them are the first worker's
    recipe = {"dropout": 0.0, "optimizer": "sgd", "learning_rate": 0.05, "epochs": 3, "views": 2, "batch_size": 16}
    stages.finetune(small(augment=VARIED, **recipe))
    whole = [np.load(path) for path in view_files(study / "cache")]
    settings = small(augment=VARIED, runtime={"strategy": "multi_worker"}, **recipe)
    Path("params.json").write_text(settings.model_dump_json())
    assert [worker.wait(300) for worker in start_workers(study, free_ports(2), "finetune")] == [0, 0]
    for first, second in zip(
        trained_weights("models/finetune"), trained_weights("worker_0/models/finetune"), strict=True
    ):
        np.testing.assert_allclose(first, second, atol=1e-4)
    sizes = [sorted(len(np.load(path)) for path in view_files(study / f"worker_{index}/cache")) for index in range(2)]
    assert sizes == [[9, 58, 58], [9, 32, 32]]
    # Together they are the whole views, example by example.
    shares = [np.load(path) for index in range(2) for path in view_files(study / f"worker_{index}/cache")]
    together = {row.tobytes() for array in shares for row in array}
    assert together == {row.tobytes() for array in whole for row in array}


@pytest.mark.slow
def test_two_workers_killed_or_not_give_the_same_bytes(study: Path) -> None:
    settings = small(runtime={"strategy": "multi_worker"}, dropout=0.0, optimizer="sgd", learning_rate=0.05, epochs=6)
    Path("params.json").write_text(settings.model_dump_json())
    logs = [study / f"worker_{index}/log" for index in range(2)]
    assert [worker.wait(300) for worker in start_workers(study, free_ports(2), "sam")] == [0, 0]
    whole = written(study / "worker_0", "sam")
    chief, other = start_workers(study, free_ports(2), "sam")
    deadline = time.monotonic() + 200
    # Once the second has saved an epoch the first will, and cannot finish the next one alone.
    while time.monotonic() < deadline:
        states = list((study / "worker_1/cache").rglob("worker_1.npz"))
        if states and stages.State(states[0].parent, 1).epochs() >= 3:
            break
        time.sleep(0.02)
    other.kill()
    other.wait()
    assert chief.wait(120) == 1
    assert "error: sam: expected all workers to the end, lost one; start" in logs[0].read_text()
    assert "AutoGraph" not in logs[0].read_text()
    # As if it had been killed before it saved its last epoch: they go on from the one before.
    (before,) = (study / "worker_1/cache").rglob("worker_1_before.npz")
    before.replace(before.with_name("worker_1.npz"))
    kept = stages.State(before.parent, 1, 2).epochs()
    assert [worker.wait(300) for worker in start_workers(study, free_ports(2), "sam")] == [0, 0]
    assert all(f"going on after epoch {kept}\n" in log.read_text() for log in logs)
    assert written(study / "worker_0", "sam") == whole


NETWORK = "10.77.31"


def ip(*arguments: str) -> bool:
    """Whether there is `ip` (Debian's iproute2) and it succeeds."""
    return shutil.which("ip") is not None and not subprocess.run(["ip", *arguments], capture_output=True).returncode


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces with a link between them, as two machines have; none where they may not be made."""
    names = [f"flatmin-{os.getpid()}-{index}" for index in (1, 2)]
    ends = [f"fm{os.getpid() % 10**6}-{index}" for index in (1, 2)]
    try:
        made = all(ip("netns", "add", name) for name in names)
        made = made and ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for index, (name, end) in enumerate(zip(names, ends, strict=True) if made else (), start=1):
            assert ip("link", "set", end, "netns", name)
            assert ip("-n", name, "address", "add", f"{NETWORK}.{index}/24", "dev", end)
            assert ip("-n", name, "link", "set", end, "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield names if made else []
    finally:
        for name in names:
            ip("netns", "delete", name)  # and its end of the link


@pytest.mark.slow
def test_two_workers_give_what_one_gives(study: Path, namespaces: list[str]) -> None:
    """In two network namespaces neither can reach the other but through the network; else they are on loopback."""
    recipe = {"dropout": 0.0, "optimizer": "sgd", "learning_rate": 0.05, "epochs": 6}
    stages.finetune(small(**recipe))
    Path("params.json").write_text(small(runtime={"strategy": "multi_worker"}, **recipe).model_dump_json())
    assert [worker.wait(300) for worker in start_workers(study, free_ports(2), "finetune", namespaces)] == [0, 0]
    for first, second in zip(
        trained_weights("models/finetune"), trained_weights("worker_0/models/finetune"), strict=True
    ):
        np.testing.assert_allclose(first, second, atol=1e-4)
    together = json.loads((study / "worker_0/metrics/finetune.json").read_text())
    assert together["val"]["accuracy"] == metrics("finetune")["val"]["accuracy"]
    assert not (study / "worker_1/models/finetune").exists()  # the first alone writes
    assert not (study / "worker_1/metrics").exists()


TASK = '"task": {"type": "worker", "index": 0}'


@pytest.mark.parametrize(
    "config",
    [
        None,
        "no json",
        "[]",
        '{"cluster": {}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": true}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 0}}',
        f'{{"cluster": {{"worker": "a:1"}}, {TASK}}}',
        f'{{"cluster": {{"worker": [1]}}, {TASK}}}',
        f'{{"cluster": {{"worker": ["a"]}}, {TASK}}}',
        f'{{"cluster": {{"worker": ["http://a:1"]}}, {TASK}}}',
        f'{{"cluster": ["a:1"], {TASK}}}',
    ],
)
def test_several_workers_need_a_tf_config(config: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(InputError, match=r"TF_CONFIG: expected JSON with cluster\.worker and task"):
        runtime.strategy(params.Runtime(strategy="multi_worker"))
