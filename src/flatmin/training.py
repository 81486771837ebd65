"""The one training loop: train a tail on what the trunk makes of augmented images, resumable after every epoch."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin import backbones, cache, classifier, reporting, rewrite, runtime, sam, views
from flatmin.augment import Augmenter
from flatmin.classifier import Classifier, Tail
from flatmin.params import Augment, Cosine, EarlyStopping, Params, Plateau, Sam, Training
from flatmin.records import Records
from flatmin.reporting import InputError
from flatmin.views import Share, Views

RECORDS = Path("data/records")
SELECTED = Path("models/selected")
SGD_MOMENTUM = 0.9
# What TensorFlow raises where another worker is gone.
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.InternalError)
STANDARDIZED_ON = 2000  # train images, or up to twice as many
STATE_DAYS = 30
CHECKED = 1000  # val images on which views and assembled network are compared

Epoch = dict[str, float]


def extract(params: Params, backbone: str) -> None:
    """Train a classifier behind a frozen backbone: models/extract/{backbone}, its metrics and its plot."""
    if backbone not in params.backbones:
        raise InputError(f"backbones: expected one of {', '.join(params.backbones)}, received {backbone}")
    recipe = params.extract
    if not recipe.augment:
        params = params.model_copy(update={"augment": Augment(engine="none")})
    weights = recipe.weights.get(backbone, "imagenet")
    size = _of_backbone(recipe.image_size, backbone)

    def start(records: Records) -> Classifier:
        model = classifier.create(
            backbone,
            records.class_names,
            size,
            recipe.dropout,
            params.seed,
            weights,
            recipe.levels,
            recipe.hidden_units,
        )
        every = max(1, records.count("train") // STANDARDIZED_ON)
        classifier.standardize(model, views.sample(records, model.description.image_size, every))
        return model

    digest = backbones.digest(backbone, weights)
    _run(Job(f"extract/{backbone}", params, recipe, start, depends_on={"backbone": backbone, "weights": digest}))


def finetune(params: Params, step: Sam | None = None) -> None:
    """Train the selected classifier from `fine_tune_at` on, with plain steps or, given `step`, sharpness-aware ones."""
    # Other views than those that the selected classifier was trained on, which it knows by heart.
    params = params.model_copy(update={"seed": views.derived_seed(params.seed, 1)})
    recipe = params.finetune
    if step and step.epochs:
        recipe = recipe.model_copy(update={"epochs": step.epochs})
    backbone = classifier.describe(SELECTED).backbone
    changes: dict[str, Any] = {"dropout": recipe.dropout, "seed": params.seed}
    if size := _of_backbone(recipe.image_size, backbone):
        changes["image_size"] = size
    default = backbones.find(backbone).fine_tune_at
    cut = _of_backbone(recipe.fine_tune_at, backbone)
    job = Job(
        "finetune" if step is None else "sam",
        params,
        recipe,
        lambda _: classifier.load(SELECTED, **changes, fine_tune_at=default if cut is None else cut),
        step,
        files=(SELECTED / classifier.MODEL, SELECTED / classifier.WEIGHTS),
        depends_on={"sam": step and step.settings()},
    )
    _run(job)


def _of_backbone(setting: Any, backbone: str) -> Any:
    """A setting that is one value for all, or a value for each backbone named."""
    return setting.get(backbone) if isinstance(setting, dict) else setting


@dataclass(frozen=True)
class Job:
    """A training stage: what it is called, its recipe, where it starts, and what its result depends on."""

    name: str
    params: Params
    recipe: Training
    start: Callable[[Records], Classifier]
    sam: Sam | None = None
    files: Sequence[Path] = ()
    depends_on: dict[str, Any] | None = None

    def state(self, records: Records, workers: int, replicas: int) -> Path:
        sections = {
            "seed": self.params.seed,
            "runtime": self.params.runtime.model_dump(),
            "augment": self.params.augment.model_dump(),
            "recipe": self.recipe.model_dump(),
            "records": records.digest,
            "machine": runtime.machine(),
            "workers": [workers, replicas],
            **(self.depends_on or {}),
        }
        return cache.folder() / "state" / f"{self.name.replace('/', '-')}-{cache.key(sections, self.files)}"


def _run(job: Job) -> None:
    """Train, then write weights, metrics and plot; the resume state goes when they are there.

    Of several workers each trains, and keeps a resume state of its own; the first alone writes, or every one where
    `$FLATMIN_WRITERS` is `all`: then each needs a checkout of its own, in which `dvc repro` finds the outputs.
    """
    strategy = runtime.strategy(job.params.runtime)
    runtime.configure(job.params.runtime, job.params.seed)
    records = Records(RECORDS)
    worker, workers = runtime.worker(strategy)
    forget_states()
    state = State(job.state(records, workers, strategy.num_replicas_in_sync), worker, workers)
    with strategy.scope():
        model = job.start(records)
        trainer = Trainer(job, model, records, strategy)
    with ExitStack() as stack:
        stack.enter_context(trainer.together())
        if job.recipe.views:
            share = Share(worker, workers, strategy.num_replicas_in_sync // workers)
            kept = Views(records, model, job.params, min(job.recipe.views, job.recipe.epochs), share)
            trainer.views = stack.enter_context(closing(kept))
        history = trainer.train(state)
        if worker == 0 or os.environ.get("FLATMIN_WRITERS") == "all":
            _write(job, trainer, history)
        trainer.of_all([0.0])  # nobody drops a state before the first has written
    state.remove()


def _write(job: Job, trainer: Trainer, history: Sequence[Epoch]) -> None:
    model, records = trainer.model, trainer.records
    best = best_epoch(history)
    model.save(Path("models") / job.name)
    val = {key: history[best][f"val_{key}"] for key in ("accuracy", "top5_accuracy", "loss")}
    metrics: dict[str, Any] = {
        "backbone": model.description.backbone,
        "best_epoch": best + 1,
        "epochs": len(history),
        "gradient_evaluations": gradient_evaluations(
            records.count("train"), job.recipe.batch_size, len(history), job.sam
        ),
        "image_size": model.description.image_size,
        "multiply_adds": model.description.multiply_adds,
        "trunk": trainer.views.engine if trainer.views else "tensorflow",
        "val": val,
    }
    if trainer.views:
        metrics["val_from_images"] = trainer.check_views(trainer.views)
    reporting.write_json(f"metrics/{job.name}.json", metrics)
    columns = ("learning_rate", "loss", "accuracy", "val_loss", "val_accuracy")
    rows = ([index + 1, *(f"{epoch[key]:.6g}" for key in columns)] for index, epoch in enumerate(history))
    reporting.write_csv(f"plots/{job.name}.csv", ["epoch", *columns], rows)
    reporting.log(f"{job.name}: val accuracy {val['accuracy']:.4f} at epoch {best + 1} of {len(history)}")


class Trainer:
    """Trains a classifier's tail under a strategy. Make it within the strategy's scope."""

    def __init__(self, job: Job, model: Classifier, records: Records, strategy: tf.distribute.Strategy) -> None:
        self.job = job
        self.model = model
        self.records = records
        self.strategy = strategy
        self.recipe = job.recipe
        self.views: Views | None = None
        self.steps = math.ceil(records.count("train") / self.recipe.batch_size)
        self.trunk, tail = model.cut(model.description.fine_tune_at)
        self.tail = rewrite.faster(tail, half=job.params.runtime.math != "float32" and runtime.has_bfloat16())
        _build(self.trunk, self.tail, model.description.image_size)
        settings = sam.Settings(rho=0.0) if job.sam is None else sam.Settings(**job.sam.settings())
        if settings.accumulate > self.steps * self.recipe.epochs:
            raise InputError(
                f"sam.accumulate: expected at most {self.steps * self.recipe.epochs}, the batches of all epochs, "
                f"received {settings.accumulate}"
            )
        self.optimizer = make_optimizer(self.recipe, self.steps / settings.accumulate)
        self.optimizer.build(self.tail.trainable_variables)
        self.step = sam.Step(settings, self.tail, self.optimizer)
        self.loss = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=self.recipe.label_smoothing, reduction=None
        )
        self.train_step = tf.function(self._distributed_step)
        self.score_step = tf.function(
            lambda inputs: self.tail(self._boundary(inputs), training=False), reduce_retracing=True
        )

    def train(self, state: State) -> list[Epoch]:
        """Run the epochs that are left, leave the best one's weights in the model, and return what each gave."""
        variables = [*self.tail.variables, *self.optimizer.variables, *self.step.variables]
        history, best = self._resume(state, variables)
        with Augmenter(self.job.params.augment, self.job.params.seed) as augmenter:
            while len(history) < self.recipe.epochs and not stops(history, self.recipe.early_stopping):
                history.append(self._epoch(history, augmenter))
                if best_epoch(history) == len(history) - 1:
                    best = self._kept_weights()
                if self._replicated:  # where they differ all go on as the first, as a resumed training does
                    _assign(variables, _values(variables))
                state.save(history, variables, best)
        _assign(self.tail.trainable_variables, best)
        return history

    def _resume(self, state: State, variables: Sequence[Any]) -> tuple[list[Epoch], list[np.ndarray]]:
        """History and best weights of the last epoch that all workers kept, to which the variables are set."""
        kept = self.of_all([state.epochs()])
        common = int(kept.min())
        if common and self.of_all([state.has(common)]).all():
            reporting.log(f"{self.job.name}: going on after epoch {common}")
            return state.load(common, variables)
        if kept.any():
            reporting.log(f"{self.job.name}: starting anew, since the workers have no epoch in common")
        return [], []

    def of_all(self, values: Sequence[float]) -> np.ndarray:
        """float64 [replicas, values]: each replica's, all its worker's; with one worker [1, values]."""
        if not isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy):
            return np.array([values], np.float64)

        def own() -> tf.Tensor:
            return tf.constant([values], tf.float64)

        each = tf.function(lambda: self.strategy.run(own), autograph=False)()
        return self.strategy.gather(each, axis=0).numpy()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Say in one line that another worker is gone, which TensorFlow notices within a minute."""
        try:
            yield
        except LOST as error:
            if not isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy):
                raise
            raise InputError(
                f"{self.job.name}: expected all workers to the end, lost one; start all of them again, and the "
                f"training goes on after the last epoch that all have kept ({reporting.first_line(str(error))[:200]})"
            ) from None

    def _epoch(self, history: list[Epoch], augmenter: Augmenter) -> Epoch:
        number = len(history)
        started = time.monotonic()
        if isinstance(self.recipe.schedule, Plateau):
            self.optimizer.learning_rate = plateau(history, self.recipe.schedule, self.recipe.learning_rate)
        rate = float(tf.convert_to_tensor(self.optimizer.learning_rate))
        batches = iter(self._batches(number, augmenter))
        updates, totals = self._updates, np.zeros(3)
        title = f"{self.job.name} {number + 1}/{self.recipe.epochs}"
        for _ in reporting.progress(range(self.steps), title, unit="batch"):
            totals += self.train_step(batches).numpy()
        loss, correct, count = totals
        with self._averaged():
            scores = self._validate()
        if self._replicated:  # all go by the first's, so that all decide alike
            scores = dict(zip(scores, self.of_all(list(scores.values()))[0].tolist(), strict=True))
        epoch = {"learning_rate": rate, "loss": loss / count, "accuracy": correct / count} | scores
        self._check(epoch, number + 1, self._updates - updates)
        reporting.log(
            f"{title}: loss {epoch['loss']:.4f}, val loss {epoch['val_loss']:.4f}, "
            f"val accuracy {epoch['val_accuracy']:.4f} ({time.monotonic() - started:.1f} s)"
        )
        return epoch

    @property
    def _updates(self) -> int:
        return int(tf.convert_to_tensor(self.optimizer.iterations))

    def _check(self, epoch: Epoch, number: int, updates: int) -> None:
        """Refuse an epoch after which going on makes no sense.

        Raises:
            InputError: a figure is not finite; or no step was taken, since a gradient never was.
        """
        received = f"{epoch['loss']:g} and val {epoch['val_loss']:g}"
        finds_scale = number == 1 and isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)
        if not updates and self.steps >= self.step.settings.accumulate and not finds_scale:
            received = f"gradients that were not, in each of {self.steps} batches"
        elif all(map(math.isfinite, epoch.values())):
            return
        hint = f"try a lower learning_rate than {epoch['learning_rate']:g}"
        if self.job.sam:
            hint += f", or a lower rho than {self.job.sam.rho:g}"
        raise InputError(
            f"{self.job.name}: the training diverged in epoch {number}: expected finite losses and gradients, "
            f"received {received}; {hint}"
        )

    def _batches(self, epoch: int, augmenter: Augmenter) -> Any:
        """The epoch's batches, distributed: boundary tensors from the views, else augmented images; and labels."""
        batch_size = self.recipe.batch_size
        if self.views:
            of_epoch = self.views.epoch(epoch, batch_size)
            return self.strategy.distribute_datasets_from_function(lambda _: of_epoch)
        size, seed = self.model.description.image_size, self.job.params.seed
        images = views.augmented(self.records, augmenter, size, batch_size, seed, epoch)
        sharding = tf.data.Options()
        sharding.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
        return self.strategy.experimental_distribute_dataset(images.with_options(sharding))

    def _boundary(self, inputs: Any) -> Any:
        """What the trunk makes of images, or made of them where `inputs` come from the views."""
        if not self.views:
            return self.trunk(inputs, training=False)
        cast = [tf.cast(tensor, like.dtype) for tensor, like in zip(inputs, self.trunk.outputs, strict=True)]
        return cast[0] if len(cast) == 1 else cast

    def _distributed_step(self, batches: Any) -> tf.Tensor:
        """One step on the next batch: the sums of loss and correct predictions, and the number of examples."""
        sums = self.strategy.run(self._replica_step, args=(next(batches),))
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    def _replica_step(self, batch: tuple[Any, tf.Tensor]) -> tf.Tensor:
        inputs, labels = _at_least_one(*batch) if self._replicated else batch
        present = tf.cast(labels >= 0, tf.float32)
        count = tf.reduce_sum(present) if self._replicated else tf.cast(tf.shape(labels)[0], tf.float32)
        global_count = count
        if self._replicated:
            global_count = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, count)

        def forward(part: Any) -> tuple[tf.Tensor, tf.Tensor]:
            boundary, labels, present = part
            logits = self.tail(boundary, training=True)
            losses = self.loss(tf.one_hot(labels, len(self.model.description.class_names)), logits)
            if not self._replicated:
                return tf.reduce_sum(losses) / tf.cast(tf.shape(labels)[0], tf.float32) + sum(self.tail.losses), logits
            mean = tf.math.divide_no_nan(tf.reduce_sum(losses * present), tf.reduce_sum(present))
            # A replica's share of the global mean; regularisation is the same on all.
            return mean * count / global_count + sum(self.tail.losses) / self.strategy.num_replicas_in_sync, logits

        boundary = self._boundary(inputs)
        loss, logits = self.step(forward, (boundary, labels, present), count)
        correct = tf.reduce_sum(tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == labels, tf.float32))
        return tf.stack([loss * global_count, correct, count])

    @property
    def _replicated(self) -> bool:
        return self.strategy.num_replicas_in_sync > 1

    def _validate(self) -> Epoch:
        logits = self._logits_of_views(self.views) if self.views else self._logits_of_images(self.records.count("val"))
        scores = classifier.score(logits, self.records.labels("val"))
        return {f"val_{key}": value for key, value in scores.items()}

    def _logits_of_images(self, count: int) -> np.ndarray:
        """Of the first `count` val images, by the assembled network."""
        batch_size = self.recipe.batch_size
        images = views.plain(self.records, "val", self.model.description.image_size, batch_size)
        batches = math.ceil(count / batch_size)
        return self.model.logits(images.take(batches), batches, "validating")[:count]

    def _logits_of_views(self, kept: Views) -> np.ndarray:
        """Of all val images, by the tail behind kept activations."""
        batches = kept.val_batches(self.recipe.batch_size)
        total = math.ceil(self.records.count("val") / self.recipe.batch_size)
        progress = reporting.progress(batches, "validating", total, "batch")
        return np.concatenate([self.score_step(boundary).numpy() for boundary in progress])

    def check_views(self, kept: Views) -> dict[str, float]:
        """How far the accuracy on val's first images is, seen through the assembled network, from that on their views.

        The two paths differ by what runs the trunk and by rounding to float16.
        """
        count = min(CHECKED, self.records.count("val"))
        labels = self.records.labels("val")[:count]
        from_images = classifier.score(self._logits_of_images(count), labels)["accuracy"]
        from_views = classifier.score(self._logits_of_views(kept)[:count], labels)["accuracy"]
        return {"images": count, "accuracy": from_images, "accuracy_difference": from_images - from_views}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within the block the weights are their moving averages, where the recipe asks for them."""
        # Before the first update they are zeros.
        if self.recipe.ema is None or not self._updates:
            yield
            return
        trained = _values(self.tail.trainable_variables)
        averages = sam.base_optimizer(self.optimizer)._model_variables_moving_average
        _assign(self.tail.trainable_variables, averages)
        try:
            yield
        finally:
            _assign(self.tail.trainable_variables, trained)

    def _kept_weights(self) -> list[np.ndarray]:
        with self._averaged():
            return _values(self.tail.trainable_variables)


def _values(variables: Sequence[Any]) -> list[np.ndarray]:
    return [variable.numpy() for variable in variables]


def _assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def gradient_evaluations(images: int, batch_size: int, epochs: int, step: Sam | None) -> int:
    """How many times an image went forward and backward: once in a plain step, twice in a sharpness-aware one.

    As planned: with `every`, a sharp step that is skipped (a gradient was not finite) has the next one sharp too.
    """
    if step is None or sam.Settings(**step.settings()).never_perturbs:
        return images * epochs
    sizes = [min(batch_size, images - start) for start in range(0, images, batch_size)] * epochs
    sharp = (index // step.accumulate % step.every == 0 for index in range(len(sizes)))
    return sum(size * (2 if is_sharp else 1) for size, is_sharp in zip(sizes, sharp, strict=True))


def _at_least_one(inputs: Any, labels: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """Give a replica that got nothing of a batch a black image labelled -1: layers fail on no image."""
    missing = tf.maximum(0, 1 - tf.shape(labels)[0])

    def filled(tensor: tf.Tensor) -> tf.Tensor:
        return tf.concat([tensor, tf.zeros((missing, *tensor.shape[1:]), tensor.dtype)], axis=0)

    return tf.nest.map_structure(filled, inputs), tf.concat([labels, tf.fill((missing,), -1)], axis=0)


def _build(trunk: keras.Model, tail: Tail, size: int) -> None:
    """Call both once on zeros: a subclassed model has its variables only then."""
    tail(trunk(tf.zeros((1, size, size, 3)), training=False), training=False)


def make_optimizer(recipe: Training, steps: float) -> keras.optimizers.Optimizer:
    """The recipe's Keras optimizer; `steps` an epoch. With mixed_float16 it scales the loss."""
    rate: Any = recipe.learning_rate
    if isinstance(recipe.schedule, Cosine):
        warmup = round(recipe.schedule.warmup_epochs * steps)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else rate,
            max(1, round(recipe.epochs * steps) - warmup),
            warmup_target=rate if warmup else None,
            warmup_steps=warmup,
        )
    options: dict[str, Any] = {"learning_rate": rate, "weight_decay": recipe.weight_decay or None}
    if recipe.ema is not None:
        options |= {"use_ema": True, "ema_momentum": recipe.ema}
    match recipe.optimizer:
        case "adam":
            optimizer = keras.optimizers.Adam(**options)
        case "adamw":
            optimizer = keras.optimizers.AdamW(**(options | {"weight_decay": recipe.weight_decay}))
        case "sgd":
            optimizer = keras.optimizers.SGD(momentum=SGD_MOMENTUM, **options)
    if keras.config.dtype_policy().name == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def best_epoch(history: Sequence[Epoch]) -> int:
    """The index of the epoch with the highest val accuracy; of equals the lowest val loss, then the first."""
    return min(range(len(history)), key=lambda index: (-history[index]["val_accuracy"], history[index]["val_loss"]))


