"""The training stages: extract-train, finetune, control and sam-finetune, from records to weights, metrics, a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from flatmin import runtime
from flatmin.common import console, files
from flatmin.common.params import Augment, Extract, Finetune, Metric, Runtime, Training, for_backbone
from flatmin.features import cache, store
from flatmin.features.engine import EXTRACTOR_BATCH
from flatmin.inputs import batches
from flatmin.inputs.batches import WorkerShard, derived_seed
from flatmin.inputs.records import Records
from flatmin.inputs.sampling import class_weights
from flatmin.inputs.workers import Augmenter
from flatmin.models import classifier, registry
from flatmin.models.classifier import Classifier, TrainedLayers
from flatmin.models.cpu_kernels import optimize_for_cpu
from flatmin.models.weights_files import weights_digest
from flatmin.training import live, resume
from flatmin.training.batch_sources import AugmentedImages, BatchSource, CachedActivations
from flatmin.training.resume import State
from flatmin.training.schedule import Budget, Epoch, Plan, best_epoch
from flatmin.training.step import PLAIN, StepSettings, TrainStep
from flatmin.training.trainer import Trainer
from flatmin.training.validation import Validator
from flatmin.training.workers import Workers

STANDARDIZATION_IMAGES = 2000  # train images, or up to twice as many


@dataclass(frozen=True)
class Outputs:
    """Where a training stage writes: a classifier's folder, metrics as JSON, epochs as CSV, and what it took."""

    model: str
    metrics: str
    plot: str
    budget: str | None = None


@dataclass(frozen=True)
class Job:
    """A training: its settings, where it starts, and what else its result depends on.

    Attributes:
        name: for messages and the resume state's folder.
        seed: of everything random in the training.
        start: makes the classifier to train.
        budget: what the training may take; None trains for the recipe's epochs.
        files: whose contents the start depends on.
        depends_on: other values that the start depends on, as JSON can hold them.
        metric: on val, by which the best epoch is chosen.
    """

    name: str
    seed: int
    runtime: Runtime
    augment: Augment
    recipe: Training
    start: Callable[[Records], Classifier]
    step: StepSettings = PLAIN
    budget: Budget | None = None
    files: Sequence[Path] = ()
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    metric: Metric = "accuracy"

    def plan(self, records: Records) -> Plan:
        """How long the training is."""
        images, batch_size = records.count("train"), self.recipe.batch_size
        if self.budget:
            return Plan.of_budget(self.budget, images, batch_size)
        return Plan.of_epochs(self.recipe.epochs, images, batch_size)

    def state_folder(self, records: Records, workers: Workers) -> Path:
        """The folder of the resume state: equal only where the results are."""
        depends_on = {
            "seed": self.seed,
            "runtime": self.runtime.model_dump(),
            "augment": self.augment.model_dump(),
            "recipe": self.recipe.model_dump(),
            "metric": self.metric,
            "step": dict(self.step.depends_on),
            "plan": asdict(self.plan(records)),
            "records": [records.digest(role) for role in ("train", "val")],
            "machine": runtime.machine(),
            "workers": [workers.count, workers.replicas],
            **self.depends_on,
        }
        key = cache.key(depends_on, files=self.files, rooms=(*cache.TRAINING_ROOMS, *self.step.rooms))
        return cache.folder() / "state" / f"{self.name.replace('/', '-')}-{key}"


