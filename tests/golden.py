"""The golden numbers: what the code computes, pinned to a tolerance that holds on any processor.

    python tests/golden.py             compute them and compare with tests/golden.json
    python tests/golden.py --write     write them, and accept the source as it is

Each part is a function from a scratch folder to numbers by name. A number is a float, compared to the part's tolerance,
or text, compared exactly. `$GOLDEN_ENGINE` sets `runtime.engine`. A number that is new is written; one that moved is
written for a raised RESULTS_VERSION alone, so delete golden.json after a change of what is computed here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flatmin.common import console, files, identity, params

with console.importing_tensorflow():
    import keras
    import tensorflow as tf
    from PIL import Image

    from flatmin import power, runtime, sam, sharpness
    from flatmin.data import writer
    from flatmin.evaluation import comparison, metrics
    from flatmin.images import to_square
    from flatmin.inputs import batches
    from flatmin.inputs.augment import augment
    from flatmin.inputs.records import Records
    from flatmin.models import classifier, registry
    from flatmin.selection import backbone, calibration, release
    from flatmin.training import optimizer, schedule, stages
    from flatmin.training.step import PLAIN, StepSettings, Sums, TrainStep

Numbers = dict[str, Any]
FILE = Path(__file__).with_name("golden.json")
BACKBONE = "EfficientNetLite0"
DATA = {
    "source": "bundled",
    "name": "digits",
    "seed": 3,
    "image_size": 32,
    "splits": {"train": "train[:20%]", "val": "train[20%:24%]", "test": "train[60%:64%]"},
    "train_per_class": 5,
}
AUGMENT = params.Augment(n=2, m=7, crop=3)
RECIPE = {
    "optimizer": "adamw",
    "learning_rate": 0.003,
    "schedule": {"name": "cosine", "warmup_epochs": 0.5},
    "weight_decay": 0.02,
    "label_smoothing": 0.1,
    "ema": 0.8,
    "batch_size": 16,
    "epochs": 2,
    "views": 2,
    "image_size": 64,
}
# Relative to the number, or to 1e-3 where the number is smaller. `tests/test_golden.py` shows that these hold with
# other instruction sets, threads and engines, and that each is at most a tenth of what a deliberate break moves.
TOLERANCES = {
    "records": 0.0,
    "augmentation": 1e-3,
    "inputs": 1e-4,
    "activations": 1e-4,
    "training": 2e-4,
    "steps": 1e-4,
    "schedules": 1e-5,
    "averages": 1e-4,
    "sharpness": 1e-4,
    "selection": 0.0,
    "scores": 1e-6,
    "comparison": 1e-6,
    "defaults": 0.0,
}


def compute_records(folder: Path) -> Numbers:
    """The digest of all that prepare stores."""
    data = params.Data.model_validate(DATA)
    described = writer.write(data, folder / "records")
    return {"digest": described["digest"], "train": described["roles"]["train"]["count"]}


def _records(folder: Path) -> Records:
    if not (folder / "records").exists():
        compute_records(folder)
    return Records(folder / "records")


def compute_augmentation(folder: Path) -> Numbers:
    """Statistics of one augmented chunk's pixels, with everything switched on and for each part alone."""
    images = [np.asarray(each.read()) for each in _records(folder).stored("train", range(32))]
    settings = {
        "all": params.Augment(n=2, m=7, p=0.8, flip=True, crop=3),
        "randaugment": params.Augment(n=3, m=15),
        "flip and crop": params.Augment(n=0, flip=True, crop=2),
    }
    numbers = {}
    for name, each in settings.items():
        pixels = np.stack(augment(images, each, 5, 1, 2)).astype(np.float64)
        numbers[f"{name} mean"] = pixels.mean()
        numbers[f"{name} deviation"] = pixels.std()
        numbers[f"{name} distance"] = np.abs(pixels - np.stack(images)).mean()
    return numbers