def _waits(losses: Sequence[float], min_delta: float) -> Iterator[int]:
    """For each epoch, how many have passed since one whose loss was lower than the best before it by `min_delta`."""
    best, waited = math.inf, 0
    for loss in losses:
        waited += 1
        if loss < best - min_delta:
            best, waited = loss, 0
        yield waited


def stops(history: Sequence[Epoch], early_stopping: EarlyStopping | None) -> bool:
    """Whether early stopping ends the training after these epochs."""
    if early_stopping is None or not history:
        return False
    *_, waited = _waits([epoch["val_loss"] for epoch in history], early_stopping.min_delta)
    return waited >= early_stopping.patience


def plateau(history: Sequence[Epoch], schedule: Plateau, rate: float) -> float:
    """The learning rate for the epoch after `history`, by Keras' rule for `ReduceLROnPlateau`.

    Keras waits anew after lowering the rate, so each `patience` epochs in a row without a better loss lower it once.
    """
    for waited in _waits([epoch["val_loss"] for epoch in history], schedule.min_delta):
        if waited and waited % schedule.patience == 0:
            rate = max(rate * schedule.factor, min(rate, schedule.minimum))
    return rate


def forget_states() -> None:
    """Remove the states that nobody has gone on with for STATE_DAYS: of trainings that were given up."""
    for folder in (cache.folder() / "state").glob("*"):
        with suppress(OSError):  # another process removes it too
            if max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < time.time() - STATE_DAYS * 86400:
                shutil.rmtree(folder)


