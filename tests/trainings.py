"""Trainings in seconds: points through two dense layers, and what the stage scripts run, on a quarter of MobileNet."""

from __future__ import annotations

import json
import math
import runpy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf
from networks import spread
from PIL import Image
from repository import ROOT

from flatmin import sam
from flatmin.common import params
from flatmin.common.params import Finetune, Params, Sam
from flatmin.data import writer
from flatmin.inputs import batches
from flatmin.inputs.records import Records
from flatmin.models import classifier, scores
from flatmin.models.classifier import TrainedLayers
from flatmin.training.schedule import Plan
from flatmin.training.step import PLAIN, StepSettings, TrainStep
from flatmin.training.trainer import Trainer
from flatmin.training.validation import Validator
from flatmin.training.workers import Workers


def sam_settings(step: Sam | None) -> StepSettings:
    """The update rule of a `sam` section; None is finetune's."""
    if step is None:
        return PLAIN
    settings = sam.Settings(**step.settings())
    hint = f"a lower rho than {settings.rho:g}"
    return StepSettings(partial(sam.Step, settings), accumulate=settings.accumulate, hint=hint)


# Points of three classes


class Points:
    """A source of batches of points in space, with as many in val; dropout and a penalty on weights in its layers.

    Attributes:
        epochs: the numbers of the epochs that were asked for.
    """

    engine = "none"

    def __init__(self, count: int, batch_size: int) -> None:
        random = np.random.default_rng(7)
        self._labels = random.integers(0, 3, 2 * count).astype(np.int32)
        centers = random.normal(size=(3, 4))
        self._inputs = (random.normal(size=(2 * count, 4)) + centers[self._labels]).astype(np.float32)
        self._count, self._batch_size = count, batch_size
        self.layers = _layers()
        self.epochs: list[int] = []

    def epoch(self, number: int, strategy: tf.distribute.Strategy, skipped: int = 0) -> Any:
        self.epochs.append(number)
        order = np.random.default_rng(number).permutation(self._count)
        points = tf.data.Dataset.from_tensor_slices((self._inputs[order], self._labels[order]))
        return points.batch(self._batch_size).skip(skipped)

    def activations(self, inputs: Any) -> Any:
        return inputs

    def val_logits(self) -> np.ndarray:
        return self.layers(self._inputs[self._count :], training=False).numpy()

    def labels(self, role: str) -> np.ndarray:
        """The labels of val, as records have them."""
        return self._labels[self._count :]


def _layers() -> TrainedLayers:
    layers = keras.layers
    head = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, "relu", kernel_regularizer=keras.regularizers.L2(0.01)),
            layers.Dropout(0.3, seed=3),
            layers.Dense(3, dtype="float32"),
        ]
    )
    random = np.random.default_rng(5)
    for variable in head.trainable_variables:
        variable.assign(random.normal(0, 0.5, variable.shape))
    trained = TrainedLayers(None, head)
    trained(tf.zeros((1, 4)))  # it has its variables only then
    return trained


def point_recipe(**changes: Any) -> Finetune:
    return Finetune.model_validate(
        {"optimizer": "adam", "learning_rate": 0.02, "batch_size": 4, "epochs": 4, "image_size": None, "schedule": None}
        | changes
    )


def point_step(
    recipe: Finetune, sam: Sam | None = None, count: int = 13, weights: np.ndarray | None = None
) -> tuple[TrainStep, Points]:
    points = Points(count, recipe.batch_size)
    steps = recipe.epochs * math.ceil(count / recipe.batch_size)
    strategy = tf.distribute.get_strategy()
    rule = sam_settings(sam)
    step = TrainStep(strategy, points, points.layers, recipe, rule, steps=steps, classes=3, weights=weights)
    return step, points


def point_trainer(
    recipe: Finetune, sam: Sam | None = None, plan: Plan | None = None
) -> tuple[Trainer, TrainStep, Points]:
    step, points = point_step(recipe, sam)
    plan = plan or Plan.of_epochs(recipe.epochs, 13, recipe.batch_size)
    validator = Validator(points, points, points, recipe.batch_size)  # type: ignore[arg-type]
    return Trainer("points", recipe, plan, step, validator, Workers(step.strategy)), step, points


# The stages, of a network that random weights leave something to see

NAMES = ("blue", "green", "red")
BACKBONE, SPLIT_POINT = "MobileNet025", "conv_dw_12"
TRAIN, VAL = 13, 9  # in batches of 3 the last one of train is a single image
SEED = 3
VARIED = {"engine": "tensorflow", "n": 0, "flip": True, "crop": 4}
SELECTED = "models/select"
HEADS: dict[str, dict[str, Any]] = {"linear": {}, "levels": {"levels": "all", "hidden_units": 8}}


