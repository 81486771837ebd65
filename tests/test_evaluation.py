"""The statistics against closed forms and plain references, and the stage from end to end."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import scipy.special
import scipy.stats
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import spread
from PIL import Image

from flatmin.common import params
from flatmin.common.errors import InputError
from flatmin.common.params import Evaluate, Params
from flatmin.data import writer
from flatmin.evaluation import evaluate
from flatmin.inputs import batches, records
from flatmin.models import classifier, registry, scores

CLASSES = ("blue", "green", "red")


def answers(gained: int, lost: int, both: int = 0, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong of two models, with so many images of each kind."""
    first = np.repeat([True, False, True, False], [gained, lost, both, neither])
    second = np.repeat([False, True, True, False], [gained, lost, both, neither])
    order = np.random.default_rng(0).permutation(len(first))
    return first[order], second[order]


@pytest.mark.parametrize(("both", "neither"), [(20, 0), (0, 20), (13, 7)])
def test_equal_answers_are_no_difference(both: int, neither: int) -> None:
    found = evaluate.difference(*answers(0, 0, both, neither), 1000, 1)
    assert found == {"accuracy": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}


def test_all_gained_is_certain() -> None:
    found = evaluate.difference(*answers(10, 0), 1000, 1)
    assert found == {"accuracy": 1.0, "low": 1.0, "high": 1.0, "p_value": pytest.approx(2 * 0.5**10)}


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (1, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (9, 1, 2 * (1 + 10) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
    ],
)
def test_mcnemar_by_hand(gained: int, lost: int, p_value: float) -> None:
    found = evaluate.difference(*answers(gained, lost, 30, 10), 100, 1)
    assert found["p_value"] == pytest.approx(p_value)
    assert found["accuracy"] == pytest.approx((gained - lost) / (gained + lost + 40))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_mcnemar_is_the_binomial_test(gained: int, lost: int, both: int) -> None:
    found = evaluate.difference(*answers(gained, lost, both), 50, 1)
    tails = min(1.0, 2 * scipy.stats.binom.cdf(min(gained, lost), gained + lost, 0.5)) if gained + lost else 1.0
    assert found["p_value"] == pytest.approx(tails)
    assert 0 <= found["p_value"] <= 1
    assert found["low"] <= found["high"]
    first, second = answers(gained, lost, both)
    turned = evaluate.difference(second, first, 50, 1)
    assert turned["accuracy"] == -found["accuracy"]
    assert turned["p_value"] == pytest.approx(found["p_value"])


def test_the_interval_is_the_paired_bootstrap_over_images() -> None:
    first, second = answers(40, 22, 110, 28)
    found = evaluate.difference(first, second, 20_000, 1)
    gains = first.astype(int) - second.astype(int)
    drawn = np.random.default_rng(2).integers(0, len(gains), (20_000, len(gains)))
    low, high = np.quantile(gains[drawn].mean(axis=1), [0.025, 0.975])
    # One image is 0.005; quantiles of 20,000 resamples wander by less than that.
    assert found["low"] == pytest.approx(low, abs=0.0051)
    assert found["high"] == pytest.approx(high, abs=0.0051)
    deviation = gains.std() / math.sqrt(len(gains))
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_the_interval_is_the_seeds() -> None:
    pair = answers(12, 7, 30, 20)
    assert evaluate.difference(*pair, 500, 1) == evaluate.difference(*pair, 500, 1)
    intervals = {tuple(evaluate.difference(*pair, 25, seed).values()) for seed in range(5)}
    assert len(intervals) > 1


def log_probabilities(confidence: np.ndarray, classes: int = 4) -> np.ndarray:
    """Logits whose softmax gives class 0 this confidence and the others the rest in equal parts."""
    rest = np.repeat(((1 - confidence) / (classes - 1))[:, None], classes - 1, axis=1)
    return np.log(np.concatenate([confidence[:, None], rest], axis=1)).astype(np.float32)


def test_calibration_known_values() -> None:
    # 75 % sure and right three times in four.
    logits = log_probabilities(np.full(8, 0.75))
    assert evaluate.calibration_error(logits, np.array([0, 0, 0, 1] * 2), 15) == pytest.approx(0, abs=1e-6)
    assert evaluate.calibration_error(logits, np.zeros(8, int), 15) == pytest.approx(0.25, abs=1e-6)
    certain = np.eye(3, dtype=np.float32)[[0, 1, 2]] * 1e4
    assert evaluate.calibration_error(certain, np.array([0, 1, 2]), 15) == pytest.approx(0)
    assert evaluate.calibration_error(certain, np.array([1, 2, 0]), 15) == pytest.approx(1)


def test_calibration_has_bins_of_their_own() -> None:
    # Over-confident at 0.9, under-confident at 0.5: one bin cancels them, two don't.
    logits = log_probabilities(np.repeat([0.9, 0.5], 10))
    labels = np.array([0] * 5 + [1] * 5 + [0] * 9 + [1])
    assert evaluate.calibration_error(logits, labels, 1) == pytest.approx(0, abs=1e-6)
    assert evaluate.calibration_error(logits, labels, 10) == pytest.approx(0.4, abs=1e-6)