class State:
    """What a killed training needs to go on: every variable, the best weights and the history of its epochs.

    Of several workers each keeps the epoch before the last one too: killed while they save, they have one in common.
    """

    def __init__(self, folder: Path, worker: int = 0, workers: int = 1) -> None:
        self.file = folder / f"worker_{worker}.npz"
        self._before = folder / f"worker_{worker}_before.npz" if workers > 1 else None
        try:  # now, not after the first epoch
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"$FLATMIN_CACHE: expected a folder to write to, received {folder}: {error.strerror}"
            ) from None

    def save(self, history: Sequence[Epoch], variables: Sequence[Any], best: Sequence[np.ndarray]) -> None:
        arrays = {f"variable_{index}": np.asarray(variable) for index, variable in enumerate(variables)}
        arrays |= {f"best_{index}": value for index, value in enumerate(best)}
        arrays["history"] = np.array(json.dumps(list(history)))
        with reporting.whole(self.file) as aside:
            with aside.open("wb") as file:
                np.savez(file, **arrays)
            if self._before and self.file.exists():
                os.replace(self.file, self._before)

    def _files(self) -> dict[int, Path]:
        """Number of epochs -> the file that was saved after them."""
        found = {}
        for path in (self._before, self.file):
            if path and path.exists():
                try:
                    with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                        if saved.zip.testzip():
                            raise zipfile.BadZipFile(path)
                        found[len(json.loads(str(saved["history"])))] = path
                except (EOFError, ValueError, KeyError, zipfile.BadZipFile):  # power was lost before it was on disk
                    reporting.log(f"{path}: expected a resume state, found a broken file; doing without")
        return found

    def epochs(self) -> int:
        """How many epochs were saved."""
        return max(self._files(), default=0)

    def has(self, epochs: int) -> bool:
        """Whether the state after so many epochs is kept."""
        return epochs in self._files()

    def load(self, epochs: int, variables: Sequence[Any]) -> tuple[list[Epoch], list[np.ndarray]]:
        """Set the variables to what was saved after so many epochs; return history and best weights."""
        path = self._files()[epochs]
        if path == self._before:  # the later one is given up: saved again, it must not take this one's place
            os.replace(path, self.file)
        with np.load(self.file, allow_pickle=False) as saved:
            for index, variable in enumerate(variables):
                variable.assign(saved[f"variable_{index}"])
            best = [saved[f"best_{index}"] for index in range(sum(name.startswith("best_") for name in saved.files))]
            return json.loads(str(saved["history"])), best

    def remove(self) -> None:
        for path in (self._before, self.file):
            if path:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # another worker's may be there
            self.file.parent.rmdir()
