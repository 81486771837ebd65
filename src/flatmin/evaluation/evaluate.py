"""The evaluate stage: every classifier's scores on test, its predictions, and the sharpness of the minima found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin import runtime, sharpness
from flatmin.common import console, files
from flatmin.common.params import Evaluate, Runtime
from flatmin.evaluation import plots
from flatmin.evaluation.metrics import average_predictions, compare, scores
from flatmin.inputs import batches
from flatmin.inputs.records import Records
from flatmin.models import classifier
from flatmin.models.classifier import Classifier
from flatmin.models.cpu_kernels import optimize_for_cpu

FINE_TUNED = ("finetune", "sam")  # the models whose minima are compared


@dataclass(frozen=True)
class Outputs:
    """Where evaluate writes."""

    predictions: str
    metrics: str
    confusion: str
    class_accuracy: str
    sharpness: str


def evaluate(
    *, seed: int, runtime: Runtime, settings: Evaluate, records: str, models: Mapping[str, str], outputs: Outputs
) -> None:
    """Score every classifier on test, predict test and predict, and measure the minima that training found.

    Args:
        models: the folders of the classifiers `extract`, `finetune` and `sam`.
    """
    with _configured(runtime, seed):
        dataset = Records(records)
        labels = dataset.labels("test")
        labelled = bool((labels >= 0).all())
        passes = [(role, False) for role in ("test", "predict") if role in dataset.roles]
        if labelled and settings.mirrored:
            passes.append(("test", True))
        logits = _logits(dataset, models, passes, settings.batch_size)
    with files.atomic_write(outputs.predictions) as temporary:
        temporary.mkdir()
        for role in (role for role, mirrored in passes if not mirrored):
            _write_predictions(temporary / f"{role}.csv", dataset, role, logits[role, False])
    test = logits["test", False]
    metrics = compare(test, labels, settings, seed) if labelled else {}
    for name, mirrored_logits in logits.get(("test", True), {}).items():
        metrics[name]["mirrored"] = scores(average_predictions(test[name], mirrored_logits), labels, settings)
    for name, measured in measure_sharpness(dataset, models, settings, seed, outputs.sharpness).items():
        metrics.setdefault(name, {})["sharpness"] = measured
    files.write_json(outputs.metrics, metrics)
    known = labels if labelled else labels[:0]
    predicted = {name: values.argmax(axis=1)[: len(known)] for name, values in test.items()}
    plots.write_confusion(outputs.confusion, predicted["sam"], known, dataset.class_names)
    plots.write_class_accuracy(outputs.class_accuracy, predicted, known, dataset.class_names)
    for name in models if labelled else ():
        console.log(f"evaluate: {name} test accuracy {metrics[name]['test']['accuracy']:.4f}")


def _configured(settings: Runtime, seed: int) -> Any:
    """Compute in the training's dtype policy, but multiply in float32: the scores are the network's own."""
    runtime.configure(settings.model_copy(update={"matmul": "float32"}), seed)
    return runtime.dtype_policy(settings.precision)


def _logits(
    records: Records, models: Mapping[str, str], passes: Sequence[tuple[str, bool]], batch_size: int
) -> dict[tuple[str, bool], dict[str, np.ndarray]]:
    """For each (role, whether its images are mirrored): the logits by model, float32 [n, classes]."""
    logits: dict[tuple[str, bool], dict[str, np.ndarray]] = {each: {} for each in passes}
    for name, folder in models.items():
        model = classifier.load(folder)
        for role, mirrored in passes:
            images = batches.plain(records, role, model.description.image_size, batch_size)
            if mirrored:
                images = images.map(lambda pixels, labels: (tf.image.flip_left_right(pixels), labels))
            total = math.ceil(records.count(role) / batch_size)
            title = f"{name} on {role}{', mirrored' if mirrored else ''}"
            logits[role, mirrored][name] = model.logits(images, total, title)
    return logits


def measure_sharpness(
    records: Records, models: Mapping[str, str], settings: Evaluate, seed: int, plot: str
) -> dict[str, dict[str, float]]:
    """Measure finetune's and sam's minima on the same un-augmented train images; draw the loss around them."""
    metrics, losses, derivatives = {}, {}, None
    with runtime.dtype_policy("float32"):  # second derivatives are beyond half precision, whatever the training's
        for name in FINE_TUNED:
            model = classifier.load(models[name])
            frozen, layers = model.split(model.description.fine_tune_at)
            sample = [(frozen(pixels, training=False), labels) for pixels, labels in _sample(records, model, settings)]
            layers = optimize_for_cpu(layers)
            derivatives = derivatives or sharpness.Derivatives(layers, _cross_entropy, sample[0])
            layers(sample[0][0])  # it has its variables only then
            surface = sharpness.Surface(derivatives, layers, sample)
            measured = sharpness.measure(surface, seed=seed, **settings.sharpness.model_dump(exclude={"images"}))
            random = sharpness.filter_normalised(layers.trainable_variables, seed)
            losses[name] = (
                sharpness.line(surface, measured.eigenvector, plots.EIGENVECTOR_POSITIONS),
                sharpness.line(surface, random, plots.RANDOM_POSITIONS),
            )
            metrics[name] = measured.metrics
            console.log(
                f"evaluate: {name} largest Hessian eigenvalue {measured.metrics['eigenvalue_1']:.4g}, "
                f"trace {measured.metrics['trace']:.4g} (standard error {measured.trace_error:.2g})"
            )
    plots.draw_sharpness(plot, losses)
    return metrics


def _sample(records: Records, model: Classifier, settings: Evaluate) -> tf.data.Dataset:
    """Batches of every k-th un-augmented train image, for the smallest k that gives at most `sharpness.images`."""
    every = math.ceil(records.count("train") / settings.sharpness.images)
    # Second derivatives take about four times the memory of scoring.
    return batches.sample(records, model.description.image_size, every, max(1, settings.batch_size // 4))


def _cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def _write_predictions(path: Path, records: Records, role: str, logits: Mapping[str, np.ndarray]) -> None:
    predicted = [values.argmax(axis=1) for values in logits.values()]
    rows = zip(records.names(role), records.labels(role), *predicted, strict=True)
    files.write_csv(path, ["name", "label", *logits], rows)
