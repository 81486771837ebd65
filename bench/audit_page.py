"""Fill the tables of docs/audit.md from bench/audit.json: for `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from blocks import fill, table

from flatmin.common import errors, files

HERE = Path(__file__).parent
NAMES = {"digits": "digits", "cifar100": "CIFAR-100"}
COUNTED = (
    ("near_duplicates", "train_test", "test images with a near duplicate in train"),
    ("near_duplicates", "val_test", "test images with one in val"),
    ("near_duplicates", "train_val", "val images with one in train"),
    ("near_duplicates", "test", "test images with another of test"),
    ("near_duplicates", "train", "train images with another of train"),
    ("contradictions", "train_val", "val images with one in train that has another label"),
    ("contradictions", "train", "train images with another of train that has another label"),
    ("suspects", "train", "label suspects of train"),
    ("suspects", "val", "label suspects of val"),
)


def found(results: dict[str, Any]) -> str:
    """What audit found in each data set, and how long it took without the forward pass."""
    runs = {name: results[name] for name in NAMES}
    rows = [[title, *(f"{run['found'][kind][key]:,}" for run in runs.values())] for kind, key, title in COUNTED]
    roles = ("train", "val", "test")
    rows.insert(2, ["test images with one in either", *(f"{run['leaked']:,}" for run in runs.values())])
    images = [", ".join(f"{run['images'][role]:,}" for role in roles) for run in runs.values()]
    took = [f"{run['seconds']:.0f}, {run['processor_seconds']:.0f}" for run in runs.values()]
    rows = [
        ["images of train, val, test", *images],
        *rows,
        ["seconds without the forward pass: elapsed, processor time", *took],
    ]
    return table(["", *(NAMES[name] for name in runs)], rows)


def copies(results: dict[str, Any]) -> str:
    made = {name: results["copies"][name]["found"] for name in NAMES}
    rows = [[change, *(f"{100 * each[change]:.1f} %" for each in made.values())] for change in made["digits"]]
    return table(["a test picture", *(NAMES[name] for name in made)], rows)


def planted(results: dict[str, Any]) -> str:
    rows = [
        [
            NAMES[name],
            f"{run['images']:,}",
            rule,
            f"{of['suspects']:,}",
            f"{of['precision']:.3f}",
            f"{of['recall']:.3f}",
        ]
        for name in NAMES
        for run in [results["planted"][name]]
        for rule, of in run["rules"].items()
    ]
    first = " and ".join(
        f"{results['planted'][name]['first']:.2f} ({NAMES[name]}, {results['planted'][name]['wrong']:,})"
        for name in NAMES
    )
    told = f"Precision of the first suspects, as many as labels were changed: {first}.\n"
    return table(["data", "images", "by", "suspects", "precision", "recall"], rows) + "\n" + told


def imbalance(results: dict[str, Any]) -> str:
    def cell(scores: list[float]) -> str:
        return f"{100 * fmean(scores):.1f} ({', '.join(f'{100 * one:.1f}' for one in scores)})"

    titles = {"nothing": "nothing balanced"} | {key: f"`{key}: balanced`" for key in ("class_weights", "sampling")}
    ways = results["imbalance"]["ways"]
    rows = [[title, *(cell(ways[name][key]) for key in COLUMNS)] for name, title in titles.items()]
    return table(["", *COLUMNS.values()], rows)


COLUMNS = {
    "rare": "recall of the rare digits, %",
    "frequent": "of the frequent ones, %",
    "accuracy": "test accuracy, %",
}


def main() -> None:
    results = files.read_json(HERE / "audit.json")
    blocks = {make.__name__: make(results) for make in (found, copies, planted, imbalance)}
    fill(HERE.parent / "docs/audit.md", blocks)


if __name__ == "__main__":
    errors.run(main)
