"""What the three classifiers score on the test images, and whether SAM's differs from plain fine-tuning's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import scipy.special
import scipy.stats
import tensorflow as tf

from flatmin import classifier, evaluation_plots, reporting, rewrite, runtime, sharpness, views
from flatmin.classifier import Classifier
from flatmin.params import Evaluate, Params
from flatmin.records import Records

MODELS = {"extract": Path("models/selected"), "finetune": Path("models/finetune"), "sam": Path("models/sam")}
TUNED = ("finetune", "sam")  # whose minima are compared


def evaluate(params: Params) -> None:
    """Score every classifier on test, predict both test and predict, and measure the minima that training found.

    Writes metrics/evaluate.json, plots/sharpness.png, predictions/{role}.csv, and for a labelled test
    plots/confusion.csv and plots/class_accuracy.csv.
    """
    # Scores are the network's own, and second derivatives are beyond half precision, whatever the training's.
    runtime.configure(params.runtime.model_copy(update={"math": "float32"}), params.seed)
    records = Records("data/records")
    labels = records.labels("test")
    labelled = bool((labels >= 0).all())
    asked = [(role, False) for role in ("test", "predict") if role in records.roles]
    if labelled and params.evaluate.mirrored:
        asked.append(("test", True))
    logits = _logits(records, asked, params.evaluate.batch_size)
    with reporting.whole("predictions") as aside:
        aside.mkdir()
        for role in (role for role, mirrored in asked if not mirrored):
            _write_predictions(aside / f"{role}.csv", records, role, logits[role, False])
    of_test = logits["test", False]
    metrics = compare(of_test, labels, params.evaluate, params.seed) if labelled else {}
    for name, of_mirror in logits.get(("test", True), {}).items():
        metrics[name]["mirrored"] = scores(mean(of_test[name], of_mirror), labels, params.evaluate)
    for name, measured in measure_sharpness(records, params.evaluate, params.seed).items():
        metrics.setdefault(name, {})["sharpness"] = measured
    reporting.write_json("metrics/evaluate.json", metrics)
    _write_plots(of_test, labels, records.class_names, labelled)
    for name in MODELS if labelled else ():
        reporting.log(f"evaluate: {name} test accuracy {metrics[name]['test']['accuracy']:.4f}")


def _logits(
    records: Records, asked: Sequence[tuple[str, bool]], batch_size: int
) -> dict[tuple[str, bool], dict[str, np.ndarray]]:
    """For each (role, whether its images are mirrored) asked for: model -> float32 [n, classes]."""
    found: dict[tuple[str, bool], dict[str, np.ndarray]] = {each: {} for each in asked}
    for name, folder in MODELS.items():
        model = classifier.load(folder)
        for role, mirrored in asked:
            images = views.plain(records, role, model.description.image_size, batch_size)
            if mirrored:
                images = images.map(lambda pixels, labels: (tf.image.flip_left_right(pixels), labels))
            batches = math.ceil(records.count(role) / batch_size)
            title = f"{name} on {role}{', mirrored' if mirrored else ''}"
            found[role, mirrored][name] = model.logits(images, batches, title)
    return found


def mean(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Logits [n, classes] of the mean of the probabilities that two logits stand for."""
    return np.logaddexp(scipy.special.log_softmax(first, axis=1), scipy.special.log_softmax(second, axis=1))


def scores(logits: np.ndarray, labels: np.ndarray, settings: Evaluate) -> dict[str, float]:
    """Accuracy, top-5 accuracy, loss (nats) and ECE of float logits [n, classes] with int labels [n]."""
    return classifier.score(logits, labels) | {"ece": calibration_error(logits, labels, settings.ece_bins)}


def compare(logits: Mapping[str, np.ndarray], labels: np.ndarray, settings: Evaluate, seed: int) -> dict[str, Any]:
    """The metrics of each model, and of the difference between sam and finetune.

    Args:
        logits: float32 [n, classes] for each of `MODELS`.
        labels: int [n].
    """
    metrics: dict[str, Any] = {name: {"test": scores(of_model, labels, settings)} for name, of_model in logits.items()}
    right = {name: of_model.argmax(axis=1) == labels for name, of_model in logits.items()}
    metrics["sam_minus_finetune"] = difference(right["sam"], right["finetune"], settings.resamples, seed)
    return metrics


