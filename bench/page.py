"""Draw docs/speed.png and write the table of docs/speed.md, both from bench/results.json.

The table stands between the page's two comment lines; the rest of the page is left as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from repro import table
from speed import EPOCHS, TIMED, seconds, speedup

from flatmin.common import errors, files

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/speed.md"
CHART = PAGE.with_suffix(".png")
BEGIN, END = "<!-- from bench/results.json, by bench/page.py -->\n", "<!-- end -->\n"
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


def timed(results: dict[str, Any], side: str, stage: str) -> tuple[float, int, float]:
    """The seconds of the stage's epochs, how many epochs were measured, the seconds of importing."""
    run = results["runs"][f"{side} {stage} {TIMED}"]
    return seconds(run, EPOCHS[stage]), len(run["epoch_seconds"]), run["import_seconds"]


def rows(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """ROWS without PyTorch where it was not installed."""
    return [row for row in ROWS if row[1] != "torch" or f"torch {row[0]} {TIMED}" in results["runs"]]


def times(results: dict[str, Any]) -> str:
    """The first table: both sides of each comparison."""
    lines = [
        "| stage | pipeline | seconds | Flatmin | seconds | faster by | epochs measured | importing, both |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage, side, own in rows(results):
        theirs, measured, imports = timed(results, side, stage)
        ours, _, our_imports = timed(results, own, stage)
        factor = speedup(results["runs"], stage, side, own)
        lines.append(
            f"| {stage}, {EPOCHS[stage]} epochs | {NAMES[side]} | {theirs:.0f} | {NAMES[own]} | {ours:.0f} "
            f"| {factor:.1f} | {measured} of {EPOCHS[stage]} | {imports:.1f}, {our_imports:.1f} s |"
        )
    return "\n".join(lines) + "\n"


def accuracy(title: str, found: dict[str, Any] | None) -> str:
    return (
        f"| {title} | {found['mean']:+.2f} points, standard error "
        f"{found['standard_error']:.2f}, {found['seeds']} seeds |"
        if found
        else f"| {title} | not measured |"
    )


def metrics(results: dict[str, Any]) -> str:
    """The second table: accuracies, rates and ratios."""
    rates = results["augment_images_per_second"]
    lines = [
        "| | |",
        "|---|---|",
        *(
            accuracy(f"{stage}'s val accuracy, `matmul: half`, less {whose}", found)
            for stage in EPOCHS
            for whose, found in (
                ("the original pipeline's in float32", results[f"{stage}_accuracy_difference"]),
                ("the same in float32", results["half_accuracy_differences"][stage]),
            )
        ),
        f"| the frozen layers in LiteRT, TensorFlow = 1 | {results['litert_speedup']:.2f} |",
        f"| the same with `matmul: half` | {results['litert_half_speedup']:.2f} |",
        *(f"| images a second augmented by {count} processes | {rate:.0f} |" for count, rate in sorted(rates.items())),
        f"| peak memory of extract with four times the images, 1 = with one | {results['peak_memory_growth']:.2f} |",
        f"| `dvc repro` with nothing to do | {results['repro_noop_seconds']:.1f} s |",
        f"| a SAM step, plain = 1 | {results['sam_step_ratio']:.2f} |",
        f"| the same with `every: 5` | {results['sam_every_5_step_ratio']:.2f} |",
    ]
    return "\n".join(lines) + "\n"


def profiles(results: dict[str, Any]) -> str:
    """The last tables: the seconds of the default study by stage, now and before."""
    titles = {"profile": "`dvc repro` of the default study:", "profile_before": "Before tf.data's tuning was off:"}
    return "\n".join(f"{title}\n\n{table(results[key])}" for key, title in titles.items() if key in results)


def section(results: dict[str, Any]) -> str:
    """Return everything between the page's two comment lines."""
    plan = results["plan"]
    said = (
        f"{' '.join(results['machine'])}: {plan['train']:,} train and {plan['val']:,} val images of {results['data']}, "
        f"EfficientNetLite0 at 128 pixels, batches of 128, RandAugment (n 3, m 7) and flips, four views. "
        f"Accuracies are of {plan['compared']:,} train and {plan['compared_val']:,} val images.\n"
    )
    return "\n".join([said, times(results), metrics(results), profiles(results)])


def draw(results: dict[str, Any]) -> None:
    """Bars: the seconds of each stage on both sides."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    runs = dict.fromkeys((stage, name) for stage, side, own in rows(results) for name in (side, own))
    bars = {}
    for stage, name in sorted(runs):
        whose = "Flatmin, " if name.startswith("flatmin") else ""
        bars[f"{stage}\n{whose}{NAMES[name].replace('`', '')}"] = timed(results, name, stage)[0]
    drawn = axes.barh(list(bars), list(bars.values()), color=["C1" if "Flatmin" in name else "C0" for name in bars])
    axes.bar_label(drawn, fmt="%.0f", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds for {EPOCHS['extract']} epochs of extract, {EPOCHS['finetune']} of finetune")
    axes.spines[["top", "right"]].set_visible(False)
    with files.atomic_write(CHART) as aside:
        figure.savefig(aside, format="png", dpi=120, metadata={"Software": None})


def main() -> None:
    """Write the page's tables and the chart."""
    results = files.read_json(HERE / "results.json")
    if not results.get("is_complete"):
        raise errors.InputError("bench/results.json: expected a whole bench, received a part; `make bench` resumes it")
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    with files.atomic_write(PAGE) as aside:
        aside.write_text(f"{before}{BEGIN}\n{section(results)}\n{END}{after}", encoding="utf-8")
    draw(results)


if __name__ == "__main__":
    errors.run(main)
