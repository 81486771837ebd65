"""The evaluate stage: every model's scores on test, how the methods differ, predictions, and the minima's sharpness."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatmin import power, runtime
from flatmin.common import console, files
from flatmin.common.params import Evaluate, Runtime
from flatmin.evaluation import comparison, gallery, plots, subsets, tables
from flatmin.evaluation.metrics import average_predictions, mean_and_deviation, scores
from flatmin.evaluation.minima import measure_sharpness, unequal_losses
from flatmin.inputs import batches
from flatmin.inputs.records import Records
from flatmin.inputs.thumbnails import Gallery
from flatmin.models import classifier

SEED = 0  # of the random vectors of sharpness, and of what little else a scoring could draw
COMPARED = {"sam_minus_control": ("sam", "control"), "sam_minus_finetune": ("sam", "finetune")}


@dataclass(frozen=True)
class Models:
    """The folders of the classifiers to evaluate, and the file in which finalize wrote their temperatures.

    Attributes:
        extract, final: one classifier each.
        seeded: by method, finetune, control and sam, the folder of each seed.
        finalized: metrics/final.json.
    """

    extract: str
    seeded: Mapping[str, Mapping[int, str]]
    final: str
    finalized: str

    def all(self) -> Iterator[tuple[str, str]]:
        """Name and folder of each: extract, finetune@42, ..., final."""
        yield "extract", self.extract
        for method, folders in self.seeded.items():
            for seed, folder in folders.items():
                yield f"{method}@{seed}", folder
        yield "final", self.final

    def temperatures(self) -> dict[str, float]:
        """The temperature of each classifier, by the names of `all`."""
        final = files.read_json(self.finalized)
        found = {f"{method}@{seed}": final[method]["seeds"][str(seed)] for method in self.seeded for seed in self.seeds}
        each = {**found, "extract": final["extract"], "final": final["released"]}
        return {name: float(values["temperature"]) for name, values in each.items()}

    @property
    def seeds(self) -> list[int]:
        return list(self.seeded["finetune"])


@dataclass(frozen=True)
class Outputs:
    """Where evaluate writes. evaluation: a folder, what the report shows of the images."""

    predictions: str
    evaluation: str
    metrics: str
    confusion: str
    class_accuracy: str
    sharpness: str


def evaluate(
    *, runtime: Runtime, settings: Evaluate, records: str, audit: str, models: Models, outputs: Outputs
) -> None:
    """Score every classifier on test, compare the methods, predict test and predict, and measure the minima found.

    audit: the folder that audit wrote, by which test is also scored without what train nearly has.
    """
    with _configured(runtime):
        dataset = Records(records)
        labels = dataset.labels("test")
        labelled = bool((labels >= 0).all())
        parts = subsets.read(audit, len(labels))
        passes = [(role, False) for role in ("test", "predict") if role in dataset.roles]
        if labelled and settings.mirrored:
            passes.append(("test", True))
        logits = _logits(dataset, models, passes, settings.batch_size)
    with files.atomic_write(outputs.predictions) as temporary:
        temporary.mkdir()
        for role in (role for role, mirrored in passes if not mirrored):
            _write_predictions(temporary / f"{role}.csv", dataset, role, logits[role, False])
    test, known = logits["test", False], labels if labelled else labels[:0]
    metrics = _score(models, test, logits.get(("test", True), {}), labels, settings, parts) if labelled else {}
    with files.atomic_write(outputs.evaluation) as folder:
        folder.mkdir()
        sharpness = measure_sharpness(
            dataset, models.seeded, settings, SEED, outputs.sharpness, folder / "sharpness.csv"
        )
        _write_evaluation(folder, dataset, models, test, known, settings)
    for method, measured in sharpness.items():
        part = metrics.setdefault(method, {"seeds": {str(seed): {} for seed in measured}})
        for seed, values in measured.items():
            part["seeds"][str(seed)]["sharpness"] = values
        _add_means(part, "sharpness", list(measured.values()))
    unequal = unequal_losses(
        {method: {seed: values["loss"] for seed, values in measured.items()} for method, measured in sharpness.items()}
    )
    metrics["sharpness"] = {"equal_loss": not unequal, "not_compared": "; ".join(unequal)}
    files.write_json(outputs.metrics, metrics)
    predicted = {name: values.argmax(axis=1)[: len(known)] for name, values in test.items()}
    plots.write_confusion(outputs.confusion, predicted["final"], known, dataset.class_names)
    plots.write_class_accuracy(outputs.class_accuracy, _by_method(models, predicted), known, dataset.class_names)
    for pair in unequal:
        console.log(f"evaluate: flatness of {pair} is not compared at equal train loss")
    if labelled:
        _report(metrics)


def _configured(settings: Runtime) -> Any:
    """Compute in the training's dtype policy, but multiply in float32: the scores are the network's own."""
    runtime.configure(settings.model_copy(update={"matmul": "float32"}), SEED)
    return runtime.dtype_policy(settings.precision)


def _logits(
    records: Records, models: Models, passes: Sequence[tuple[str, bool]], batch_size: int
) -> dict[tuple[str, bool], dict[str, np.ndarray]]:
    """For each (role, whether its images are mirrored): the logits by classifier, float32 [n, classes].

    Classifiers with the same weights, such as the released one and its copy, are run once.
    """
    logits: dict[tuple[str, bool], dict[str, np.ndarray]] = {each: {} for each in passes}
    loader, done = classifier.Loader(), dict[str, str]()
    for name, folder in models.all():
        model, identity = loader.load(folder)
        for role, mirrored in passes:
            if identity in done:
                logits[role, mirrored][name] = logits[role, mirrored][done[identity]]
                continue
            images = batches.plain(records, role, model.description.image_size, batch_size)
            pixels = (batch[:, :, ::-1] if mirrored else batch for batch, _ in images)
            total = math.ceil(records.count(role) / batch_size)
            title = f"{name} on {role}{', mirrored' if mirrored else ''}"
            logits[role, mirrored][name] = model.logits(pixels, total, title)
        done.setdefault(identity, name)
    return logits


def _score(
    models: Models,
    logits: Mapping[str, np.ndarray],
    mirrored: Mapping[str, np.ndarray],
    labels: np.ndarray,
    settings: Evaluate,
    parts: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The test metrics of each method: means over seeds, standard deviations, and each seed's; the differences.

    parts: of test, bool [n], on which everything is scored, too, by the names of `subsets.read`.
    """
    temperatures = models.temperatures()
    by_name: dict[str, dict[str, Any]] = {}
    for name, values in logits.items():
        by_name[name] = {"test": scores(values, labels, settings, temperatures[name])}
        if name in mirrored:
            both = average_predictions(values, mirrored[name])
            by_name[name]["mirrored"] = scores(both, labels, settings)
        for part, chosen in parts.items():
            by_name[name][part] = scores(values[chosen], labels[chosen], settings, temperatures[name])
    metrics: dict[str, Any] = {"extract": by_name["extract"], "final": by_name["final"]}
    for method in models.seeded:
        seeds = {str(seed): by_name[f"{method}@{seed}"] for seed in models.seeds}
        metrics[method] = {"seeds": seeds}
        for kind in next(iter(seeds.values())):
            _add_means(metrics[method], kind, [each[kind] for each in seeds.values()])
    correct = {name: values.argmax(axis=1) == labels for name, values in logits.items()}
    for key, (first, second) in COMPARED.items():
        pair = [np.array([correct[f"{method}@{seed}"] for seed in models.seeds]) for method in (first, second)]
        metrics[key] = _compare(pair[0], pair[1], models.seeds)
        for part, chosen in parts.items():
            found = comparison.crossed_difference(pair[0][:, chosen], pair[1][:, chosen])
            metrics[key][part] = found | {"images": int(chosen.sum())}
    metrics["test_images"] = {"all": len(labels)} | {part: int(chosen.sum()) for part, chosen in parts.items()}
    return metrics


