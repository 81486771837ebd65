"""Choosing a backbone, and clearing away what backbones left behind that the list no longer names."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatmin.common import params, reporting
from flatmin.common.reporting import InputError

EXTRACT_FILES = ("models/extract/{}", "metrics/extract/{}.json", "plots/extract/{}.csv")


def choose(candidates: Mapping[str, Mapping[str, Any]], tolerance: float) -> str:
    """The name of the cheapest candidate whose val accuracy is at most `tolerance` (a fraction) below the best.

    Cheapest is fewest multiply-adds; of equals the more accurate, then the one that comes first.
    """
    best = max(metrics["val"]["accuracy"] for metrics in candidates.values())
    # Accuracies are fractions of a count: rounding must not part two that differ by the tolerance exactly.
    near = [name for name, metrics in candidates.items() if metrics["val"]["accuracy"] >= best - tolerance - 1e-9]
    return min(near, key=lambda name: (candidates[name]["multiply_adds"], -candidates[name]["val"]["accuracy"]))


def select(backbones: Sequence[str], tolerance: float) -> dict[str, Any]:
    """Copy the chosen backbone's classifier to models/selected; return the metrics. Reads the backbones named only."""
    candidates = {name: reporting.read_json(f"metrics/extract/{name}.json") for name in backbones}
    name = choose(candidates, tolerance)
    source = Path("models/extract") / name
    if not source.is_dir():
        raise InputError(f"{source}: expected the classifier that extract-train@{name} wrote, found none")
    with reporting.whole("models/selected") as aside:
        shutil.copytree(source, aside)
    chosen = candidates[name]
    return {
        "backbone": name,
        "best_val_accuracy": max(metrics["val"]["accuracy"] for metrics in candidates.values()),
        "multiply_adds": chosen["multiply_adds"],
        "val": {"accuracy": chosen["val"]["accuracy"]},
    }


def prune(backbones: Sequence[str], root: Path | str = ".") -> list[str]:
    """Delete models, metrics and plots of extract-train for backbones not in the list; return their names."""
    gone = set()
    for pattern in EXTRACT_FILES:
        folder, _, suffix = pattern.rpartition("/")
        suffix = suffix.removeprefix("{}")
        for path in (Path(root) / folder).glob(f"*{suffix}"):
            name = path.name.removesuffix(suffix)
            if name not in backbones and not name.startswith("."):
                gone.add(name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sorted(gone)


def _main() -> None:
    for name in prune(params.load().backbones):
        reporting.log(f"pruned: extract-train of {name}, which `backbones` no longer names")


if __name__ == "__main__":
    reporting.run(_main)
