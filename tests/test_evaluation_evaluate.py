"""evaluate from end to end, on classifiers of random weights."""

from __future__ import annotations

import csv
import json
import os
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
from flatmin.common import params
from flatmin.common.errors import InputError
from flatmin.common.params import Params
from flatmin.data import writer
from flatmin.evaluation import evaluate
from flatmin.inputs import batches
from flatmin.inputs.records import Records
from flatmin.models import classifier, registry, scores

MODELS = {"extract": "models/select", "finetune": "models/finetune", "sam": "models/sam"}
SHARPNESS = {"gradient_rise", "adaptive_rise", "trace", *(f"eigenvalue_{index}" for index in range(1, 6))}


def study(mirrored: bool = False, runtime: dict[str, Any] | None = None, **splits: str) -> Params:
    recipe = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 4, "epochs": 1}
    return params.parse(
        {
            "seed": 3,
            "runtime": runtime or {},
            "data": {
                "source": "folder",
                "name": "images",
                "splits": {"train": "train", "val": "val", "test": "test", **splits},
            },
            "augment": {"engine": "none"},
            "backbones": ["MobileNet025"],
            "extract": recipe,
            "select": {},
            "finetune": recipe,
            "sam": {},
            "evaluate": {
                "batch_size": 8,
                "resamples": 200,
                "mirrored": mirrored,
                "sharpness": {"images": 2, "steps": 6, "probes": 2},
            },
        }
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of three classes, some unlabelled, and three classifiers of random weights."""
    folder = tmp_path_factory.mktemp("template")
    random = np.random.default_rng(0)
    for split, each in (("train", 1), ("val", 1), ("test", 2)):
        for channel, name in enumerate(reversed(NAMES)):
            for index in range(each):
                write_image(folder / f"images/{split}/{name}/{index}.png", channel, random)
    for index in range(5):
        write_image(folder / f"images/unknown/{index}.png", index % 3, random)
    for seed, saved in enumerate(MODELS.values()):
        model = classifier.create("MobileNet025", NAMES, image_size=32, dropout=0.0, seed=seed, weights="none")
        spread(model.base)
        for variable in model.head.trainable_variables:
            variable.assign(random.normal(size=variable.shape))
        model.save(folder / saved)
    return folder


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
    """Write records, then run the script of the stage; the metrics."""
    writer.write(settings.data, settings.seed, "data/records")
    with redirect_stdout(log) if log else nullcontext():
        runpy.run_path(str(ROOT / "stages/evaluate.py"))["main"](Given(settings))
    return read_metrics()


def read_metrics(folder: Path | str = ".") -> dict[str, Any]:
    return json.loads((Path(folder) / "metrics/evaluate.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_evaluate_scores_every_model_and_predicts(evaluated: Path) -> None:
    metrics = read_metrics(evaluated)
    assert set(metrics) == {"extract", "finetune", "sam", "sam_minus_finetune"}
    printed = (evaluated / "log").read_text()
    test = rows(evaluated / "predictions/test.csv")
    header = (evaluated / "predictions/test.csv").read_text().splitlines()[0]
    assert header == "name,label,extract,finetune,sam"
    assert len(test) == 6
    assert all(row["name"].split("/")[1] == NAMES[int(row["label"])] for row in test)
    for name in MODELS:
        accuracy = np.mean([row[name] == row["label"] for row in test])
        assert metrics[name]["test"]["accuracy"] == pytest.approx(accuracy)
        assert f"evaluate: {name} test accuracy {accuracy:.4f}" in printed
        expected = {"test", "mirrored"} if name == "extract" else {"test", "mirrored", "sharpness"}
        assert set(metrics[name]) == expected
    assert set(metrics["sam"]["sharpness"]) == set(metrics["finetune"]["sharpness"]) == SHARPNESS
    assert metrics["sam"]["sharpness"] != metrics["finetune"]["sharpness"]
    expected_gain = metrics["sam"]["test"]["accuracy"] - metrics["finetune"]["test"]["accuracy"]
    assert metrics["sam_minus_finetune"]["accuracy"] == pytest.approx(expected_gain)
    unknown = rows(evaluated / "predictions/predict.csv")
    assert [row["label"] for row in unknown] == ["-1"] * 5
    assert {row["name"] for row in unknown} == {f"unknown/{index}.png" for index in range(5)}
    assert all(row[name] in {"0", "1", "2"} for row in unknown for name in MODELS)


@pytest.mark.slow
def test_evaluate_plots_are_of_the_predictions(evaluated: Path) -> None:
    test = rows(evaluated / "predictions/test.csv")
    confusion = rows(evaluated / "plots/confusion.csv")
    assert [(row["actual"], row["predicted"]) for row in confusion] == [
        (NAMES[int(row["label"])], NAMES[int(row["sam"])]) for row in test
    ]
    by_class = rows(evaluated / "plots/class_accuracy.csv")
    assert len(by_class) == 9
    accuracies = [float(row["accuracy"]) for row in by_class if row["model"] == "sam"]
    assert np.mean(accuracies) == pytest.approx(read_metrics(evaluated)["sam"]["test"]["accuracy"])
    assert (evaluated / "plots/sharpness.png").exists()


@pytest.mark.slow
def test_evaluate_mirrored_is_scored_apart_and_changes_no_other_metric(
    evaluated: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = read_metrics(evaluated)
    measured = {name: metrics[name]["sharpness"] for name in ("finetune", "sam")}
    paths = sorted((evaluated / "images/test").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(np.float32)
    labels = np.array([NAMES.index(path.parent.name) for path in paths])
    for name, folder in MODELS.items():
        mirrored = metrics[name].pop("mirrored")
        assert set(mirrored) == {"accuracy", "top5_accuracy", "loss", "ece"}
        network = classifier.load(folder).network
        logits = np.split(np.asarray(network(np.concatenate([pixels, pixels[:, :, ::-1]]), training=False)), 2)
        own = np.mean(scipy.special.softmax(logits, axis=2), axis=0)[np.arange(len(labels)), labels]
        assert mirrored["loss"] == pytest.approx(-np.log(own).mean(), rel=1e-4)
        assert mirrored["loss"] != metrics[name]["test"]["loss"]
    monkeypatch.setattr(evaluate, "measure_sharpness", lambda *_: measured)  # takes longest, knows nothing of mirrors
    assert run(study(predict="unknown")) == metrics


@pytest.mark.slow
def test_measure_sharpness_is_of_plain_train_images_in_float32(workspace: Path) -> None:
    settings = study()
    writer.write(settings.data, settings.seed, "data/records")
    records = Records("data/records")
    with runtime.dtype_policy("mixed_float16"):
        measured = evaluate.measure_sharpness(records, MODELS, settings.evaluate, settings.seed, "sharpness.png")
    model = classifier.load(MODELS["sam"])
    pixels, labels = next(iter(batches.plain(records, "train", 32, 3)))
    pixels, labels = pixels[::2], labels.numpy()[::2]  # of three images every second, to have at most two
    logits = model.logits(tf.data.Dataset.from_tensors((pixels, labels)))
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
    assert measured["sam"]["gradient_rise"] == pytest.approx(float(rise), rel=1e-3, abs=1e-6)
    assert Path("sharpness.png").exists()


@pytest.mark.slow
def test_evaluate_test_split_without_labels_is_predicted_and_not_scored(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the training's dtype policy, but with products in float32; afterwards Keras has the policy that it had."""
    (workspace / "predictions").mkdir()
    (workspace / "predictions/predict.csv").write_text("of an earlier run")
    policies = []
    load = classifier.load

    def noted(folder: str) -> classifier.Classifier:
        policies.append(keras.config.dtype_policy().name)
        return load(folder)

    measured = {"finetune": {"trace": 1.0}, "sam": {"trace": 2.0}}
    monkeypatch.setattr(classifier, "load", noted)
    monkeypatch.setattr(evaluate, "measure_sharpness", lambda *_: measured)
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    metrics = run(study(test="unknown", runtime={"precision": "mixed_bfloat16", "matmul": "half"}))
    assert metrics == {name: {"sharpness": values} for name, values in measured.items()}
    assert policies == ["mixed_bfloat16"] * 3
    assert keras.config.dtype_policy().name == "float32"
    assert "ONEDNN_DEFAULT_FPMATH_MODE" not in os.environ
    test = rows(workspace / "predictions/test.csv")
    assert [row["label"] for row in test] == ["-1"] * 5
    assert not (workspace / "predictions/predict.csv").exists()
    assert (workspace / "plots/confusion.csv").read_text() == "actual,predicted\n"
    assert (workspace / "plots/class_accuracy.csv").read_text() == "class,model,accuracy\n"


@pytest.mark.slow
def test_evaluate_without_a_classifier_is_an_error_that_writes_nothing(workspace: Path) -> None:
    (workspace / "models/select/model.json").unlink()
    with pytest.raises(InputError, match=r"^models/select/model.json: expected a file that an earlier stage wrote"):
        run(study(runtime={"precision": "mixed_float16"}))
    assert keras.config.dtype_policy().name == "float32"
    assert not (workspace / "predictions").exists()
    assert not (workspace / "metrics/evaluate.json").exists()
