"""The sharpness of the minima that training found, and the loss around them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin import runtime, sharpness
from flatmin.common import console
from flatmin.common.params import Evaluate
from flatmin.evaluation import plots
from flatmin.inputs import batches
from flatmin.inputs.records import Records
from flatmin.models import classifier
from flatmin.models.classifier import Classifier, TrainedLayers
from flatmin.models.cpu_kernels import optimize_for_cpu

EQUAL_LOSS = 0.1  # flatness is compared at equal training loss, which is one that differs by at most this fraction


def measure_sharpness(
    records: Records,
    folders: Mapping[str, Mapping[int, str]],
    settings: Evaluate,
    seed: int,
    plot: Path | str,
    table: Path | str,
) -> dict[str, dict[int, dict[str, float]]]:
    """Measure every minimum on the same un-augmented train images; draw the loss around those of the first seed.

    Args:
        folders: by method and seed, the folders of classifiers that were trained from one start.
        plot: the PNG file to write.
        table: the CSV file of what it draws.

    Returns:
        By method and seed, what `sharpness.measure` measures, and `loss`, the mean loss on these images.
    """
    metrics: dict[str, dict[int, dict[str, float]]] = {method: {} for method in folders}
    lines: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with runtime.dtype_policy("float32"):  # second derivatives are beyond half precision, whatever the training's
        loader, prepared = classifier.Loader(), None
        each = ((method, number, folder) for method in folders for number, folder in folders[method].items())
        for method, number, folder in each:
            model, _ = loader.load(folder)
            if prepared is None or prepared[0] is not model.network:
                prepared = (model.network, *_prepare(records, model, settings))
            _, frozen, layers, derivatives = prepared
            sample = _sample(records, model, frozen, settings)
            surface = sharpness.Surface(derivatives, layers, sample)
            measured = sharpness.measure(surface, seed=seed, **settings.sharpness.model_dump(exclude={"images"}))
            metrics[method][number] = {"loss": surface.loss(surface.weights), **measured.metrics}
            if method not in lines:
                random = sharpness.filter_normalised(layers.trainable_variables, seed)
                lines[method] = (
                    sharpness.line(surface, measured.eigenvector, plots.EIGENVECTOR_POSITIONS),
                    sharpness.line(surface, random, plots.RANDOM_POSITIONS),
                )
            console.log(
                f"evaluate: {method}@{number} largest Hessian eigenvalue "
                f"{measured.metrics['eigenvalue_1']:.4g}, trace {measured.metrics['trace']:.4g} (standard error "
                f"{measured.trace_error:.2g}), train loss {metrics[method][number]['loss']:.4g}"
            )
    plots.draw_sharpness(plot, lines)
    plots.write_sharpness(table, lines)
    return metrics


def _prepare(
    records: Records, model: Classifier, settings: Evaluate
) -> tuple[keras.Model, TrainedLayers, sharpness.Derivatives]:
    """The frozen and the trained layers, which share the classifier's weights, and the loss's derivatives."""
    frozen, layers = model.split(model.description.fine_tune_at)
    layers = optimize_for_cpu(layers)
    example = _sample(records, model, frozen, settings)[0]
    derivatives = sharpness.Derivatives(layers, _cross_entropy, example)
    layers(example[0])  # it has its variables only then
    return frozen, layers, derivatives


def _sample(
    records: Records, model: Classifier, frozen: keras.Model, settings: Evaluate
) -> list[tuple[Any, tf.Tensor]]:
    """The activations and labels of every k-th train image, for the smallest k that gives at most `images`."""
    every = math.ceil(records.count("train") / settings.sharpness.images)
    # Second derivatives take about four times the memory of scoring.
    images = batches.sample(records, model.description.image_size, every, max(1, settings.batch_size // 4))
    return [(frozen(pixels, training=False), tf.constant(labels)) for pixels, labels in images]


def _cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def unequal_losses(losses: Mapping[str, Mapping[int, float]]) -> list[str]:
    """The pairs of methods whose training losses differ by more than EQUAL_LOSS, by method and seed.

    Flatness says little about a pair whose losses differ: a minimum that was followed further down is flatter, too.

    Returns:
        `sam and control` where the means over seeds differ so much, else `sam and control of seeds 42 and 44` for the
        seeds where their own do.
    """
    pairs = []
    for (first, ones), (second, others) in itertools.combinations(losses.items(), 2):
        if _differ(statistics.fmean(ones.values()), statistics.fmean(others.values())):
            pairs.append(f"{first} and {second}")
        elif seeds := [str(seed) for seed in ones if _differ(ones[seed], others[seed])]:
            pairs.append(f"{first} and {second} of seed{'s' if len(seeds) > 1 else ''} {' and '.join(seeds)}")
    return pairs


def _differ(one: float, other: float) -> bool:
    return max(one, other) > (1 + EQUAL_LOSS) * min(one, other)