def plain_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    error = 0.0
    for index in range(bins):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities, labels, strict=True)
            if index / bins < row.max() <= (index + 1) / bins
        ]
        if inside:
            confidence = np.mean([pair[0] for pair in inside])
            accuracy = np.mean([pair[1] for pair in inside])
            error += len(inside) / len(labels) * abs(accuracy - confidence)
    return error


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 30), st.floats(0.1, 20))
@settings(max_examples=50)
def test_calibration_is_the_plain_loop(seed: int, count: int, bins: int, sharpness: float) -> None:
    random = np.random.default_rng(seed)
    logits = (sharpness * random.normal(size=(count, 5))).astype(np.float32)
    labels = random.integers(0, 5, count)
    found = evaluate.calibration_error(logits, labels, bins)
    assert found == pytest.approx(plain_calibration_error(logits, labels, bins), abs=1e-9)
    assert 0 <= found <= 1


def test_compare_keys_and_what_they_compare() -> None:
    labels = np.array([0, 1, 2, 0])
    right = np.eye(3, dtype=np.float32)[labels]
    wrong = np.eye(3, dtype=np.float32)[(labels + 1) % 3]
    half = np.concatenate([right[:2], wrong[2:]])
    found = evaluate.compare({"extract": wrong, "finetune": half, "sam": right}, labels, Evaluate(resamples=100), 1)
    assert set(found) == {"extract", "finetune", "sam", "sam_minus_finetune"}
    for name, accuracy in (("extract", 0.0), ("finetune", 0.5), ("sam", 1.0)):
        assert set(found[name]) == {"test"}
        assert set(found[name]["test"]) == {"accuracy", "top5_accuracy", "loss", "ece"}
        assert found[name]["test"]["accuracy"] == accuracy
        assert found[name]["test"]["top5_accuracy"] == 1
    assert set(found["sam_minus_finetune"]) == {"accuracy", "low", "high", "p_value"}
    assert found["sam_minus_finetune"]["accuracy"] == 0.5  # sam less finetune, not the other way round
    assert found["sam_minus_finetune"]["p_value"] == pytest.approx(0.5)


def test_the_mean_is_that_of_probabilities() -> None:
    first, second = np.random.default_rng(0).normal(scale=20, size=(2, 6, 4)).astype(np.float32)
    expected = (scipy.special.softmax(first, axis=1) + scipy.special.softmax(second, axis=1)) / 2
    np.testing.assert_allclose(scipy.special.softmax(evaluate.mean(first, second), axis=1), expected, atol=1e-6)


# The stage