def small(**changes: Any) -> Params:
    """The params of a small study. changes: of the sections `runtime`, `augment` and `extract`, else of `finetune`."""
    recipe = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 3, "epochs": 2, "image_size": 32}
    values: dict[str, Any] = {
        "seeds": [SEED],
        "runtime": changes.pop("runtime", {}),
        "data": {
            "source": "folder",
            "name": "images",
            "seed": SEED,
            "splits": {"train": "train", "val": "val", "test": "test"},
        },
        "augment": changes.pop("augment", {"engine": "none"}),
        "backbones": [BACKBONE],
        "extract": recipe
        | {"seed": SEED, "batch_size": 4, "weights": {BACKBONE: "base.weights.h5"}}
        | changes.pop("extract", {}),
        "select": {"metric": "accuracy"},
        "audit": {},
        "finetune": recipe | {"fine_tune_at": {BACKBONE: SPLIT_POINT}} | changes,
        "sam": {"rho": 0.05},
        "finalize": {},
        "evaluate": {},
    }
    return params.parse(values)


def write_images(folder: Path, train: int) -> None:
    """Write images of coloured noise, and their records to the working directory."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", VAL), ("test", 3)):
        for index in range(count):
            pixels = random.integers(0, 180, (32, 32, 3), np.uint8)
            pixels[..., 2 - index % 3] += 60
            path = folder / f"images/{split}/{NAMES[index % 3]}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    writer.write(small().data, "data/records")


def write_classifier(head: str = "linear", folder: str = SELECTED) -> classifier.Classifier:
    """Write a classifier of random weights as select-best does, and the backbone's weights for extract-train."""
    options: dict[str, Any] = {"levels": "last", "hidden_units": 0} | HEADS[head]
    model = classifier.create(BACKBONE, NAMES, image_size=32, dropout=0.0, seed=1, weights="none", **options)
    spread(model.base)
    images = batches.sample(Records("data/records"), 32, 1, 8)
    classifier.fit_standardization(model, (pixels for pixels, _ in images))
    model.base.save_weights("base.weights.h5")
    model.save(folder)
    return model


@dataclass(frozen=True)
class Given:
    """The params that a stage script gets, all of them and unguarded."""

    params: Params


def run_stage(script: str, settings: Params, *items: str) -> None:
    """Run a script of stages/ in the working directory, within this process."""
    state = runpy.run_path(str(ROOT / "stages" / f"{script}.py"))["main"](Given(settings), *items)
    if state is not None:
        state.remove()


def extract(settings: Params) -> None:
    run_stage("extract_train", settings, BACKBONE)


def finetune(settings: Params, step: Sam | None = None) -> None:
    """finetune; given a `sam` section, sam-finetune."""
    if step is None:
        run_stage("finetune", settings, str(SEED))
    else:
        run_stage("sam_finetune", settings.model_copy(update={"sam": step}), str(SEED))


def control(settings: Params) -> None:
    """control, by the budget that the last sam-finetune left."""
    run_stage("control", settings, str(SEED))


def item(name: str) -> str:
    """A training's place in models/, metrics/ and plots/."""
    return f"{name}/{SEED}" if name in ("finetune", "control", "sam") else name


def written(name: str, folder: Path | str = ".") -> dict[str, bytes]:
    """The bytes of what a training stage wrote, by the file's name."""
    root = Path(folder)
    models, metrics, plot = root / "models" / item(name), root / f"metrics/{item(name)}.json", f"plots/{item(name)}.csv"
    paths = [*models.iterdir(), metrics, root / plot]
    return {path.name: path.read_bytes() for path in paths}


def rename(name: str, new_name: str) -> None:
    """Move what a training stage wrote out of the next one's way; nothing where this process is not to write."""
    for path, new_path in (
        (f"models/{item(name)}", f"models/{new_name}"),
        (f"metrics/{item(name)}.json", f"metrics/{new_name}.json"),
        (f"plots/{item(name)}.csv", f"plots/{new_name}.csv"),
    ):
        if Path(path).exists():
            shutil.move(path, new_path)


def metrics(name: str, folder: Path | str = ".") -> dict[str, Any]:
    return json.loads((Path(folder) / f"metrics/{item(name)}.json").read_text())


def saved_weights(folder: Path | str) -> dict[str, np.ndarray]:
    """Every array that a classifier's folder holds, by its place in the file."""
    arrays: dict[str, np.ndarray] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    with h5py.File(Path(folder, classifier.WEIGHTS)) as file:
        file.visititems(add)
    return arrays


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The norm of the difference of all weights."""
    assert one.keys() == other.keys()
    return float(np.sqrt(sum(np.sum((one[name] - other[name]) ** 2) for name in one)))


def scores_on_val(model: classifier.Classifier) -> dict[str, float]:
    records = Records("data/records")
    logits = model.logits(pixels for pixels, _ in batches.plain(records, "val", 32, VAL))
    return scores.score(logits, records.labels("val"))


def view_files(folder: Path | str = "cache") -> dict[str, bytes]:
    """The cached activations, by their paths."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).glob("views/*/activations_*.npy"))}


@contextmanager
def interrupted_after(epochs: int) -> Iterator[None]:
    """Within the block a training ends with KeyboardInterrupt once its state after this number of epochs is saved."""
    from flatmin.training.resume import State

    save = State.save

    def save_and_stop(self: State, history: Any, variables: Any, best: Any) -> None:
        save(self, history, variables, best)
        if len(history) == epochs:
            raise KeyboardInterrupt

    State.save = save_and_stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        State.save = save  # type: ignore[method-assign]