def measure_sharpness(records: Records, settings: Evaluate, seed: int) -> dict[str, dict[str, float]]:
    """`sharpness.measure`'s metrics of finetune and sam on the same train images, and plots/sharpness.png."""
    keras.config.set_dtype_policy("float32")  # second derivatives are beyond half precision, whatever the training's
    metrics, along, derivatives = {}, {}, None
    for name in TUNED:
        model = classifier.load(MODELS[name])
        trunk, tail = model.cut(model.description.fine_tune_at)
        batches = [(trunk(pixels, training=False), labels) for pixels, labels in _sample(records, model, settings)]
        tail = rewrite.faster(tail)
        derivatives = derivatives or sharpness.Derivatives(tail, _cross_entropy, batches[0])
        tail(batches[0][0])  # has its variables only then
        surface = sharpness.Surface(derivatives, tail, batches)
        measured = sharpness.measure(surface, seed=seed, **settings.sharpness.model_dump(exclude={"images"}))
        random = sharpness.filter_normalised(tail.trainable_variables, seed)
        along[name] = (
            sharpness.line(surface, measured.eigenvector, evaluation_plots.EIGENVECTOR_POSITIONS),
            sharpness.line(surface, random, evaluation_plots.RANDOM_POSITIONS),
        )
        metrics[name] = measured.metrics
        reporting.log(
            f"evaluate: {name} largest Hessian eigenvalue {measured.metrics['eigenvalue_1']:.4g}, "
            f"trace {measured.metrics['trace']:.4g} (standard error {measured.trace_error:.2g})"
        )
    evaluation_plots.draw_sharpness(along, "plots/sharpness.png")
    return metrics


def _sample(records: Records, model: Classifier, settings: Evaluate) -> tf.data.Dataset:
    """Batches of every k-th un-augmented train image, with the smallest k that leaves at most `sharpness.images`."""
    every = math.ceil(records.count("train") / settings.sharpness.images)
    # Second derivatives hold about four times of what scoring does.
    return views.sample(records, model.description.image_size, every, max(1, settings.batch_size // 4))


def _cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Expected calibration error with `bins` equal bins of confidence (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    logits = logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def difference(first: np.ndarray, second: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    """How much more accurate `first` is than `second` on the same images (bool [n] each: predicted right).

    Returns:
        accuracy: the difference, a fraction; low, high: its 95 % interval by a paired percentile bootstrap over images;
        p_value: McNemar's exact test on the images that one alone gets right, 1 where there are none.
    """
    gained = int((first & ~second).sum())
    lost = int((~first & second).sum())
    same = len(first) - gained - lost
    # A resample of images matters by how many of each kind it draws: that is a multinomial.
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(first), np.array([gained, lost, same]) / len(first), size=resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / len(first), [0.025, 0.975])
    p_value = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {
        "accuracy": (gained - lost) / len(first),
        "low": float(low),
        "high": float(high),
        "p_value": float(p_value),
    }


def _write_predictions(path: Path, records: Records, role: str, logits: Mapping[str, np.ndarray]) -> None:
    predicted = [logits[name].argmax(axis=1) for name in MODELS]
    rows = zip(records.names(role), records.labels(role), *predicted, strict=True)
    reporting.write_csv(path, ["name", "label", *MODELS], rows)


def _write_plots(logits: Mapping[str, np.ndarray], labels: np.ndarray, names: list[str], labelled: bool) -> None:
    """The confusion of sam, one row an image, and each class's accuracy by model; headers alone without labels."""
    known = labels if labelled else labels[:0]
    predicted = {name: of_model.argmax(axis=1)[: len(known)] for name, of_model in logits.items()}
    pairs = ((names[label], names[of_sam]) for label, of_sam in zip(known, predicted["sam"], strict=True))
    reporting.write_csv("plots/confusion.csv", ["actual", "predicted"], pairs)
    rows = (
        [name, model, f"{(of_model[known == index] == index).mean():.6g}"]
        for index, name in enumerate(names)
        for model, of_model in predicted.items()
        if (known == index).any()
    )
    reporting.write_csv("plots/class_accuracy.csv", ["class", "model", "accuracy"], rows)
