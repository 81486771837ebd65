"""The training stages from records to weights, metrics and plot, byte for byte the same however often they start."""

from __future__ import annotations

import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from trainings import (
    BACKBONE,
    HEADS,
    SEED,
    SELECTED,
    SPLIT_POINT,
    TRAIN,
    VAL,
    VARIED,
    control,
    distance,
    extract,
    finetune,
    interrupted_after,
    item,
    metrics,
    saved_weights,
    scores_on_val,
    small,
    view_files,
    write_classifier,
    write_images,
    written,
)

from flatmin import runtime
from flatmin.common import params
from flatmin.common.errors import InputError
from flatmin.common.params import Params, Sam
from flatmin.features import engine
from flatmin.inputs import batches
from flatmin.inputs.records import Records
from flatmin.models import classifier, registry, scores
from flatmin.models.classifier import Classifier
from flatmin.selection import backbone
from flatmin.training import stages
from flatmin.training.schedule import Budget
from flatmin.training.step import PLAIN, StepSettings
from flatmin.training.workers import Workers


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records of three classes of coloured noise, and classifiers to select: `linear` and `levels`."""
    folder = tmp_path_factory.mktemp("template")
    with chdir(folder):
        write_images(folder, TRAIN)
        for head in HEADS:
            write_classifier(head, f"models/{head}")
    return folder


@pytest.fixture
def study(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template as the working directory, the linear classifier selected."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path / "cache"))
    select("linear")
    return tmp_path


def select(head: str) -> None:
    shutil.copytree(f"models/{head}", SELECTED, dirs_exist_ok=True)


def trained_weights(name: str) -> dict[str, np.ndarray]:
    return saved_weights(f"models/{item(name)}")


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, study: Path) -> list[stages.Job]:
    """The trainings that stages ask for, which are not run."""

    class Removed:
        def remove(self) -> None:
            pass

    asked: list[stages.Job] = []

    def note(job: stages.Job, records: str, outputs: stages.Outputs) -> Removed:
        asked.append(job)
        return Removed()

    monkeypatch.setattr(stages, "_train", note)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "views", "precision"),
    [
        (Sam(), 0, "float32"),
        (Sam(every=2), 3, "mixed_float16"),
    ],
    ids=["images", "views"],
)
def test_sam_finetune_interrupted_and_resumed_gives_the_same_bytes(
    study: Path, capsys: pytest.CaptureFixture[str], step: Sam, views: int, precision: str
) -> None:
    """tests/test_training_trainer.py has the other methods. Keras' policy is afterwards what it was."""
    recipe: dict[str, Any] = {"epochs": 3, "learning_rate": 0.001, "ema": 0.9, "dropout": 0.5, "views": views}
    settings = small(augment=VARIED, runtime={"precision": precision}, **recipe)
    finetune(settings, step)
    assert keras.config.dtype_policy().name == "float32"
    assert metrics("sam")["best_epoch"] > 1, "what is saved is of an epoch before the interruption"
    whole = written("sam")
    with interrupted_after(1), pytest.raises(KeyboardInterrupt):
        finetune(settings, step)
    assert keras.config.dtype_policy().name == "float32"
    assert len(list((study / "cache").rglob("*.npz"))) == 1
    capsys.readouterr()
    finetune(settings, step)
    assert f"sam-finetune@{SEED}: resuming after epoch 1\n" in capsys.readouterr().out
    assert written("sam") == whole
    assert not list((study / "cache").rglob("*.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_stages_in_turn_write_what_they_trained(head: str, study: Path) -> None:
    settings = small(extract=HEADS[head], ema=0.5)
    extract(settings)
    backbone.select([BACKBONE], settings.select, models="models/extract", metrics="metrics/extract", selected=SELECTED)
    passes = {f"extract/{BACKBONE}": 1, "finetune": 1, "sam": 2}
    if head == "linear":
        finetune(settings)
    else:
        del passes["finetune"]
    finetune(settings, settings.sam)
    models = {name: classifier.load(f"models/{item(name)}") for name in passes}
    for name, model in models.items():
        values = metrics(name)
        assert set(values) == {
            "backbone",
            "best_epoch",
            "engine",
            "epochs",
            "gradient_evaluations",
            "image_size",
            "multiply_adds",
            "val",
            "validations",
        }
        assert set(values["val"]) == {"accuracy", "balanced_accuracy", "top5_accuracy", "loss", "balanced_loss"}
        assert values["epochs"] == values["validations"] == 2
        assert values["engine"] == "tensorflow"
        assert values["gradient_evaluations"] == TRAIN * 2 * passes[name]
        assert values["val"]["top5_accuracy"] == 1
        # What was saved is the best epoch's, and scores what the metrics say.
        assert scores_on_val(model) == pytest.approx(values["val"], rel=1e-4)
        logits = np.load(f"models/{item(name)}/val_logits.npy")
        assert (logits.dtype, logits.shape) == (np.float32, (VAL, 3))
        assert scores.score(logits, Records("data/records").labels("val")) == pytest.approx(values["val"], rel=1e-6)
        rows = Path(f"plots/{item(name)}.csv").read_text().splitlines()
        assert rows[0] == "epoch,learning_rate,loss,accuracy,val_loss,val_accuracy"
        assert len(rows) == 3
        best = rows[values["best_epoch"]].split(",")
        assert float(best[5]) == pytest.approx(values["val"]["accuracy"], rel=1e-5)
    layers = ["conv_dw_11", classifier.STANDARDIZED] if head == "levels" else ["conv_dw_11"]
    selected, *tuned = (
        [np.array(variable) for name in layers for variable in model.features.get_layer(name).weights]
        for model in models.values()
    )
    for frozen in tuned:
        for one, other in zip(selected, frozen, strict=True):
            np.testing.assert_array_equal(one, other)
    if head == "linear":
        assert distance(trained_weights("finetune"), trained_weights("sam")) > 1e-3
    else:  # resumed trainings show it of the linear one
        before = {name: written(name) for name in (f"extract/{BACKBONE}", "sam")}
        extract(settings)
        finetune(settings, settings.sam)
        assert before == {name: written(name) for name in before}
    assert not list((study / "cache").rglob("*.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_finetune_on_cached_views_trains_as_on_images(
    head: str, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without augmentation a view is the image: an epoch in the same order differs by float16's rounding alone."""
    select(head)
    recipe = {"dropout": 0.0, "optimizer": "sgd", "learning_rate": 0.02, "batch_size": TRAIN, "epochs": 3}
    finetune(small(**recipe))
    expected, on_images = trained_weights("finetune"), metrics("finetune")
    finetune(small(**recipe, views=1))
    moved = distance(expected, saved_weights(SELECTED))
    assert 0 < distance(expected, trained_weights("finetune")) < moved / 50
    on_views = metrics("finetune")
    assert on_views["val"]["loss"] == pytest.approx(on_images["val"]["loss"], rel=1e-2)
    assert (on_images["engine"], on_views["engine"]) == ("tensorflow", "litert")
    compared = {"images": VAL, "accuracy": on_views["val"]["accuracy"], "accuracy_difference": 0.0}
    assert on_views["val_from_images"] == compared
    assert not list(study.rglob(".*.part"))
    assert f"val activations: {VAL} images" in capsys.readouterr().out
    before = view_files()
    assert len(before) == 2 * (5 if head == "levels" else 1), "of each tensor at the split"
    if head == "linear":
        return
    # sam-finetune takes the same views, and makes none; nor are the frozen layers converted again.
    monkeypatch.setattr(engine, "_converted", lambda _: pytest.fail("converted again"))
    finetune(small(**recipe | {"epochs": 1}, views=1), Sam())
    assert "activations" not in capsys.readouterr().out
    assert view_files() == before


@pytest.mark.slow
def test_finetune_that_diverges_is_an_error_and_writes_nothing(study: Path) -> None:
    before = {path for path in study.rglob("*") if "cache" not in path.parts}
    with pytest.raises(InputError, match=rf"^finetune@{SEED}: the training diverged in epoch"):
        finetune(small(learning_rate=1e38, epochs=1, runtime={"precision": "mixed_bfloat16"}))
    assert keras.config.dtype_policy().name == "float32"
    assert {path for path in study.rglob("*") if "cache" not in path.parts} == before


@pytest.mark.slow
def test_finetune_without_a_split_point_takes_the_registrys(jobs: list[stages.Job]) -> None:
    finetune(small(fine_tune_at=None))
    finetune(small(fine_tune_at={"ResNet50": "conv2_block1_1_conv"}))
    finetune(small())
    points = [job.start(Records("data/records")).description.fine_tune_at for job in jobs]
    default = registry.find(BACKBONE).fine_tune_at
    assert points == [default, default, SPLIT_POINT]


@pytest.mark.slow
def test_finetune_draws_other_views_than_extract(jobs: list[stages.Job]) -> None:
    settings = small()
    extract(settings)
    finetune(settings)
    finetune(settings, Sam())
    extract_seed, finetune_seed, sam_seed = (job.seed for job in jobs)
    assert extract_seed == settings.extract.seed == SEED
    assert finetune_seed == sam_seed == batches.derived_seed(SEED, 1) != extract_seed


@pytest.mark.slow
def test_extract_without_augmentation_of_its_own_sees_images_as_they_are(jobs: list[stages.Job]) -> None:
    for own in (True, False):
        extract(small(augment=VARIED, extract={"augment": own}))
    assert [job.augment for job in jobs] == [params.Augment.model_validate(VARIED), params.Augment(engine="none")]


@pytest.mark.slow
def test_sam_finetune_takes_finetunes_recipe_but_epochs_of_its_own(jobs: list[stages.Job]) -> None:
    settings = small(epochs=4)
    step = Sam(epochs=2, accumulate=3, rho=0.1)
    finetune(settings)
    finetune(settings, step)
    finetune(settings, Sam())
    plain, own, same = jobs
    assert (plain.name, own.name) == (f"finetune@{SEED}", f"sam-finetune@{SEED}")
    assert plain.recipe == same.recipe == settings.finetune
    assert own.recipe == settings.finetune.model_copy(update={"epochs": 2})
    assert plain.step is PLAIN
    assert own.step.depends_on == step.settings()
    assert (own.step.accumulate, own.step.hint, own.step.rooms) == (3, "a lower rho than 0.1", ("sam",))
    assert plain.files == own.files == (Path(SELECTED, classifier.MODEL), Path(SELECTED, classifier.WEIGHTS))


def test_state_folder_is_keyed_by_what_the_result_depends_on(study: Path) -> None:
    def start(_: Records) -> Classifier:
        pytest.fail("started")

    def folder(
        settings: Params,
        workers: int = 1,
        replicas: int = 1,
        step: StepSettings = PLAIN,
        budget: Budget | None = None,
        seed: int = SEED,
        **depends_on: Any,
    ) -> str:
        job = stages.Job(
            "finetune",
            seed,
            settings.runtime,
            settings.augment,
            settings.finetune,
            start,
            step,
            budget,
            files=(Path(SELECTED, classifier.MODEL), Path(SELECTED, classifier.WEIGHTS)),
            depends_on=depends_on,
        )
        together = one_worker()
        together.count, together.replicas = workers, replicas
        return job.state_folder(Records("data/records"), together).name

    def changed(**sections: Any) -> Params:
        return small().model_copy(update=sections)

    base = folder(small())
    assert base == folder(small())
    assert base.startswith("finetune-")
    others = [
        folder(small(learning_rate=0.02)),
        folder(small(ema=0.5)),
        folder(small(runtime={"deterministic": False})),
        folder(small(), step=StepSettings(PLAIN.make, depends_on={"rho": 0.05})),
        folder(small(), weights="others"),
        folder(small(), workers=2),
        folder(small(), workers=2, replicas=2),
        folder(small(), seed=4),
        folder(small(), budget=Budget(2 * TRAIN, 1)),
        folder(small(), budget=Budget(3 * TRAIN, 2)),
        folder(changed(augment=params.Augment(engine="none", crop=1))),
    ]
    # evaluate's settings and other trainings' seeds change nothing here, nor does a budget of what the epochs take.
    assert base == folder(changed(evaluate=params.Evaluate(ece_bins=7)))
    assert base == folder(changed(seeds=[1, 2, SEED]))
    assert base == folder(small(), budget=Budget(2 * TRAIN, 2))
    (study / SELECTED / "model.json").write_text("{}")
    others.append(folder(small()))
    assert len({base, *others}) == len(others) + 1


def one_worker() -> Workers:
    return Workers(runtime.strategy(params.Runtime(strategy="one")))


def test_states_of_stages_have_a_folder_each_with_the_stages_name(jobs: list[stages.Job]) -> None:
    settings = small(batch_size=4)
    extract(settings)
    finetune(settings)
    finetune(settings, Sam(rho=0.0))
    Path("models/budget").mkdir()
    Budget(2 * TRAIN, 2).write(f"models/budget/{SEED}.json")
    control(settings)
    folders = [job.state_folder(Records("data/records"), one_worker()) for job in jobs]
    names = [folder.name.rpartition("-")[0] for folder in folders]
    assert names == [f"extract-train@{BACKBONE}", f"finetune@{SEED}", f"sam-finetune@{SEED}", f"control@{SEED}"]
    assert len({folder.parent for folder in folders}) == 1
