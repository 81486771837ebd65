"""evaluate from end to end, on classifiers of random weights."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import runpy
import shutil
from contextlib import chdir, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from networks import spread
from PIL import Image
from repository import ROOT
from trainings import NAMES, Given

from flatmin import runtime
from flatmin.common import files, params
from flatmin.common.errors import InputError
from flatmin.common.params import Params
from flatmin.data import writer
from flatmin.evaluation import evaluate, minima, subsets
from flatmin.inputs import batches
from flatmin.inputs.records import Records
from flatmin.models import classifier, registry, scores

METHODS, SEEDS = ("finetune", "control", "sam"), (3, 4)
MODELS = {"extract": "models/select"} | {
    f"{name}@{seed}": f"models/{name}/{seed}" for name in METHODS for seed in SEEDS
}
FOLDERS = {name: {seed: f"models/{name}/{seed}" for seed in SEEDS} for name in METHODS}
SCORES = {"accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "loss", "ece"}
SHARPNESS = {"loss", "gradient_rise", "adaptive_rise", "trace", *(f"eigenvalue_{index}" for index in range(1, 6))}


def study(mirrored: bool = False, runtime: dict[str, Any] | None = None, **splits: str) -> Params:
    roles = {"train": "train", "val": "val", "test": "test", **splits}
    left = sorted({"train", "val", "test", "unknown"} - set(roles.values()))
    recipe = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 4, "epochs": 1, "image_size": 32}
    return params.parse(
        {
            "seeds": list(SEEDS),
            "runtime": runtime or {},
            "data": {
                "source": "folder",
                "name": "images",
                "splits": {**roles, "unused": "+".join(left)} if left else roles,
            },
            "augment": {"engine": "none"},
            "backbones": ["MobileNet025"],
            "extract": recipe,
            "select": {"metric": "accuracy"},
            "audit": {},
            "finetune": recipe,
            "sam": {},
            "finalize": {},
            "evaluate": {
                "batch_size": 8,
                "mirrored": mirrored,
                "sharpness": {"images": 2, "steps": 6, "probes": 2},
            },
        }
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of three classes, some unlabelled, and classifiers of random weights, one for each seed."""
    folder = tmp_path_factory.mktemp("template")
    random = np.random.default_rng(0)
    for split, each in (("train", 1), ("val", 1), ("test", 2)):
        for channel, name in enumerate(reversed(NAMES)):
            for index in range(each):
                write_image(folder / f"images/{split}/{name}/{index}.png", channel, random)
    for index in range(5):
        write_image(folder / f"images/unknown/{index}.png", index % 3, random)
    for seed, (name, saved) in enumerate(MODELS.items()):
        model = classifier.create("MobileNet025", NAMES, image_size=32, dropout=0.0, seed=seed, weights="none")
        spread(model.base)
        for variable in model.head.trainable_variables:
            variable.assign(random.normal(size=variable.shape))
        model.save(folder / saved, random.normal(size=(3, len(NAMES))).astype(np.float32))
        val = {"accuracy": 0.5 + seed / 100, "balanced_accuracy": 0.5, "loss": 1.0}
        metrics = "select" if name == "extract" else name.replace("@", "/")
        files.write_json(folder / f"metrics/{metrics}.json", {"val": val, "gradient_evaluations": 100 + seed})
    write_pairs(folder)
    return folder


def write_pairs(folder: Path, *rows: tuple[str, int, str, int]) -> None:
    """What audit found: role, position, role of the near duplicate, whether their labels contradict each other."""
    files.write_csv(folder / "audit/pairs.csv", ["role", "position", "like_role", "contradicts"], rows)


