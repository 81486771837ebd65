"""Fill the tables of docs/speed.md, docs/sizing.md and docs/audit.md from bench/*.json: for `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from speed import EPOCHS, TIMED, seconds, speedup

from flatmin.common import errors, files
from flatmin.common.params_errors import read_yaml

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
from blocks import fill, table

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
# A stage, a pipeline, and the run of Flatmin to compare it with.
ROWS = (
    ("extract", "original", "flatmin"),
    ("extract", "keras", "flatmin"),
    ("extract", "torch", "flatmin"),
    ("extract", "original", "flatmin-float32"),
    ("extract", "original-half", "flatmin"),
    ("finetune", "original", "flatmin"),
    ("finetune", "original", "flatmin-float32"),
    ("finetune", "original-half", "flatmin"),
)
NAMES = {
    "original": "original",
    "original-half": "original, `matmul: half`",
    "keras": "Keras' guide",
    "torch": "PyTorch",
    "flatmin": "`matmul: half`",
    "flatmin-float32": "float32",
}
AUDITED = {"digits": "digits", "cifar100": "CIFAR-100"}
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
COLUMNS = {
    "rare": "recall of the rare digits, %",
    "frequent": "of the frequent ones, %",
    "accuracy": "test accuracy, %",
}
VIEWS, VAL, LIMIT = 4, 0.2, 50e9  # of the example of disk space: augmented views, val for each train image, bytes


def rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """ROWS without PyTorch where it was not installed."""
    return [row for row in ROWS if row[1] != "torch" or f"torch {row[0]} {TIMED}" in results["runs"]]


def times(results: dict[str, Any]) -> str:
    """Both sides of each comparison, with what it was measured on."""
    plan, lines = results["plan"], []
    for stage, side, own in rows(results):
        theirs, ours = (results["runs"][f"{name} {stage} {TIMED}"] for name in (side, own))
        epochs = EPOCHS[stage]
        lines.append(
            (
                f"{stage}, {epochs} epochs",
                NAMES[side],
                f"{seconds(theirs, epochs):.0f}",
                NAMES[own],
                f"{seconds(ours, epochs):.0f}",
                f"{speedup(results['runs'], stage, side, own):.1f}",
                f"{len(theirs['epoch_seconds'])} of {epochs}",
                f"{theirs['import_seconds']:.1f}, {ours['import_seconds']:.1f} s",
            )
        )
    columns = ("stage", "pipeline", "seconds", "Flatmin", "seconds", "faster by", "epochs measured", "importing, both")
    about = (
        f"{' '.join(results['machine'])}: {plan['train']:,} train and {plan['val']:,} val images of {results['data']}, "
        f"EfficientNetLite0 at 128 pixels, batches of 128, RandAugment (n 3, m 7) and flips, four views. "
        f"Accuracies are of {plan['compared']:,} train and {plan['compared_val']:,} val images.\n"
    )
    return f"{about}\n{table(columns, lines)}"


def ratios(results: dict[str, Any]) -> str:
    """Differences in accuracy, and ratios."""

    def points(found: dict[str, Any] | None) -> str:
        if found is None:
            return "not measured"
        return f"{found['mean']:+.2f} points, standard error {found['standard_error']:.2f}, {found['seeds']} seeds"

    lines = []
    for stage in EPOCHS:
        lines += [
            (
                f"{stage}'s val accuracy, `matmul: half`, less the original pipeline's in float32",
                points(results[f"{stage}_accuracy_difference"]),
            ),
            (
                f"{stage}'s val accuracy, `matmul: half`, less the same in float32",
                points(results["half_accuracy_differences"][stage]),
            ),
        ]
    ratio = {
        "the frozen layers in LiteRT, TensorFlow = 1": "litert_speedup",
        "the same with `matmul: half`": "litert_half_speedup",
        "peak memory of extract with four times the images, 1 = with one": "peak_memory_growth",
        "time of a SAM step, plain = 1": "sam_step_ratio",
        "the same with `every: 5`": "sam_every_5_step_ratio",
    }
    lines += [(title, f"{results[key]:.2f}") for title, key in ratio.items()]
    return table(("", ""), lines)


def stages(sizes: dict[str, Any]) -> str:
    """Seconds, memory and disk of each stage of the studies measured, in the pipeline's order."""
    pipeline = read_yaml(HERE.parent / "dvc.yaml")["stages"]
    measured = [study["stages"] for study in sizes["studies"]]
    lines = []
    for stage in (stage for stage in pipeline if any(stage in study for study in measured)):
        found = [study.get(stage) for study in measured]
        cells = (
            f"{of['seconds']:.0f} s, {_megabytes(of['memory'])}, {_megabytes(of['disk'])}" if of else "" for of in found
        )
        lines.append((stage, *cells))
    columns = ("stage: time, memory, disk", *(study["title"] for study in sizes["studies"]))
    return f"{sizes['about']} {', '.join(sizes['machine'])}.\n\n{table(columns, lines)}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def views(sizes: dict[str, Any]) -> str:
    """Bytes of one image's cached activations, and how many images fit."""
    lines = []
    for name, found in sizes["views"].items():
        fitting = LIMIT / (found["224"]["bytes"] * (VIEWS + VAL))
        bytes_of_view = (f"{found[side]['bytes']:,}" for side in ("160", "224"))
        lines.append(
            (name, f"`{found['224']['split']}`", f"{found['224']['pooled_bytes']:,}", *bytes_of_view, f"{fitting:,.0f}")
        )
    columns = ("backbone", "split of finetune", "extract", "finetune, 160 px", "finetune, 224 px", "images in 50 GB")
    return table(columns, lines)


def found(results: dict[str, Any]) -> str:
    """What audit found in each data set, and how long it took without the forward pass."""
    runs = {name: results[name] for name in AUDITED}
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
    return table(["", *(AUDITED[name] for name in runs)], rows)


def copies(results: dict[str, Any]) -> str:
    made = {name: results["copies"][name]["found"] for name in AUDITED}
    rows = [[change, *(f"{100 * each[change]:.1f} %" for each in made.values())] for change in made["digits"]]
    return table(["a test image", *(AUDITED[name] for name in made)], rows)


def planted(results: dict[str, Any]) -> str:
    rows = [
        [
            AUDITED[name],
            f"{run['images']:,}",
            rule,
            f"{of['suspects']:,}",
            f"{of['precision']:.3f}",
            f"{of['recall']:.3f}",
        ]
        for name in AUDITED
        for run in [results["planted"][name]]
        for rule, of in run["rules"].items()
    ]
    first = " and ".join(
        f"{results['planted'][name]['first']:.2f} ({AUDITED[name]}, {results['planted'][name]['wrong']:,})"
        for name in AUDITED
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


def main() -> None:
    results, sizes, audit = (files.read_json(HERE / f"{name}.json") for name in ("results", "sizes", "audit"))
    if not results.get("is_complete"):
        raise errors.InputError("bench/results.json: expected a whole bench, received a part; `make bench` resumes it")
    fill(DOCS / "speed.md", {"times": times(results), "ratios": ratios(results)})
    fill(DOCS / "sizing.md", {"stages": stages(sizes), "views": views(sizes)})
    fill(DOCS / "audit.md", {make.__name__: make(audit) for make in (found, copies, planted, imbalance)})


if __name__ == "__main__":
    errors.run(main)