def extract(
    backbone: str,
    *,
    runtime: Runtime,
    augment: Augment,
    recipe: Extract,
    records: str,
    outputs: Outputs,
    metric: Metric = "accuracy",
) -> State:
    """extract-train: train a classifier behind a frozen backbone. Returns the resume state, to be removed."""
    seed = recipe.seed
    weights = recipe.weights.get(backbone, "imagenet")

    def start(records: Records) -> Classifier:
        model = classifier.create(
            backbone,
            records.class_names,
            image_size=for_backbone(recipe.image_size, backbone),
            dropout=recipe.dropout,
            seed=seed,
            weights=weights,
            levels=recipe.levels,
            hidden_units=recipe.hidden_units,
            fit=records.fit("train"),
            stored=records.stored_size("train"),
        )
        every = max(1, records.count("train") // STANDARDIZATION_IMAGES)
        images = batches.sample(records, model.description.image_size, every, EXTRACTOR_BATCH)
        classifier.fit_standardization(model, (pixels for pixels, _ in images))
        return model

    depends_on = {"backbone": backbone, "weights": weights_digest(backbone, weights)}
    augmentation = augment if recipe.augment else Augment(engine="none")
    job = Job(
        f"extract-train@{backbone}", seed, runtime, augmentation, recipe, start, depends_on=depends_on, metric=metric
    )
    return _train(job, records, outputs)


def finetune(
    name: str,
    *,
    seed: int,
    runtime: Runtime,
    augment: Augment,
    recipe: Finetune,
    selected: str,
    records: str,
    outputs: Outputs,
    step: StepSettings = PLAIN,
    budget: Budget | None = None,
    metric: Metric = "accuracy",
) -> State:
    """finetune, control and sam-finetune: train the selected classifier from `fine_tune_at` on, by the rule of `step`.

    With a budget the training takes what that has, in place of the recipe's epochs, and never stops early.

    Returns the resume state, to be removed.
    """
    if budget:
        recipe = recipe.model_copy(update={"early_stopping": None})
    # New augmented views, since the selected classifier has already fitted those that it was trained on.
    training_seed = derived_seed(seed, 1)
    backbone = classifier.describe(selected).backbone
    split_point = for_backbone(recipe.fine_tune_at, backbone)
    changes: dict[str, Any] = {"dropout": recipe.dropout, "seed": training_seed}
    if size := for_backbone(recipe.image_size, backbone):
        changes["image_size"] = size
    changes["fine_tune_at"] = registry.find(backbone).fine_tune_at if split_point is None else split_point
    job = Job(
        name,
        training_seed,
        runtime,
        augment,
        recipe,
        lambda _: classifier.load(selected, **changes),
        step,
        budget,
        files=(Path(selected, classifier.MODEL), Path(selected, classifier.WEIGHTS)),
        metric=metric,
    )
    return _train(job, records, outputs)


def _train(job: Job, records_folder: str, outputs: Outputs) -> State:
    """Train, then write weights, metrics and plot.

    Every worker trains, and keeps a resume state of its own; those that write outputs need a checkout of their own.
    """
    strategy = runtime.strategy(job.runtime)
    runtime.configure(job.runtime, job.seed)
    with runtime.dtype_policy(job.runtime.precision):
        records = Records(records_folder)
        plan = job.plan(records)
        workers = Workers(strategy)
        resume.forget_abandoned()
        state = State(job.state_folder(records, workers), workers.number, workers.count)
        with strategy.scope():
            model = job.start(records)
            frozen, layers = _split(job, model)
        with ExitStack() as stack:
            stack.enter_context(workers.explain_lost_worker(job.name))
            source = _source(job, plan, records, model, frozen, layers, workers, stack)
            with strategy.scope():
                step = TrainStep(
                    strategy,
                    source,
                    layers,
                    job.recipe,
                    job.step,
                    steps=plan.steps,
                    classes=len(records.class_names),
                    weights=class_weights(records.labels("train"), len(records.class_names), job.recipe.class_weights),
                )
            validator = Validator(source, model, records, job.recipe.batch_size)

            def watch(history: list[Epoch]) -> None:
                live.write(job.name, len(history), history[-1])
                _write_plot(history, outputs.plot)

            trainer = Trainer(job.name, job.recipe, plan, step, validator, workers, job.metric)
            history = trainer.train(state, watch)
            if workers.writes_outputs:
                _write_plot(history, outputs.plot)
                _write(job, model, step, validator, history, outputs)
            workers.barrier()  # nobody removes a state before the first worker has written
    return state


def _split(job: Job, model: Classifier) -> tuple[keras.Model, TrainedLayers]:
    """The frozen layers, and the trained ones with faster kernels, both built."""
    frozen, layers = model.split(model.description.fine_tune_at)
    layers = optimize_for_cpu(layers, bfloat16_grad=job.runtime.matmul != "float32" and runtime.has_bfloat16())
    size = model.description.image_size
    # A subclassed model has its variables only after it was called once.
    layers(frozen(tf.zeros((1, size, size, 3)), training=False), training=False)
    return frozen, layers


def _source(
    job: Job,
    plan: Plan,
    records: Records,
    model: Classifier,
    frozen: keras.Model,
    layers: TrainedLayers,
    workers: Workers,
    stack: ExitStack,
) -> BatchSource:
    """Cached activations for a recipe with views, computed here if the cache lacks them; else augmented images."""
    recipe = job.recipe
    if not recipe.views:
        augmenter = stack.enter_context(Augmenter(job.augment, job.seed))
        return AugmentedImages(records, model, frozen, augmenter, job.seed, recipe.batch_size, recipe.sampling)
    features = store.compute(
        records,
        model,
        runtime=job.runtime,
        augment=job.augment,
        seed=job.seed,
        views=min(recipe.views, plan.epochs),
        shard=WorkerShard(workers.number, workers.count, workers.replicas),
        sampling=recipe.sampling,
    )
    stack.enter_context(closing(features))
    return CachedActivations(features, frozen, layers, recipe.batch_size, records.count("val"))


def _whole(epochs: float) -> float:
    """Epochs as an integer where they are whole, as all but those of control always are."""
    return int(epochs) if epochs.is_integer() else epochs


def _write(
    job: Job, model: Classifier, step: TrainStep, validator: Validator, history: Sequence[Epoch], outputs: Outputs
) -> None:
    best, last = history[best_epoch(history, job.metric)], history[-1]
    val_logits = step.source.val_logits()
    model.save(outputs.model, val_logits)
    keys = ("accuracy", "balanced_accuracy", "top5_accuracy", "loss", "balanced_loss")
    val = {key: best[f"val_{key}"] for key in keys}
    metrics: dict[str, Any] = {
        "backbone": model.description.backbone,
        "best_epoch": _whole(best["epoch"]),
        "engine": step.source.engine,
        "epochs": _whole(last["epoch"]),
        "gradient_evaluations": step.rule.gradient_evaluations,
        "image_size": model.description.image_size,
        "multiply_adds": model.description.multiply_adds,
        "val": val,
        "validations": len(history),
    }
    if job.recipe.early_stopping:
        metrics["stopped_early"] = len(history) < job.recipe.epochs
    if job.recipe.views:
        metrics["val_from_images"] = validator.compare_with_images(val_logits)
    files.write_json(outputs.metrics, metrics)
    if outputs.budget:
        Budget(step.rule.gradient_evaluations, len(history)).write(outputs.budget)
    console.log(f"{job.name}: val accuracy {val['accuracy']:.4f} at epoch {best['epoch']:.6g} of {last['epoch']:.6g}")


def _write_plot(history: Sequence[Epoch], path: str) -> None:
    """Write what is plotted, after every epoch, so that a plot follows the training."""
    # Part of an epoch may have no wrong label, or no other.
    noise = [key for key in ("accuracy_clean", "accuracy_wrong") if any(key in epoch for epoch in history)]
    columns = ("epoch", "learning_rate", "loss", "accuracy", *noise, "val_loss", "val_accuracy")
    rows = ([f"{epoch[key]:.6g}" if key in epoch else "" for key in columns] for epoch in history)
    files.write_csv(path, columns, rows)
