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
from flatmin.common.params import Metric, loss_of
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


VAL = ("accuracy", "balanced_accuracy", "loss")  # the scores of each training in the metrics


def finalize(
    candidates: Mapping[str, Sequence[Candidate]], tolerance: float, metric: Metric, *, val: str, released: str
) -> dict[str, Any]:
    """Copy the released classifier, with its temperature; return the metrics of all methods on val.

    Args:
        candidates: by method, extract first, its trainings.
        tolerance: as in `release.choose`. metric: `select.metric`.
        val: the CSV file of val's labels.
        released: the folder to copy the classifier to.
    """
    labels = np.array([int(row["label"]) for row in files.read_csv(val)])
    found = {name: [files.read_json(each.metrics) for each in trainings] for name, trainings in candidates.items()}
    temperatures = {
        name: [_temperature(Path(each.model), labels) for each in trainings] for name, trainings in candidates.items()
    }
    methods = {
        name: [
            Trained(each.seed, one["val"][metric], one["val"][loss_of(metric)], one["gradient_evaluations"])
            for each, one in zip(trainings, found[name], strict=True)
        ]
        for name, trainings in candidates.items()
    }
    method, index = choose(methods, tolerance)
    chosen, temperature = candidates[method][index], temperatures[method][index]
    with files.atomic_write(released) as temporary:
        shutil.copytree(chosen.model, temporary, ignore=shutil.ignore_patterns("val_logits.npy"))
        description = files.read_json(temporary / "model.json")
        files.write_json(temporary / "model.json", description | {"temperature": temperature})
    of_chosen = _values(found[method][index], temperature)
    seed = {} if chosen.seed is None else {"seed": chosen.seed}
    metrics: dict[str, Any] = {"released": {"method": method, **seed, **of_chosen}}
    for name, trainings in candidates.items():
        metrics[name] = _describe([each.seed for each in trainings], found[name], temperatures[name])
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


def _values(trained: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    return {"temperature": temperature, "val": {key: trained["val"][key] for key in VAL}}


def _describe(
    seeds: Sequence[int | None], trained: Sequence[Mapping[str, Any]], temperatures: Sequence[float]
) -> dict[str, Any]:
    """A method's metrics: means over seeds, standard deviations with several of them, and each seed's.

    trained: the metrics of each seed's training.
    """
    scores = {key: [each["val"][key] for each in trained] for key in VAL}
    metrics: dict[str, Any] = {
        "gradient_evaluations": statistics.fmean(each["gradient_evaluations"] for each in trained),
        "stopped_early": sum(bool(each.get("stopped_early")) for each in trained),
        "temperature": statistics.fmean(temperatures),
        "val": {key: statistics.fmean(values) for key, values in scores.items()},
    }
    if len(trained) > 1:
        metrics["val_deviation"] = {key: statistics.stdev(values) for key, values in scores.items()}
    if None in seeds:
        return metrics
    each = zip(seeds, trained, temperatures, strict=True)
    return metrics | {"seeds": {str(seed): _values(one, temperature) for seed, one, temperature in each}}