def study(source: Path, **splits: str) -> Params:
    recipe = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 4, "epochs": 1}
    return params.parse(
        {
            "seed": 3,
            "runtime": {},
            "data": {
                "source": "folder",
                "name": str(source),
                "splits": {"train": "train", "val": "val", "test": "test", **splits},
            },
            "augment": {"engine": "none"},
            "backbones": ["MobileNet025"],
            "extract": recipe,
            "select": {},
            "finetune": recipe,
            "sam": {},
            "evaluate": {"batch_size": 8, "resamples": 200, "sharpness": {"images": 2, "steps": 6, "probes": 2}},
        }
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of three classes, some unlabelled, and three classifiers of random weights."""
    place = tmp_path_factory.mktemp("template")
    random = np.random.default_rng(0)
    for folder, each in (("train", 1), ("val", 1), ("test", 2)):
        for channel, name in enumerate(reversed(CLASSES)):
            for index in range(each):
                write_image(place / f"images/{folder}/{name}/{index}.png", channel, random)
    for index in range(5):
        write_image(place / f"images/unknown/{index}.png", index % 3, random)
    for seed, saved in enumerate(evaluate.MODELS.values()):
        model = classifier.create("MobileNet025", CLASSES, 32, 0.0, seed, "none")
        spread(model.base)
        for variable in model.head.trainable_variables:
            variable.assign(random.normal(size=variable.shape))
        model.save(place / saved)
    return place


@pytest.fixture
def evaluated(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, the working directory."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_image(path: Path, channel: int, random: np.random.Generator) -> None:
    pixels = random.integers(0, 60, (32, 32, 3), np.uint8)
    pixels[..., channel] += 190
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(settings: Params) -> dict[str, Any]:
    writer.write(settings.data, settings.seed, "data/records")
    evaluate.evaluate(settings)
    return json.loads(Path("metrics/evaluate.json").read_text())


@pytest.mark.slow
def test_evaluate_scores_and_predicts(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run(study(evaluated / "images", predict="unknown"))
    assert set(metrics) == {"extract", "finetune", "sam", "sam_minus_finetune"}
    printed = capsys.readouterr().out
    test = rows(evaluated / "predictions/test.csv")
    header = (evaluated / "predictions/test.csv").read_text().splitlines()[0]
    assert header == "name,label,extract,finetune,sam"
    assert len(test) == 6
    assert all(row["name"].split("/")[1] == CLASSES[int(row["label"])] for row in test)
    for name in evaluate.MODELS:
        accuracy = np.mean([row[name] == row["label"] for row in test])
        assert metrics[name]["test"]["accuracy"] == pytest.approx(accuracy)
        assert f"evaluate: {name} test accuracy {accuracy:.4f}" in printed
        assert set(metrics[name]) == ({"test"} if name == "extract" else {"test", "sharpness"})
    figures = {"gradient_rise", "adaptive_rise", "trace", *(f"eigenvalue_{index}" for index in range(1, 6))}
    assert set(metrics["sam"]["sharpness"]) == set(metrics["finetune"]["sharpness"]) == figures
    assert metrics["sam"]["sharpness"] != metrics["finetune"]["sharpness"]
    expected = metrics["sam"]["test"]["accuracy"] - metrics["finetune"]["test"]["accuracy"]
    assert metrics["sam_minus_finetune"]["accuracy"] == pytest.approx(expected)
    unknown = rows(evaluated / "predictions/predict.csv")
    assert [row["label"] for row in unknown] == ["-1"] * 5
    assert {row["name"] for row in unknown} == {f"unknown/{index}.png" for index in range(5)}
    assert all(row[name] in {"0", "1", "2"} for row in unknown for name in evaluate.MODELS)
    confusion = rows(evaluated / "plots/confusion.csv")
    assert [(row["actual"], row["predicted"]) for row in confusion] == [
        (CLASSES[int(row["label"])], CLASSES[int(row["sam"])]) for row in test
    ]
    by_class = rows(evaluated / "plots/class_accuracy.csv")
    assert len(by_class) == 9
    of_sam = [float(row["accuracy"]) for row in by_class if row["model"] == "sam"]
    assert np.mean(of_sam) == pytest.approx(metrics["sam"]["test"]["accuracy"])
    assert (evaluated / "plots/sharpness.png").exists()


@pytest.mark.slow
def test_mirrored_is_scored_apart(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "measure_sharpness", lambda *_: {})  # takes longest, knows nothing of mirrors
    asked = study(evaluated / "images")
    plain = run(asked)
    metrics = run(asked.model_copy(update={"evaluate": asked.evaluate.model_copy(update={"mirrored": True})}))
    paths = sorted((evaluated / "images/test").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(np.float32)
    labels = np.array([CLASSES.index(path.parent.name) for path in paths])
    for name, folder in evaluate.MODELS.items():
        mirrored = metrics[name].pop("mirrored")
        assert set(mirrored) == {"accuracy", "top5_accuracy", "loss", "ece"}
        network = classifier.load(folder).network
        logits = [network.predict(each, verbose=0) for each in (pixels, pixels[:, :, ::-1])]
        own = np.mean(scipy.special.softmax(logits, axis=2), axis=0)[np.arange(len(labels)), labels]
        assert mirrored["loss"] == pytest.approx(-np.log(own).mean(), rel=1e-4)
        assert mirrored["loss"] != metrics[name]["test"]["loss"]
    assert metrics == plain


def test_sharpness_is_of_plain_train_images_in_float32(evaluated: Path) -> None:
    settings = study(evaluated / "images")
    writer.write(settings.data, settings.seed, "data/records")
    found = records.Records("data/records")
    keras.config.set_dtype_policy("mixed_float16")
    try:
        measured = evaluate.measure_sharpness(found, settings.evaluate, settings.seed)
    finally:
        keras.config.set_dtype_policy("float32")
    model = classifier.load(evaluate.MODELS["sam"])
    pixels, labels = next(iter(batches.plain(found, "train", 32, 3)))
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


def test_a_test_split_without_labels_is_predicted_and_not_scored(evaluated: Path) -> None:
    (evaluated / "predictions").mkdir()
    (evaluated / "predictions/predict.csv").write_text("of an earlier run")
    metrics = run(study(evaluated / "images", test="unknown"))
    assert {name: set(found) for name, found in metrics.items()} == {"finetune": {"sharpness"}, "sam": {"sharpness"}}
    found = rows(evaluated / "predictions/test.csv")
    assert [row["label"] for row in found] == ["-1"] * 5
    assert not (evaluated / "predictions/predict.csv").exists()
    assert (evaluated / "plots/confusion.csv").read_text() == "actual,predicted\n"
    assert (evaluated / "plots/class_accuracy.csv").read_text() == "class,model,accuracy\n"


def test_a_missing_classifier_is_named(evaluated: Path) -> None:
    (evaluated / "models/select/model.json").unlink()
    with pytest.raises(InputError, match=r"^models/select/model.json: expected a file that an earlier stage wrote"):
        run(study(evaluated / "images"))
    assert not (evaluated / "predictions").exists()
    assert not (evaluated / "metrics/evaluate.json").exists()
