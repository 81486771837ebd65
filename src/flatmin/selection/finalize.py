"""The finalize stage: release one classifier, chosen and calibrated on val alone."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.selection.calibration import fit_temperature, is_bound
from flatmin.selection.release import Trained, choose


@dataclass(frozen=True)
class Candidate:
    """A training's outputs: the classifier's folder, and its metrics.

    seed: None for extract, which has one training for all seeds.
    """

    seed: int | None
    model: str
    metrics: str


def finalize(
    candidates: Mapping[str, Sequence[Candidate]], tolerance: float, *, val: str, released: str
) -> dict[str, Any]:
    """Copy the released classifier, with its temperature; return the metrics of all methods on val.

    Args:
        candidates: by method, extract first, its trainings.
        tolerance: as in `release.choose`.
        val: the CSV file of val's labels.
        released: the folder to copy the classifier to.
    """
    labels = np.array([int(row["label"]) for row in files.read_csv(val)])
    methods: dict[str, list[Trained]] = {}
    temperatures: dict[str, list[float]] = {}
    stopped_early: dict[str, int] = {}
    for method, trainings in candidates.items():
        found = [files.read_json(training.metrics) for training in trainings]
        methods[method] = [
            Trained(training.seed, each["val"]["accuracy"], each["val"]["loss"], each["gradient_evaluations"])
            for training, each in zip(trainings, found, strict=True)
        ]
        temperatures[method] = [_temperature(Path(training.model), labels) for training in trainings]
        stopped_early[method] = sum(bool(each.get("stopped_early")) for each in found)
    method, index = choose(methods, tolerance)
    chosen, temperature = candidates[method][index], temperatures[method][index]
    with files.atomic_write(released) as temporary:
        shutil.copytree(chosen.model, temporary, ignore=shutil.ignore_patterns("val_logits.npy"))
        description = files.read_json(temporary / "model.json")
        files.write_json(temporary / "model.json", description | {"temperature": temperature})
    of_chosen = _values(methods[method][index], temperature)
    seed = {} if chosen.seed is None else {"seed": chosen.seed}
    metrics: dict[str, Any] = {"released": {"method": method, **seed, **of_chosen}}
    for name, trained in methods.items():
        metrics[name] = _describe(trained, temperatures[name]) | {"stopped_early": stopped_early[name]}
    for name, fitted in temperatures.items():
        if at_a_bound := [value for value in fitted if is_bound(value)]:
            console.log(
                f"finalize: {name}: a temperature of {at_a_bound[0]:.3g} is a bound of what is sought: val has too few "
                "errors, or none, to calibrate on"
            )
    console.log(
        f"finalize: {method}{'' if chosen.seed is None else f' of seed {chosen.seed}'}, temperature {temperature:.3f}, "
        f"val accuracy {of_chosen['val']['accuracy']:.4f} (optimistic, since val chose it)"
    )
    return metrics


def _temperature(model: Path, labels: np.ndarray) -> float:
    path = model / "val_logits.npy"
    try:
        logits = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        raise InputError(f"{path}: expected the logits that the training wrote, found none") from None
    if len(logits) != len(labels):
        raise InputError(f"{path}: expected logits of {len(labels)} val images, received {len(logits)}")
    return fit_temperature(logits, labels)


def _values(trained: Trained, temperature: float) -> dict[str, Any]:
    return {"temperature": temperature, "val": {"accuracy": trained.accuracy, "loss": trained.loss}}


def _describe(trained: Sequence[Trained], temperatures: Sequence[float]) -> dict[str, Any]:
    """A method's metrics: means over seeds, standard deviations with several of them, and each seed's."""
    accuracies, losses = [each.accuracy for each in trained], [each.loss for each in trained]
    metrics: dict[str, Any] = {
        "gradient_evaluations": statistics.fmean(each.gradient_evaluations for each in trained),
        "temperature": statistics.fmean(temperatures),
        "val": {"accuracy": statistics.fmean(accuracies), "loss": statistics.fmean(losses)},
    }
    if len(trained) > 1:
        metrics["val_deviation"] = {"accuracy": statistics.stdev(accuracies), "loss": statistics.stdev(losses)}
    seeds = {str(each.seed): _values(each, value) for each, value in zip(trained, temperatures, strict=True)}
    return metrics if trained[0].seed is None else metrics | {"seeds": seeds}
