"""What a study will take on this machine: a few of its pictures and steps are timed, the rest is arithmetic."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from threadpoolctl import threadpool_limits

from flatmin import runtime, sam
from flatmin.common.params import Params, for_backbone, largest_image_size
from flatmin.data import images
from flatmin.data.sources.base import Example
from flatmin.data.writer import RecordsWriter
from flatmin.features import engine
from flatmin.images import BrokenImageError, Stored
from flatmin.inputs import batches
from flatmin.inputs.augment import AUGMENT_CHUNK, Augmentation, positions
from flatmin.inputs.pixels import Task
from flatmin.inputs.records import Records
from flatmin.inputs.workers import cores
from flatmin.models import classifier, registry
from flatmin.models.classifier import TrainedLayers
from flatmin.models.cpu_kernels import optimize_for_cpu
from flatmin.training.step import PLAIN, StepSettings, TrainStep
from flatmin.use.survey import Survey

PICTURES, STEPS = 64, 10
# Seconds of a stage that do not grow with the pictures, on a machine where loading TensorFlow, building a network and
# tracing a step take REFERENCE seconds. The first ones are constants of lines fitted to small studies.
REFERENCE = 11.0
FIXED = {"dvc": 2.5, "prepare": 7.0, "augment-preview": 8.0, "extract-train": 13.5, "select-best": 0.5}
FIXED |= {"audit": 11.0, "finetune": 14.0, "sam-finetune": 16.5, "control": 15.0, "finalize": 0.7, "evaluate": 13.0}
FIXED |= {"report": 3.0}
HEAD = 1.5e-4  # seconds of extract's step for an image, pooled already
PRODUCT = 4.0  # what a product with the Hessian takes, in gradients of the loss
LINES = 20.0  # what the other measures of a minimum take, in gradients of the loss


@dataclass(frozen=True)
class Sample:
    """Pictures of the data, as prepare stores them.

    Attributes:
        examples: with what prepare makes of them.
        broken: the names of those that cannot be read, with the reasons.
        seconds: for each of them.
    """

    examples: list[tuple[Example, images.Picture]]
    broken: list[str]
    seconds: float

    @property
    def side(self) -> int:
        """The median of the shorter sides, in pixels, as they are stored."""
        return int(np.median([min(picture.height, picture.width) for _, picture in self.examples]))

    @property
    def proportions(self) -> np.ndarray:
        """Each picture's longer side over its shorter one."""
        return np.array([max(each.height, each.width) / min(each.height, each.width) for _, each in self.examples])

    @property
    def bytes(self) -> float:
        """The mean size of a record, roughly."""
        return float(np.mean([len(picture.encoded) for _, picture in self.examples])) + 130


def read_sample(found: Survey, stored: Stored, max_pixels: int) -> Sample:
    """Read pictures of train, spread over the classes."""
    examples, broken = [], []
    started = time.perf_counter()
    for example in itertools.islice(found.source.examples(found.source.expressions["train"]), PICTURES):
        try:
            examples.append((example, images.read_picture(example.encoded(), stored, max_pixels)))
        except BrokenImageError as error:
            broken.append(f"{example.name} ({error})")
    return Sample(examples, broken, (time.perf_counter() - started) / max(1, len(examples) + len(broken)))


@dataclass(frozen=True)
class Timings:
    """Seconds, measured here with a backbone.

    Attributes:
        start: loading TensorFlow, building the network and tracing a step.
        augment: for an image, on one core.
        frozen, step, sam_step, validation, scoring: for an image: the frozen layers, a plain step, a sharpness-aware
            one, the trained layers alone, and the whole network.
        multiply_adds: of the backbone.
        view_bytes: of an image's view at the split of finetune.
        weights_bytes: of a saved network.
    """

    start: float
    augment: float
    frozen: float
    step: float
    sam_step: float
    validation: float
    scoring: float
    multiply_adds: int
    view_bytes: int
    weights_bytes: int