def compute_inputs(folder: Path) -> Numbers:
    """Resized pixels, enlarged and shrunk, against a fixed pattern of weights."""
    image = np.random.default_rng(1).integers(0, 256, (40, 30, 3)).astype(np.uint8)
    numbers = {}
    for size in (64, 24):
        pixels = np.asarray(to_square(Image.fromarray(image), size, "squash"), np.float64)
        pattern = np.cos(np.arange(pixels.size)).reshape(pixels.shape)
        numbers[f"{size} mean"], numbers[f"{size} deviation"] = pixels.mean(), pixels.std()
        numbers[f"{size} pattern"] = float((pixels * pattern).mean()) + pixels.mean()
    numbers["derived seed"] = str(batches.derived_seed(42, 1))
    return numbers


def compute_activations(folder: Path) -> Numbers:
    """Activations at the default split point, and logits, of a pretrained network with a random head."""
    records = _records(folder)
    model = classifier.create(
        BACKBONE,
        records.class_names,
        image_size=64,
        dropout=0.2,
        seed=3,
        weights="imagenet",
        levels="last",
        hidden_units=0,
    )
    pixels = next(iter(batches.plain(records, "val", 64, 8)))[0]
    frozen, layers = model.split(registry.find(BACKBONE).fine_tune_at)
    activations = tf.nest.flatten(frozen(pixels, training=False))
    numbers: Numbers = {"trained parameters": sum(math.prod(each.shape) for each in layers.trainable_variables)}
    for index, tensor in enumerate(activations):
        numbers[f"tensor {index} shape"] = str(tuple(tensor.shape))
        numbers[f"tensor {index} norm"] = float(np.linalg.norm(tensor.numpy()))
        numbers[f"tensor {index} mean"] = float(tensor.numpy().mean())
    numbers["logits norm"] = float(np.linalg.norm(layers(frozen(pixels, training=False)).numpy()))
    return numbers


def compute_training(folder: Path) -> Numbers:
    """The losses of each epoch of extract-train, sam-finetune and control, as the stages run them."""
    _records(folder)
    shared: dict[str, Any] = {
        "runtime": params.Runtime.model_validate({"engine": os.environ.get("GOLDEN_ENGINE", "auto")}),
        "augment": AUGMENT,
        "records": str(folder / "records"),
    }
    before = os.environ.get("FLATMIN_CACHE")
    os.environ["FLATMIN_CACHE"] = str(folder / "cache")
    try:
        # By SGD, whose steps are smooth in the gradients: Adam's first ones follow the signs of rounding errors.
        head = params.Extract.model_validate(RECIPE | {"seed": 3, "optimizer": "sgd", "learning_rate": 0.002})
        stages.extract(BACKBONE, recipe=head, outputs=_outputs(folder, "extract"), **shared).remove()
        changes = {"optimizer": "sgd", "learning_rate": 0.0002, "fine_tune_at": "block7a_expand_conv"}
        recipe = params.Finetune.model_validate(RECIPE | changes)
        shared |= {"seed": 3, "recipe": recipe, "selected": str(folder / "models/extract")}
        outputs = dataclasses.replace(_outputs(folder, "sam"), budget=str(folder / "budget.json"))
        stages.finetune("sam", outputs=outputs, step=_sam_settings(rho=0.1), **shared).remove()
        budget = schedule.Budget.read(folder / "budget.json")
        stages.finetune("control", outputs=_outputs(folder, "control"), budget=budget, **shared).remove()
    finally:
        os.environ.pop("FLATMIN_CACHE") if before is None else os.environ.update(FLATMIN_CACHE=before)
    numbers: Numbers = {}
    for name in ("extract", "sam", "control"):
        header, *rows = (line.split(",") for line in (folder / f"{name}.csv").read_text().splitlines())
        for row in rows:
            values = dict(zip(header, row, strict=True))
            numbers |= {f"{name} epoch {row[0]} {key}": float(values[key]) for key in ("loss", "val_loss")}
        numbers[f"{name} gradient evaluations"] = str(files.read_json(folder / f"{name}.json")["gradient_evaluations"])
    return numbers


def _outputs(folder: Path, name: str) -> stages.Outputs:
    return stages.Outputs(str(folder / "models" / name), str(folder / f"{name}.json"), str(folder / f"{name}.csv"))