def write_image(path: Path, channel: int, random: np.random.Generator) -> None:
    pixels = random.integers(0, 60, (32, 32, 3), np.uint8)
    pixels[..., channel] += 190
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def evaluated(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where evaluate has run, on mirrored images too, and to predict unlabelled ones. Not to be changed."""
    folder = tmp_path_factory.mktemp("evaluated") / "study"
    shutil.copytree(template, folder)
    # Image 2 of test is in train, too; image 4 is in val, with another label; what val has of train concerns no score.
    write_pairs(folder, ("test", 2, "train", 0), ("test", 4, "val", 1), ("val", 0, "train", 0))
    with chdir(folder), (folder / "log").open("w") as log:
        run(study(mirrored=True, predict="unknown"), log)
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, the working directory."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(settings: Params, log: Any = None) -> dict[str, Any]:
    """Write records, then run the scripts of finalize and of the stage; the metrics."""
    with redirect_stdout(log) if log else nullcontext():
        run_finalize(settings)
        runpy.run_path(str(ROOT / "stages/evaluate.py"))["main"](Given(settings))
    return read_metrics()


def run_finalize(settings: Params) -> None:
    writer.write(settings.data, "data/records")
    runpy.run_path(str(ROOT / "stages/finalize.py"))["main"](Given(settings))


def read_metrics(folder: Path | str = ".") -> dict[str, Any]:
    return json.loads((Path(folder) / "metrics/evaluate.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_evaluate_scores_every_model_and_predicts(evaluated: Path) -> None:
    metrics = read_metrics(evaluated)
    names = [*MODELS, "final"]
    differences = {"sam_minus_control", "sam_minus_finetune"}
    assert set(metrics) == {"extract", *METHODS, "final", *differences, "sharpness", "test_images"}
    test = rows(evaluated / "predictions/test.csv")
    header = (evaluated / "predictions/test.csv").read_text().splitlines()[0]
    assert header == ",".join(["name", "label", *names])
    assert len(test) == 6
    assert all(row["name"].split("/")[1] == NAMES[int(row["label"])] for row in test)
    right = {name: np.array([row[name] == row["label"] for row in test]) for name in names}
    for name in ("extract", "final"):
        assert set(metrics[name]) == {"test", "mirrored", "without_near_duplicates", "clean", "suspect"}
        assert set(metrics[name]["test"]) == {*SCORES, "calibrated_loss", "calibrated_ece"}
        assert metrics[name]["test"]["accuracy"] == pytest.approx(right[name].mean())
    for name in METHODS:
        each = metrics[name]["seeds"]
        accuracies = [right[f"{name}@{seed}"].mean() for seed in SEEDS]
        assert [each[str(seed)]["test"]["accuracy"] for seed in SEEDS] == pytest.approx(accuracies)
        assert metrics[name]["test"]["accuracy"] == pytest.approx(np.mean(accuracies))
        assert metrics[name]["test_deviation"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
        for kind in ("test", "mirrored", "sharpness"):
            for key, value in metrics[name][kind].items():
                assert value == pytest.approx(np.mean([each[str(seed)][kind][key] for seed in SEEDS]))
        assert set(metrics[name]["sharpness"]) == SHARPNESS
    assert metrics["sam"]["sharpness"] != metrics["finetune"]["sharpness"]
    printed = (evaluated / "log").read_text()
    assert re.search(r"^evaluate: sam test accuracy 0\.\d{4} \(standard deviation over seeds ", printed, re.MULTILINE)
    assert re.search(
        r"^evaluate: sam minus control .*interval .* over seeds and images, for this", printed, re.MULTILINE
    )
    unknown = rows(evaluated / "predictions/predict.csv")
    assert [row["label"] for row in unknown] == ["-1"] * 5
    assert {row["name"] for row in unknown} == {f"unknown/{index}.png" for index in range(5)}
    assert all(row[name] in {"0", "1", "2"} for row in unknown for name in names)


@pytest.mark.slow
def test_evaluate_scores_without_what_train_nearly_has_and_by_clean_and_suspect(evaluated: Path) -> None:
    metrics, test = read_metrics(evaluated), rows(evaluated / "predictions/test.csv")
    parts = {"without_near_duplicates": [0, 1, 3, 4, 5], "clean": [0, 1, 2, 3, 5], "suspect": [4]}
    assert metrics["test_images"] == {"all": 6, "without_near_duplicates": 5, "clean": 5, "suspect": 1}
    right = {name: np.array([row[name] == row["label"] for row in test]) for name in (*MODELS, "final")}
    for part, images in parts.items():
        assert metrics["final"][part]["accuracy"] == pytest.approx(right["final"][images].mean())
        of_seeds = [right[f"sam@{seed}"][images].mean() for seed in SEEDS]
        assert [metrics["sam"]["seeds"][str(seed)][part]["accuracy"] for seed in SEEDS] == pytest.approx(of_seeds)
        assert metrics["sam"][part]["accuracy"] == pytest.approx(np.mean(of_seeds))
        found = metrics["sam_minus_control"][part]
        others = [right[f"control@{seed}"][images].mean() for seed in SEEDS]
        assert found["accuracy"] == pytest.approx(np.mean(of_seeds) - np.mean(others))
        assert found["low"] <= found["accuracy"] <= found["high"]
        assert found["images"] == len(images)
    assert "without test images that have near duplicates in train (5 left)" in (evaluated / "log").read_text()


@pytest.mark.slow
def test_evaluate_differences_are_of_the_predictions(evaluated: Path) -> None:
    metrics, test = read_metrics(evaluated), rows(evaluated / "predictions/test.csv")
    right = {name: np.array([row[name] == row["label"] for row in test]) for name in MODELS}
    for other in ("control", "finetune"):
        found = metrics[f"sam_minus_{other}"]
        pairs = [(right[f"sam@{seed}"], right[f"{other}@{seed}"]) for seed in SEEDS]
        gains = [first.mean() - second.mean() for first, second in pairs]
        assert found["accuracy"] == pytest.approx(np.mean(gains))
        assert found["low"] <= found["accuracy"] <= found["high"]
        assert found["covers"] == "seeds and images"
        assert found["images"] == 6
        assert found["discordance"] == pytest.approx(np.mean([first != second for first, second in pairs]))
        assert [found["seeds"][str(seed)]["accuracy"] for seed in SEEDS] == pytest.approx(gains)
        assert set(found["seeds"]["3"]) == {"accuracy", "low", "high", "p_value"}


@pytest.mark.slow
def test_finalize_releases_a_copy_with_a_temperature(evaluated: Path) -> None:
    """Of these, extract has the fewest gradient evaluations, and the last seed of SAM the highest accuracy on val."""
    final = json.loads((evaluated / "metrics/final.json").read_text())
    assert (final["released"]["method"], final["released"]["seed"]) == ("sam", 4)
    assert final["released"]["temperature"] == final["sam"]["seeds"]["4"]["temperature"]
    assert classifier.describe(evaluated / "models/final").temperature == final["released"]["temperature"]
    weights = (evaluated / "models/sam/4" / classifier.WEIGHTS).read_bytes()
    assert (evaluated / "models/final" / classifier.WEIGHTS).read_bytes() == weights
    assert {path.name for path in (evaluated / "models/final").iterdir()} == {classifier.WEIGHTS, classifier.MODEL}
    assert final["finetune"]["val"]["accuracy"] == pytest.approx((0.51 + 0.52) / 2)
    assert final["finetune"]["val_deviation"]["accuracy"] == pytest.approx(0.01 / 2**0.5)
    metrics = read_metrics(evaluated)
    assert metrics["final"]["test"] == metrics["sam"]["seeds"]["4"]["test"]


@pytest.mark.slow
def test_evaluate_plots_are_of_the_predictions(evaluated: Path) -> None:
    test = rows(evaluated / "predictions/test.csv")
    confusion = rows(evaluated / "plots/confusion.csv")
    assert [(row["actual"], row["predicted"]) for row in confusion] == [
        (NAMES[int(row["label"])], NAMES[int(row["final"])]) for row in test
    ]
    by_class = rows(evaluated / "plots/class_accuracy.csv")
    assert len(by_class) == 12
    accuracies = [float(row["accuracy"]) for row in by_class if row["method"] == "sam"]
    assert np.mean(accuracies) == pytest.approx(read_metrics(evaluated)["sam"]["test"]["accuracy"])
    assert (evaluated / "plots/sharpness.png").exists()


@pytest.mark.slow
def test_evaluate_writes_what_the_report_shows(evaluated: Path) -> None:
    folder, test = evaluated / "evaluation", rows(evaluated / "predictions/test.csv")
    shown = json.loads((folder / "shown.json").read_text())
    wrong = [row for row in test if row["label"] != row["final"]]
    assert shown["wrong"] == len(wrong) > 0
    found = {(each["name"], each["actual"], each["predicted"]) for each in shown["mistakes"]}
    assert found == {(row["name"], NAMES[int(row["label"])], NAMES[int(row["final"])]) for row in wrong}
    sure = [each["probability"] for each in shown["mistakes"]]
    assert sure == sorted(sure, reverse=True)
    assert sum(each["count"] for each in shown["confused"]) == len(wrong)
    files_named = {each[key] for each in shown["mistakes"] for key in ("picture", "activation")}
    files_named |= {name for each in shown["confused"] for name in each["pictures"]}
    files_named |= {name for role in shown["examples"].values() for names in role.values() for name in names}
    assert {path.name for path in (folder / "pictures").iterdir()} == files_named
    assert {role: set(each) for role, each in shown["examples"].items()} == {
        role: set(NAMES) for role in ("train", "val", "test")
    }
    released = classifier.load(evaluated / "models/final")
    assert shown["network"]["parameters"] == released.network.count_params()
    assert shown["network"]["trained_parameters"] == sum(
        math.prod(each.shape) for each in released.head.trainable_variables
    )
    by_class = rows(folder / "classes.csv")
    recall = [np.mean([row["final"] == row["label"] for row in test if row["label"] == str(k)]) for k in range(3)]
    assert [float(row["recall"]) for row in by_class] == pytest.approx(recall, abs=1e-6)
    covered = {row["model"]: float(row["accuracy"]) for row in rows(folder / "coverage.csv") if row["coverage"] == "1"}
    metrics = read_metrics(evaluated)
    assert set(covered) == {*MODELS, "final"}
    assert covered["sam@3"] == pytest.approx(metrics["sam"]["seeds"]["3"]["test"]["accuracy"], abs=1e-6)


@pytest.mark.slow
def test_evaluate_mirrored_is_scored_apart_and_changes_no_other_metric(
    evaluated: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = read_metrics(evaluated)
    measured = {name: {seed: metrics[name]["seeds"][str(seed)]["sharpness"] for seed in SEEDS} for name in METHODS}
    paths = sorted((evaluated / "images/test").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(np.float32)
    labels = np.array([NAMES.index(path.parent.name) for path in paths])
    for name, folder in MODELS.items():
        method, _, seed = name.partition("@")
        part = metrics[method]["seeds"][seed] if seed else metrics[method]
        mirrored = part.pop("mirrored")
        assert set(mirrored) == SCORES
        network = classifier.load(folder).network
        logits = np.split(np.asarray(network(np.concatenate([pixels, pixels[:, :, ::-1]]), training=False)), 2)
        own = np.mean(scipy.special.softmax(logits, axis=2), axis=0)[np.arange(len(labels)), labels]
        assert mirrored["loss"] == pytest.approx(-np.log(own).mean(), rel=1e-4)
        assert mirrored["loss"] != part["test"]["loss"]
    for name in METHODS:
        del metrics[name]["mirrored"], metrics[name]["mirrored_deviation"]
    del metrics["final"]["mirrored"]
    shutil.copytree(evaluated / "audit", "audit", dirs_exist_ok=True)
    monkeypatch.setattr(evaluate, "measure_sharpness", lambda *_: measured)  # takes longest, knows nothing of mirrors
    assert run(study(predict="unknown")) == metrics


@pytest.mark.slow
def test_measure_sharpness_is_of_plain_train_images_in_float32(workspace: Path) -> None:
    settings = study()
    writer.write(settings.data, "data/records")
    records = Records("data/records")
    with runtime.dtype_policy("mixed_float16"):
        measured = minima.measure_sharpness(records, FOLDERS, settings.evaluate, 1, "sharpness.png", "sharpness.csv")
    model = classifier.load(MODELS["sam@4"])
    pixels, labels = next(iter(batches.plain(records, "train", 32, 3)))
    pixels, labels = pixels[::2], labels[::2]  # of three images every second, to have at most two
    logits = model.logits([pixels])
    with tf.GradientTape() as tape:
        kernel, bias = (variable.value for variable in model.head.trainable_variables)
        tape.watch([kernel, bias])
        features = model.features(registry.preprocess("MobileNet025", pixels), training=False)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, features @ kernel + bias))
    assert float(loss) == pytest.approx(scores.score(logits, labels)["loss"], rel=1e-5)
    gradients = tape.gradient(loss, [kernel, bias])
    norm = tf.linalg.global_norm(gradients)
    moved = features @ (kernel + 0.05 * gradients[0] / norm) + (bias + 0.05 * gradients[1] / norm)
    rise = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, moved)) - loss
    assert measured["sam"][4]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert measured["sam"][4]["gradient_rise"] == pytest.approx(float(rise), rel=1e-3, abs=1e-6)
    assert Path("sharpness.png").exists()
    drawn = rows(Path("sharpness.csv"))
    assert {(row["method"], row["direction"]) for row in drawn} == {
        (name, direction) for name in METHODS for direction in ("eigenvector", "random")
    }
    middle = [float(row["loss"]) for row in drawn if row["method"] == "sam" and float(row["position"]) == 0]
    assert middle == pytest.approx([measured["sam"][3]["loss"]] * 2, rel=1e-4)


@pytest.mark.slow
def test_evaluate_test_split_without_labels_is_predicted_and_not_scored(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the training's dtype policy, but with products in float32; afterwards Keras has the policy that it had."""
    (workspace / "predictions").mkdir()
    (workspace / "predictions/predict.csv").write_text("of an earlier run")
    policies = []
    load = classifier.Loader.load

    def noted(self: classifier.Loader, folder: str) -> Any:
        policies.append(keras.config.dtype_policy().name)
        return load(self, folder)

    measured = {name: {seed: {"loss": 1.0, "trace": float(seed)} for seed in SEEDS} for name in METHODS}
    monkeypatch.setattr(classifier.Loader, "load", noted)
    monkeypatch.setattr(evaluate, "measure_sharpness", lambda *_: measured)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    metrics = run(study(test="unknown", runtime={"precision": "mixed_bfloat16", "matmul": "half"}))
    assert set(metrics) == {*METHODS, "sharpness"}
    assert metrics["sharpness"] == {"equal_loss": True, "not_compared": ""}
    assert {name: each["seeds"]["4"] for name, each in metrics.items() if name in METHODS} == {
        name: {"sharpness": {"loss": 1.0, "trace": 4.0}} for name in METHODS
    }
    assert policies == ["mixed_bfloat16"] * len([*MODELS, "final"])
    assert keras.config.dtype_policy().name == "float32"
    assert "ONEDNN_DEFAULT_FPMATH_MODE" not in os.environ
    test = rows(workspace / "predictions/test.csv")
    assert [row["label"] for row in test] == ["-1"] * 5
    assert not (workspace / "predictions/predict.csv").exists()
    assert (workspace / "plots/confusion.csv").read_text() == "actual,predicted\n"
    shown = json.loads((workspace / "evaluation/shown.json").read_text())
    assert (shown["mistakes"], shown["confused"]) == ([], [])
    assert [len(shown["examples"]["test"][name]) for name in NAMES] == [0, 0, 0]
    assert not (workspace / "evaluation/classes.csv").exists()
    assert (workspace / "plots/class_accuracy.csv").read_text() == "class,method,accuracy\n"


def test_parts_that_are_all_of_test_or_none_of_it_are_left_out(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    assert subsets.read(tmp_path / "audit", 3) == {}
    write_pairs(tmp_path, *(("test", position, "train", 0) for position in range(3)))
    assert subsets.read(tmp_path / "audit", 3) == {}
    with pytest.raises(InputError, match=r"pairs.csv: expected positions below 2, the images of test, received 2; run"):
        subsets.read(tmp_path / "audit", 2)


@pytest.mark.slow
def test_evaluate_without_a_classifier_is_an_error_that_writes_nothing(workspace: Path) -> None:
    settings = study(runtime={"precision": "mixed_float16"})
    run_finalize(settings)
    (workspace / "models/select/model.json").unlink()
    with pytest.raises(InputError, match=r"^models/select/model.json: expected a file that an earlier stage wrote"):
        runpy.run_path(str(ROOT / "stages/evaluate.py"))["main"](Given(settings))
    assert keras.config.dtype_policy().name == "float32"
    assert not (workspace / "predictions").exists()
    assert not (workspace / "evaluation").exists()
    assert not (workspace / "metrics/evaluate.json").exists()


@pytest.mark.parametrize(
    ("sam", "expected"),
    [
        ({1: 0.10, 2: 0.20}, []),
        ({1: 0.109, 2: 0.183}, []),
        ({1: 0.12, 2: 0.20}, ["control and sam of seed 1"]),
        ({1: 0.12, 2: 0.18}, ["control and sam of seeds 1 and 2"]),
        ({1: 0.12, 2: 0.22}, ["control and sam"]),
    ],
)
def test_unequal_losses_are_told_by_method_or_by_seed(sam: dict[int, float], expected: list[str]) -> None:
    assert minima.unequal_losses({"control": {1: 0.10, 2: 0.20}, "sam": sam}) == expected
