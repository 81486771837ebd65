"""control: finetune's recipe for the gradient evaluations that sam-finetune took; and accuracies on wrong labels."""

from __future__ import annotations

import csv
import json
import math
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import (
    SEED,
    SELECTED,
    TRAIN,
    VARIED,
    control,
    finetune,
    interrupted_after,
    item,
    metrics,
    run_stage,
    small,
    write_classifier,
    write_images,
    written,
)

from flatmin.common.errors import InputError
from flatmin.common.params import Params, Sam
from flatmin.data import writer
from flatmin.inputs import batches
from flatmin.inputs.batches import derived_seed
from flatmin.inputs.records import Records
from flatmin.models import classifier
from flatmin.training import stages
from flatmin.training.schedule import Budget
from flatmin.training.step import TrainStep

BUDGET = f"models/budget/{SEED}.json"
BATCH = 3  # of the 13 images; the last of five batches is a single one


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    with chdir(folder):
        write_images(folder, TRAIN)
        write_classifier()
    return folder


@pytest.fixture(autouse=True)
def study(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template as the working directory: records, and the selected classifier."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[TrainStep]:
    """The step of each training that is run, in order."""
    made: list[TrainStep] = []

    def noted(*arguments: Any, **options: Any) -> TrainStep:
        made.append(TrainStep(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(stages, "TrainStep", noted)
    return made


def recipe(**changes: Any) -> Params:
    """A recipe in which everything that a training keeps from one step to another matters."""
    varied: dict[str, Any] = {
        "schedule": {"name": "cosine", "warmup_epochs": 0.4},
        "optimizer": "adamw",
        "learning_rate": 0.002,
        "weight_decay": 0.01,
        "ema": 0.8,
        "dropout": 0.5,
    }
    return small(augment=VARIED, **varied | changes)


def plot(name: str) -> list[dict[str, str]]:
    with Path(f"plots/{item(name)}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rate(step: TrainStep) -> float:
    return step.rate()


@pytest.mark.slow
@pytest.mark.parametrize("views", [0, 2], ids=["images", "views"])
def test_control_by_the_budget_of_sam_without_a_radius_is_finetune_byte_for_byte(views: int) -> None:
    settings = recipe(epochs=3, views=views)
    finetune(settings)
    finetune(settings, Sam(rho=0.0))
    assert json.loads(Path(BUDGET).read_text()) == {"gradient_evaluations": 3 * TRAIN, "validations": 3}
    control(settings)
    expected = written("finetune")
    assert set(expected) == {
        classifier.WEIGHTS,
        classifier.MODEL,
        classifier.VAL_LOGITS,
        f"{SEED}.json",
        f"{SEED}.csv",
    }
    assert written("control") == expected
    assert written("sam") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "views", "ends"),
    [
        (Sam(), 2, ["2", "4"]),
        (Sam(every=2), 0, ["1.4", "3"]),  # an update in two is perturbed: 26 images and 13 again
        (Sam(every=2), 2, ["1.4", "3"]),
    ],
    ids=["whole epochs", "images", "views"],
)
def test_control_takes_what_sam_finetune_took_and_resumes_within_an_epoch(
    step: Sam, views: int, ends: list[str], steps: list[TrainStep], study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(views=views)
    finetune(settings, step)
    control(settings)
    took, found = metrics("sam"), metrics("control")
    assert abs(found["gradient_evaluations"] - took["gradient_evaluations"]) <= BATCH / 2
    assert found["gradient_evaluations"] > 1.4 * TRAIN * 2, "more than finetune's"
    assert found["validations"] == took["validations"] == len(plot("control")) == len(plot("sam")) == 2
    assert [row["epoch"] for row in plot("control")] == ends
    assert found["epochs"] == float(ends[-1])
    # The schedule spans all its steps: it is warmed up after 0.4 of 2 epochs, a fifth of them, and comes to its end.
    fallen = (float(ends[0]) / float(ends[1]) - 0.2) / 0.8
    expected = 0.002 * (1 + math.cos(math.pi * fallen)) / 2
    assert float(plot("control")[1]["learning_rate"]) == pytest.approx(expected, rel=1e-4)
    assert rate(steps[-1]) == pytest.approx(0, abs=1e-9)
    assert not list((study / "cache").rglob("*.npz"))
    if ends[0] == "2":
        return
    whole = written("control")
    shutil.rmtree("models/control")
    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        control(settings)
    assert not Path("models/control").exists()
    capsys.readouterr()
    control(settings)
    assert f"control@{SEED}: resuming after epoch {ends[0]}\n" in capsys.readouterr().out
    assert written("control") == whole
    # What is saved may be of a time before the interruption. The averages of the last weights are the optimizer's.
    uninterrupted, _, resumed = (step.optimizer.variables for step in steps[1:])
    for one, other in zip(uninterrupted, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not list((study / "cache").rglob("*.npz"))


@pytest.mark.slow
def test_control_after_a_sam_finetune_that_stopped_early_takes_what_that_used(steps: list[TrainStep]) -> None:
    """No val loss falls by 100, so the first epoch stays the best. control itself never stops early."""
    settings = recipe(epochs=6, views=1, early_stopping={"patience": 1, "min_delta": 100.0})
    finetune(settings, Sam())
    took = metrics("sam")
    assert (took["stopped_early"], took["epochs"], took["gradient_evaluations"]) == (True, 2, 2 * 2 * TRAIN)
    assert rate(steps[-1]) > 0, "it was stopped within its schedule"
    control(settings)
    found = metrics("control")
    assert (found["epochs"], found["validations"], found["gradient_evaluations"]) == (4, 2, 2 * 2 * TRAIN)
    assert "stopped_early" not in found
    assert rate(steps[-1]) == pytest.approx(0, abs=1e-9)
    Budget(5 * TRAIN, 5).write(BUDGET)
    control(settings)
    assert (metrics("control")["epochs"], metrics("control")["validations"]) == (5, 5)


@pytest.mark.parametrize("content", [None, '{"gradient_evaluations": 26}'])
def test_control_without_a_budget_is_an_error_that_names_the_file(content: str | None) -> None:
    if content is not None:
        Path("models/budget").mkdir()
        Path(BUDGET).write_text(content)
    with pytest.raises(InputError, match=rf"^{BUDGET}: expected "):
        control(small())


def test_stages_of_each_seed_draw_by_it_and_write_to_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[stages.Job, stages.Outputs]] = []
    monkeypatch.setattr(stages, "_train", lambda job, records, outputs: asked.append((job, outputs)))
    settings = small().model_copy(update={"seeds": [3, 11]})
    Path("models/budget").mkdir()
    for seed in (3, 11):
        Budget(TRAIN * seed, seed).write(f"models/budget/{seed}.json")
        for script in ("finetune", "sam_finetune", "control"):
            run_stage(script, settings, str(seed))
    folders = {"finetune": "finetune", "sam-finetune": "sam", "control": "control"}
    expected = [(f"{stage}@{seed}", folder, seed) for seed in (3, 11) for stage, folder in folders.items()]
    for (job, outputs), (name, folder, seed) in zip(asked, expected, strict=True):
        assert job.name == name
        assert job.seed == derived_seed(seed, 1)
        assert outputs.model == f"models/{folder}/{seed}"
        assert outputs.metrics == f"metrics/{folder}/{seed}.json"
        assert outputs.plot == f"plots/{folder}/{seed}.csv"
        assert outputs.budget == (f"models/budget/{seed}.json" if folder == "sam" else None)
        assert job.budget == (Budget(TRAIN * seed, seed) if folder == "control" else None)
        assert job.start(Records("data/records")).description.seed == job.seed


# Training images with a wrong label


def relabel(label_noise: float) -> Records:
    """Write the records again, with wrong labels in train."""
    writer.write(small().data.model_copy(update={"label_noise": label_noise}), "data/records")
    return Records("data/records")


@pytest.mark.slow
@pytest.mark.parametrize("views", [0, 1], ids=["images", "views"])
def test_finetune_on_wrong_labels_writes_accuracies_on_clean_and_on_wrong_ones(views: int) -> None:
    """With a rate so small that nothing moves, they are those of the selected classifier, counted here by hand."""
    records = relabel(0.4)
    settings = small(learning_rate=1e-12, optimizer="sgd", dropout=0.0, views=views)
    finetune(settings)
    rows = plot("finetune")
    columns = "epoch,learning_rate,loss,accuracy,accuracy_clean,accuracy_wrong,val_loss,val_accuracy"
    assert list(rows[0]) == columns.split(",")
    pixels = (images for images, _ in batches.plain(records, "train", 32, 8))
    predicted = np.argmax(classifier.load(SELECTED).logits(pixels), axis=1)
    with Path("data/records/train/index.csv").open(newline="") as file:
        labels = [(int(row["label"]), int(row["true_label"])) for row in csv.DictReader(file)]
    right = [label == guess for (label, _), guess in zip(labels, predicted, strict=True)]
    clean = [hit for hit, (label, true) in zip(right, labels, strict=True) if label == true]
    wrong = [hit for hit, (label, true) in zip(right, labels, strict=True) if label != true]
    assert (len(clean), len(wrong)) == (8, 5)
    assert len({np.mean(right), np.mean(clean), np.mean(wrong)}) == 3, "each would pass for another"
    for row in rows:
        expected = {"accuracy": np.mean(right), "accuracy_clean": np.mean(clean), "accuracy_wrong": np.mean(wrong)}
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_control_of_parts_of_epochs_without_a_wrong_label_leaves_their_cells_empty() -> None:
    relabel(0.08)  # of 13 images one
    Budget(TRAIN, 5).write(BUDGET)
    control(small(views=1))
    cells = [(row["accuracy_clean"], row["accuracy_wrong"]) for row in plot("control")]
    assert len(cells) == 5
    assert sum(wrong != "" for _, wrong in cells) <= 1
    assert all((clean == "") == (wrong == "") for clean, wrong in cells)