def _sam_settings(**settings: Any) -> StepSettings:
    checked = sam.Settings(**settings)
    return StepSettings(lambda model, optimizer: sam.Step(checked, model, optimizer), accumulate=checked.accumulate)


STEPS = 5  # of an epoch of `_Points`


class _Points:
    """A source of batches of random images with four classes, for a network of three layers."""

    engine = "tensorflow"

    def __init__(self) -> None:
        random = np.random.default_rng(7)
        self.labels = random.integers(0, 4, 48).astype(np.int32)
        self.images = (random.normal(size=(48, 8, 8, 3)) + 0.7 * self.labels[:, None, None, None]).astype(np.float32)

    def epoch(self, number: int, strategy: tf.distribute.Strategy, skipped: int = 0) -> Any:
        return tf.data.Dataset.from_tensor_slices((self.images, self.labels)).batch(10).skip(skipped)

    def activations(self, inputs: Any) -> Any:
        return inputs

    def val_logits(self) -> np.ndarray:
        raise NotImplementedError


def _small_network() -> keras.Model:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, name="conv"),
            layers.BatchNormalization(name="bn", trainable=False),
            layers.ReLU(name="relu"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dropout(0.2, seed=11, name="dropout"),
            layers.Dense(4, name="logits", kernel_regularizer="l2"),
        ],
        name="small",
    )
    random = np.random.default_rng(5)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 0.3, variable.shape))
    return model


def _train_step(settings: StepSettings, **changes: Any) -> TrainStep:
    recipe = params.Finetune.model_validate(RECIPE | {"batch_size": 10, "learning_rate": 0.02} | changes)
    strategy = tf.distribute.get_strategy()
    return TrainStep(strategy, _Points(), _small_network(), recipe, settings, steps=2 * STEPS, classes=4)


def _losses(step: TrainStep) -> Iterator[float]:
    """The loss of each of the steps of two epochs."""
    for epoch in range(2):
        iterator = iter(step.source.epoch(epoch, step.strategy))
        for _ in range(STEPS):
            yield Sums(step(iterator)).means()["loss"]


def steps_to_compute() -> dict[str, StepSettings]:
    """The update rules whose losses are pinned: plain, every method of SAM, and SAM's other settings."""
    own: dict[str, dict[str, Any]] = {
        "gsam": {"rho_min": 0.02, "rho_max": 0.2},
        "lesam": {"sigma": 0.05},
        "looksam": {"every": 3},
    }
    rules = {"plain": PLAIN, "plain, adam": PLAIN}
    rules |= {method: _sam_settings(method=method, rho=0.1, **own.get(method, {})) for method in sam.METHODS}
    for name, value in (("adaptive", True), ("every", 2), ("num_batch_splits", 2), ("accumulate", 2)):
        rules[name] = _sam_settings(rho=1.0 if name == "adaptive" else 0.1, **{name: value})
    return rules


def compute_steps(folder: Path) -> Numbers:
    """The loss of each training step of a small network by every update rule."""
    numbers: Numbers = {}
    for name, settings in steps_to_compute().items():
        step = _train_step(settings, **({"optimizer": "adam"} if name.endswith("adam") else {}))
        numbers |= {f"{name} loss {index}": loss for index, loss in enumerate(_losses(step))}
        numbers[f"{name} gradient evaluations"] = str(step.rule.gradient_evaluations)
    return numbers


def compute_schedules(folder: Path) -> Numbers:
    """Learning rates of the cosine with warm-up, rates on a plateau, early stopping, the best epoch."""
    step = _train_step(PLAIN)
    numbers: Numbers = {}
    for index, _ in enumerate(_losses(step)):
        numbers[f"cosine rate {index + 1}"] = step.rate()
    losses = [1.0, 0.9, 0.95, 0.9, 0.91, 0.92, 0.89, 0.95, 0.96, 0.97]
    history = [{"val_loss": loss, "val_accuracy": 1 - loss / 2} for loss in losses]
    rule = params.Plateau(name="plateau", patience=2)
    numbers |= {f"plateau rate {n}": schedule.plateau(history[:n], rule, 0.1) for n in range(len(history) + 1)}
    stopping = params.EarlyStopping(patience=3)
    numbers["stops after"] = str(next(n for n in range(1, 11) if schedule.stops(history[:n], stopping)))
    numbers["best epoch"] = str(schedule.best_epoch(history))
    return numbers


