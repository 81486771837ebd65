"""The select-best stage: choose a backbone by val accuracy and cost."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.common.params import Metric, Select


def choose(candidates: Mapping[str, Mapping[str, Any]], tolerance: float, metric: Metric = "accuracy") -> str:
    """The name of the cheapest candidate whose metric on val is at most `tolerance` (a fraction) below the best.

    Cheapest is fewest multiply-adds; of equals the better, then the first one.
    """
    scores = {name: metrics["val"][metric] for name, metrics in candidates.items()}
    # Accuracies are fractions of a count: rounding must not separate two that differ by the tolerance exactly.
    near = [name for name, score in scores.items() if score >= max(scores.values()) - tolerance - 1e-9]
    return min(near, key=lambda name: (candidates[name]["multiply_adds"], -scores[name]))


def select(backbones: Sequence[str], settings: Select, *, models: str, metrics: str, selected: str) -> dict[str, Any]:
    """Copy the chosen backbone's classifier; return the metrics. Reads those of the named backbones only.

    Args:
        settings: the `select` section.
        models, metrics: the folders that extract-train writes to. selected: the folder to copy the classifier to.
    """
    candidates = {name: files.read_json(f"{metrics}/{name}.json") for name in backbones}
    name = choose(candidates, settings.tolerance, settings.metric)
    source = Path(models, name)
    if not source.is_dir():
        raise InputError(f"{source}: expected the classifier that extract-train@{name} wrote, received no such folder")
    with files.atomic_write(selected) as temporary:
        shutil.copytree(source, temporary)
    chosen = candidates[name]
    stopped_early = {"stopped_early": chosen["stopped_early"]} if "stopped_early" in chosen else {}
    return {
        "backbone": name,
        **stopped_early,
        f"best_val_{settings.metric}": max(candidate["val"][settings.metric] for candidate in candidates.values()),
        "gradient_evaluations": chosen["gradient_evaluations"],
        "multiply_adds": chosen["multiply_adds"],
        "val": chosen["val"],
    }