def measure(settings: Params, sample: Sample, class_names: Sequence[str], imported: float) -> Timings:
    """Time the first backbone at its size in finetune.

    Args:
        imported: the seconds that importing TensorFlow took.
    """
    backbone = settings.backbones[0]
    size = largest_image_size([backbone], settings.extract.image_size, settings.finetune.image_size)
    stored = Stored.by_setting(settings.data.image_size, size)
    runtime.configure(settings.runtime, 0)
    with tempfile.TemporaryDirectory() as folder, runtime.dtype_policy(settings.runtime.precision):
        records = _write(sample, class_names, settings.data.fit, stored, Path(folder, "records"))
        started = time.perf_counter()
        model = classifier.create(
            backbone,
            class_names,
            image_size=size,
            dropout=settings.finetune.dropout,
            seed=0,
            weights=settings.extract.weights.get(backbone, "imagenet"),
            levels=settings.extract.levels,
            hidden_units=settings.extract.hidden_units,
            fit=settings.data.fit,
            stored=stored,
        )
        at = for_backbone(settings.finetune.fine_tune_at, backbone) or registry.find(backbone).fine_tune_at
        frozen, layers = model.split(at)
        layers = optimize_for_cpu(layers)
        pixels = next(batches.plain(records, "train", size, min(len(sample.examples), PICTURES)))[0]
        activations = frozen(pixels[:1], training=False)
        layers(activations, training=False)
        built = time.perf_counter() - started
        chosen = engine.choose(frozen, model.frozen_identity(at), settings.runtime, lambda: pixels[:32])
        part = pixels[: engine.EXTRACTOR_BATCH]
        found = chosen(part)
        batch = settings.finetune.batch_size
        kept = [np.resize(each, (batch, *each.shape[1:])).astype(np.float16) for each in found]  # repeats them
        source = _Kept(kept, layers, chosen.name)
        first, step = _steps(settings, PLAIN, source, layers, len(class_names))
        rule = sam.Settings(**settings.sam.settings())
        _, sam_step = _steps(settings, StepSettings(partial(sam.Step, rule)), source, layers, len(class_names))
        source.val_logits()
        model.logits_of(pixels)
        return Timings(
            start=imported + built + first,
            augment=_augmenting(settings, records, size),
            frozen=_steady(lambda: chosen(part), 2) / len(part),
            step=step / batch,
            sam_step=sam_step / batch,
            validation=_steady(source.val_logits, 2) / batch,
            scoring=_steady(lambda: model.logits_of(pixels), 2) / len(pixels),
            multiply_adds=model.description.multiply_adds,
            view_bytes=sum(2 * int(np.prod(tensor.shape[1:])) for tensor in frozen.outputs),
            weights_bytes=sum(weight.nbytes for weight in model.network.get_weights()),
        )


def _write(sample: Sample, class_names: Sequence[str], fit: str, stored: Stored, folder: Path) -> Records:
    folder.mkdir()
    writer = RecordsWriter(folder, class_names, fit, stored)
    for example, picture in sample.examples:
        writer.add("train", example, picture)
    writer.close()
    return Records(folder)


def _steady(run: Callable[[], Any], times: int) -> float:
    """The mean time of a call that has been made before."""
    started = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - started) / times


def _augmenting(settings: Params, records: Records, size: int) -> float:
    """Seconds of one core to read and augment an image."""
    count = min(records.count("train"), AUGMENT_CHUNK)
    augmentation = Augmentation(settings.augment, 0, 0, 0) if settings.augment.engine != "none" else None
    task = Task(records.stored("train", positions(0, count)), size, records.fit("train"), augmentation)
    with threadpool_limits(1):
        task.run()
        return _steady(task.run, 2) / count


class _Kept:
    """A few activations at the split as a source of batches: the same batch again and again.

    kept: float16 [batch, ...] for each tensor there.
    """

    def __init__(self, kept: list[np.ndarray], layers: TrainedLayers, engine: str) -> None:
        self.engine = engine
        self._batch = tuple(tf.constant(each) for each in kept), tf.zeros(len(kept[0]), tf.int32)
        self._logits = tf.function(lambda: layers(self.activations(self._batch[0]), training=False))

    def epoch(self, number: int, strategy: tf.distribute.Strategy, skipped: int = 0) -> Any:
        return tf.data.Dataset.from_tensors(self._batch).repeat()

    def activations(self, inputs: Any) -> Any:
        cast = [tf.cast(each, tf.float32) for each in inputs]
        return cast[0] if len(cast) == 1 else cast

    def val_logits(self) -> np.ndarray:
        return self._logits().numpy()