def compute_averages(folder: Path) -> Numbers:
    """The weights after two epochs, and their exponential moving averages."""
    step = _train_step(PLAIN)
    list(_losses(step))
    variables = step.layers.trainable_variables
    numbers: Numbers = {f"weights {v.path}": float(np.linalg.norm(v.numpy())) for v in variables}
    with optimizer.averaged_weights(step.optimizer, variables):
        numbers |= {f"averages {v.path}": float(np.linalg.norm(v.numpy())) for v in variables}
    return numbers


def compute_sharpness(folder: Path) -> Numbers:
    """Sharpness of a small network's loss, and the loss along a line."""
    points, model = _Points(), _small_network()
    sample = [(tf.constant(points.images[i : i + 16]), tf.constant(points.labels[i : i + 16])) for i in (0, 16, 32)]
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits
    surface = sharpness.Surface(sharpness.Derivatives(model, losses, sample[0]), model, sample)
    measured = sharpness.measure(surface, rho=0.05, adaptive_rho=0.5, steps=15, probes=4, seed=1)
    direction = sharpness.filter_normalised(model.trainable_variables, 1)
    along = sharpness.line(surface, direction, np.array([-0.3, 0.0, 0.3]))
    return dict(measured.metrics) | {f"line {index}": float(loss) for index, loss in enumerate(along)}


def _logits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(9)
    labels = random.integers(0, 10, 400)
    first, second = (random.normal(size=(400, 10)) for _ in range(2))
    for logits, gain in ((first, 2.0), (second, 1.5)):
        logits[np.arange(400), labels] += gain
    return first.astype(np.float32), second.astype(np.float32), labels


def compute_selection(folder: Path) -> Numbers:
    """The backbone that select-best chooses and the method that finalize does, by tolerance."""
    values = {"large": (9, 0.90), "small": (1, 0.88), "middle": (4, 0.895), "equal": (4, 0.896)}
    metrics = {name: {"multiply_adds": n, "val": {"accuracy": val}} for name, (n, val) in values.items()}
    numbers: Numbers = {f"within {each}": backbone.choose(metrics, each) for each in (0.0, 0.005, 0.02)}
    trained = {"extract": [(0.90, 9)], "finetune": [(0.94, 30), (0.95, 30)], "sam": [(0.95, 60), (0.95, 60)]}
    methods = {
        name: [release.Trained(seed, accuracy, 1.0, count) for seed, (accuracy, count) in enumerate(each)]
        for name, each in trained.items()
    }
    return numbers | {f"released within {each}": str(release.choose(methods, each)) for each in (0.0, 0.01, 0.1)}


def compute_scores(folder: Path) -> Numbers:
    """Accuracies, loss and calibration of fixed logits, and their temperature."""
    first, second, labels = _logits()
    settings = params.Evaluate()
    temperature = calibration.fit_temperature(first, labels)
    averaged = metrics.scores(metrics.average_predictions(first, second), labels, settings)
    scores = {"temperature": temperature, **metrics.scores(first, labels, settings, temperature)}
    return scores | {f"averaged {key}": value for key, value in averaged.items()}


def compute_comparison(folder: Path) -> Numbers:
    """The difference between two classifiers on the same images, over seeds too, and the power to see one."""
    first, second, labels = _logits()
    correct = [logits.argmax(axis=1) == labels for logits in (first, second)]
    numbers: Numbers = dict(comparison.difference(correct[0], correct[1]))
    seeds = [np.stack([np.roll(each, shift) for shift in (0, 7, 31)]) for each in correct]
    numbers |= {f"crossed {key}": value for key, value in comparison.crossed_difference(*seeds).items()}
    for images in (360, 1078):
        numbers[f"smallest difference of {images}"] = power.smallest_difference(images)
    return numbers


