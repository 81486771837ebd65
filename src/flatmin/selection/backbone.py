"""The select-best stage: choose a backbone by val accuracy and cost."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatmin.common import files
from flatmin.common.errors import InputError


def choose(candidates: Mapping[str, Mapping[str, Any]], tolerance: float) -> str:
    """The name of the cheapest candidate whose val accuracy is at most `tolerance` (a fraction) below the best.

    Cheapest is fewest multiply-adds; of equals the more accurate, then the first one.
    """
    best = max(metrics["val"]["accuracy"] for metrics in candidates.values())
    # Accuracies are fractions of a count: rounding must not separate two that differ by the tolerance exactly.
    near = [name for name, metrics in candidates.items() if metrics["val"]["accuracy"] >= best - tolerance - 1e-9]
    return min(near, key=lambda name: (candidates[name]["multiply_adds"], -candidates[name]["val"]["accuracy"]))


def select(backbones: Sequence[str], tolerance: float, *, models: str, metrics: str, selected: str) -> dict[str, Any]:
    """Copy the chosen backbone's classifier; return the metrics. Reads those of the named backbones only.

    Args:
        models, metrics: the folders that extract-train writes to. selected: the folder to copy the classifier to.
    """
    candidates = {name: files.read_json(f"{metrics}/{name}.json") for name in backbones}
    name = choose(candidates, tolerance)
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
        "best_val_accuracy": max(candidate["val"]["accuracy"] for candidate in candidates.values()),
        "gradient_evaluations": chosen["gradient_evaluations"],
        "multiply_adds": chosen["multiply_adds"],
        "val": chosen["val"],
    }