def _add_means(part: dict[str, Any], kind: str, rows: Sequence[Mapping[str, float]]) -> None:
    """Add the seeds' mean of each metric of a kind, such as test, and with several seeds its standard deviation."""
    part[kind], deviations = mean_and_deviation(rows)
    if deviations:
        part[f"{kind}_deviation"] = deviations


def _compare(first: np.ndarray, second: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
    """By how much `first` is more accurate than `second`, bool [seeds, images], over all seeds and for each one."""
    differences = {str(seed): comparison.difference(*pair) for seed, *pair in zip(seeds, first, second, strict=True)}
    discordance = float((first != second).mean())
    metrics: dict[str, Any] = comparison.crossed_difference(first, second)
    metrics |= {"discordance": discordance, "images": first.shape[1], "seeds": differences}
    if smallest := power.smallest_difference(first.shape[1], discordance):
        metrics["smallest_difference"] = smallest
    return metrics


def _by_method(models: Models, predicted: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The predictions of each method's seeds; extract has one."""
    return {"extract": [predicted["extract"]]} | {
        method: [predicted[f"{method}@{seed}"] for seed in models.seeds] for method in models.seeded
    }


def _write_evaluation(
    folder: Path,
    records: Records,
    models: Models,
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray,
    settings: Evaluate,
) -> None:
    """Write tables and pictures for the report; without labels of test only what needs none.

    labels: int [n], or [0].
    """
    names, released = records.class_names, classifier.load(models.final)
    (folder / "pictures").mkdir()
    shown = Gallery(records, folder / "pictures")
    found: dict[str, Any] = {"network": _describe(released, models.final), "mistakes": [], "confused": []}
    recall: dict[str, float] = {}
    if len(labels):
        temperatures, final = models.temperatures(), logits["final"]
        predicted, temperature = final.argmax(axis=1), temperatures["final"]
        by_class = list(tables.classes(predicted, labels, names))
        recall = {str(row[0]): float(row[3]) for row in by_class if row[1]}
        files.write_csv(folder / "classes.csv", tables.CLASSES, by_class)
        bins = tables.reliability(final, labels, temperature, settings.ece_bins)
        files.write_csv(folder / "reliability.csv", tables.RELIABILITY, bins)
        answered = (tables.coverage(name, each, labels, temperatures[name]) for name, each in logits.items())
        files.write_csv(folder / "coverage.csv", tables.COVERAGE, (row for rows in answered for row in rows))
        found["mistakes"] = gallery.mistakes(shown, records, released, final, labels, temperature)
        found["confused"] = gallery.confused(shown, records, predicted, labels)
        found["wrong"] = int((predicted != labels).sum())
    found["examples"] = gallery.examples(shown, records, gallery.classes_shown(names, recall))
    found["duplicates"] = gallery.duplicates(shown, records, records.folder / "dataset.json")
    files.write_json(folder / "shown.json", found)


def _describe(model: classifier.Classifier, folder: str) -> dict[str, Any]:
    """What the released network is and takes."""
    description = model.description
    _, layers = model.split(description.fine_tune_at)
    return {
        "backbone": description.backbone,
        "image_size": description.image_size,
        "fine_tune_at": description.fine_tune_at,
        "multiply_adds": description.multiply_adds,
        "parameters": model.network.count_params(),
        "trained_parameters": sum(math.prod(each.shape) for each in layers.trainable_variables),
        "bytes": Path(folder, classifier.WEIGHTS).stat().st_size,
    }


def _report(metrics: Mapping[str, Any]) -> None:
    for name in ("extract", *dict.fromkeys(method for pair in COMPARED.values() for method in reversed(pair)), "final"):
        deviation = metrics[name].get("test_deviation", {}).get("accuracy")
        spread = "" if deviation is None else f" (standard deviation over seeds {deviation:.4f})"
        console.log(f"evaluate: {name} test accuracy {metrics[name]['test']['accuracy']:.4f}{spread}")
    for key, (first, second) in COMPARED.items():
        found = metrics[key]
        if without := found.get(subsets.WITHOUT):
            console.log(
                f"evaluate: without test images that have near duplicates in train ({without['images']:,} left) "
                f"{first} minus {second} {100 * without['accuracy']:+.2f} points"
            )
        console.log(
            f"evaluate: {first} minus {second} {100 * found['accuracy']:+.2f} points, 95 % interval "
            f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f} over {found['covers']}, "
            "for this training set and this start"
        )


def _write_predictions(path: Path, records: Records, role: str, logits: Mapping[str, np.ndarray]) -> None:
    predicted = [values.argmax(axis=1) for values in logits.values()]
    rows = zip(records.names(role), records.labels(role), *predicted, strict=True)
    files.write_csv(path, ["name", "label", *logits], rows)