def compute_defaults(folder: Path) -> Numbers:
    """The default of every key of params.yaml, by the class of its section."""
    numbers: Numbers = {}
    sections = [params.Section]
    while sections:
        section = sections.pop()
        sections += [each for each in section.__subclasses__() if each.__module__ == params.__name__]
        for key, field in section.model_fields.items():
            default = field.get_default(call_default_factory=True)
            value = default.model_dump() if isinstance(default, params.Section) else default
            name = f"{section.__name__}.{key}"
            numbers[name] = "required" if field.is_required() else json.dumps(value, sort_keys=True)
    return dict(sorted(numbers.items()))


PARTS: dict[str, Callable[[Path], Numbers]] = {
    name: globals()[f"compute_{name}"]
    for name in TOLERANCES  # in the order above
}


def compute(parts: Sequence[str] = tuple(PARTS)) -> dict[str, Numbers]:
    """Compute the numbers of some parts, one by one, in a fresh folder."""
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            runtime.configure(params.Runtime(), 3)
            numbers[part] = {
                key: value if isinstance(value, str) else float(value)
                for key, value in PARTS[part](Path(folder)).items()
            }
    return numbers


def deviation(received: float, expected: float) -> float:
    """How far a number is from the expected one, relative to the latter."""
    return abs(received - expected) / max(abs(expected), 1e-3) if math.isfinite(received) else math.inf


def differences(received: dict[str, Numbers], expected: dict[str, Numbers]) -> list[tuple[str, float, str]]:
    """The numbers that moved by more than their tolerance: (name, deviation, line), the largest deviation first."""
    moved = []
    for part, numbers in received.items():
        for key in dict.fromkeys((*expected.get(part, {}), *numbers)):
            ours, theirs = numbers.get(key), expected.get(part, {}).get(key)
            if isinstance(ours, float) and isinstance(theirs, float):
                by = deviation(ours, theirs)
                text = f"moved by {by:.2g} of itself, from {theirs:.9g} to {ours:.9g} (tolerance {TOLERANCES[part]:g})"
            else:
                by = 0.0 if ours == theirs else math.inf
                text = (
                    f"changed from {theirs} to {ours}" if theirs is not None else f"new, {ours}: `make golden` adds it"
                )
            if by > TOLERANCES[part]:
                moved.append((f"{part}: {key}", by, f"{part}: {key}: {text}"))
    return sorted(moved, key=lambda each: -each[1])


HINT = "if the change is meant: raise RESULTS_VERSION in src/flatmin/common/identity.py, then `make golden`"


def read() -> dict[str, Numbers]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def new_numbers(received: dict[str, Numbers]) -> set[str]:
    """The numbers that the committed file does not have yet."""
    expected = read()
    return {f"{part}: {key}" for part in received for key in received[part] if key not in expected.get(part, {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the numbers and accept the source")
    parser.add_argument("--print", action="store_true", help="print the numbers as JSON and compare nothing")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    if arguments.write and arguments.parts != list(PARTS):
        parser.error("--write takes all parts")
    for room in identity.rooms():
        identity.source_digest(room)  # of the source whose numbers follow
    numbers = compute(arguments.parts)
    if arguments.print:
        print(json.dumps(numbers))
    elif arguments.write:
        moved = differences(numbers, read()) if FILE.exists() else []
        moved = [each for each in moved if each[0] not in new_numbers(numbers)]
        if moved and identity.read_accepted()[0] == identity.RESULTS_VERSION:
            sys.exit(
                f"error: {moved[0][2]}; {len(moved)} numbers moved: raise RESULTS_VERSION first, then `make golden`"
            )
        identity.check_source_unchanged()
        files.write_json(FILE, numbers)
        identity.write_accepted()
        console.log(f"golden: {sum(map(len, numbers.values()))} numbers written")
    elif moved := differences(numbers, read()):
        for _, _, line in moved[:20]:
            print(f"error: {line}", file=sys.stderr)
        sys.exit(f"error: {len(moved)} golden numbers moved; {HINT}")


if __name__ == "__main__":
    main()