def _steps(
    settings: Params, rule: StepSettings, source: _Kept, layers: TrainedLayers, classes: int
) -> tuple[float, float]:
    """Seconds of the first step, which traces, and of a later one."""
    strategy = tf.distribute.get_strategy()
    step = TrainStep(strategy, source, layers, settings.finetune, rule, steps=STEPS + 1, classes=classes)
    forever = iter(source.epoch(0, strategy))
    started = time.perf_counter()
    step(forever)
    first = time.perf_counter() - started
    return first, _steady(lambda: step(forever), STEPS)


@dataclass(frozen=True)
class Estimate:
    """What a study will take.

    Attributes:
        seconds: by stage, all of its runs together.
        bytes: on disk: records, cached activations, models.
    """

    seconds: dict[str, float]
    bytes: float

    def describe(self) -> str:
        """One line."""
        total = sum(self.seconds.values())
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])[:4]
        listed = ", ".join(f"{stage} {_minutes(seconds)}" for stage, seconds in parts)
        return f"about {_minutes(total)} and {self.bytes / 1e9:.1f} GB here (of that {listed})"


def estimate(settings: Params, found: Survey, sample: Sample, timings: Timings) -> Estimate:
    """Add up the stages."""
    train, val, test = (found.total(role) for role in ("train", "val", "test"))
    everything, predicted = train + val + test + found.total("predict"), test + found.total("predict")
    seeds, scale = len(settings.seeds), _mean_cost(settings, timings)
    # The workers that augment and the frozen layers share the cores.
    of_view = timings.augment / cores() + timings.frozen * scale
    extract, finetune = settings.extract, settings.finetune
    views = {name: min(each.views, each.epochs) or each.epochs for name, each in (("e", extract), ("f", finetune))}
    validation = val * timings.validation * scale
    epochs = settings.sam.epochs or finetune.epochs
    step, sam_step = timings.step * scale, timings.sam_step * scale
    passes = 1 + 1 / settings.sam.every
    variable = {
        "prepare": everything * sample.seconds,
        "extract-train": len(settings.backbones) * (views["e"] * train + val) * of_view
        + len(settings.backbones) * extract.epochs * train * HEAD,
        "audit": everything * timings.scoring * scale,
        "finetune": val * of_view
        + seeds * (views["f"] * train * of_view + finetune.epochs * (train * step + validation)),
        "sam-finetune": seeds * epochs * (train * sam_step + validation),
        "control": seeds * epochs * (train * step * passes + validation),
        "evaluate": (3 * seeds + 1) * predicted * timings.scoring * scale
        + 3 * seeds * min(train, settings.evaluate.sharpness.images) * step * _gradients(settings),
    }
    runs = {"extract-train": len(settings.backbones), "finetune": seeds, "sam-finetune": seeds, "control": seeds}
    slower = timings.start / REFERENCE
    seconds = {stage: runs.get(stage, 1) * fixed * slower + variable.get(stage, 0) for stage, fixed in FIXED.items()}
    models = len(settings.backbones) + 3 * seeds + 2
    disk = 2 * everything * sample.bytes + 2 * models * timings.weights_bytes
    if finetune.views:
        disk += (train * views["f"] * seeds + val) * timings.view_bytes
    return Estimate(seconds, disk)


def _mean_cost(settings: Params, timings: Timings) -> float:
    """What a backbone costs on average, in what the measured one does."""
    costs = []
    for name in settings.backbones:
        size = largest_image_size([name], settings.extract.image_size, settings.finetune.image_size)
        description = classifier.create(
            name, ["a", "b"], image_size=size, dropout=0, seed=0, weights="none"
        ).description
        costs.append(description.multiply_adds)
    return float(np.mean(costs)) / timings.multiply_adds


def _gradients(settings: Params) -> float:
    sharpness = settings.evaluate.sharpness
    return PRODUCT * (sharpness.steps + sharpness.probes) + LINES


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
