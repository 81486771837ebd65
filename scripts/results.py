"""Collect a study's experiments in its results.json, and write the tables and the picture of its page from that.

    python scripts/results.py studies/cifar100

results.json keeps every run that a grid's table ever had as succeeded, and the one of `make study`. What stands between
the two comment lines of README.md is written anew, and accuracy.png.

An experiment with `sam.epochs` that reached evaluate compares two of the four methods: finetune for twice the epochs of
sam-finetune with it, at equal gradient evaluations; or finetune with a cheaper SAM for the same epochs. Experiments of
the same data and of several seeds make a table. One without `sam.epochs` is the study's recipe, with another seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats
import yaml
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from sweep import DATA, leaves, read_kept
from sweep import FIGURES as FILES

from flatmin import reporting

BEGIN, END = "<!-- from results.json, by scripts/results.py -->\n", "<!-- end -->\n"
METHODS = {  # with its gradient evaluations an image and epoch of the first
    "finetune": ("finetune", "1"),
    "twice": ("finetune, twice the epochs", "2"),
    "sam": ("sam-finetune", "2"),
    "every": ("sam-finetune, `every: 5`", "1.2"),
}
COLUMNS = 3  # of the picture's panels
FIGURES = {
    "test accuracy": "test.accuracy",
    "ECE": "test.ece",
    "gradient rise": "sharpness.gradient_rise",
    "largest eigenvalue": "sharpness.eigenvalue_1",
}
Run = Mapping[str, Any]
Group = tuple[Any, ...]


def collect(folder: Path) -> list[Run]:
    """The runs of results.json with those of the grids' tables that succeeded, by name."""
    path = folder / "results.json"
    runs = {run["name"]: run for run in (reporting.read_json(path)["runs"] if path.exists() else [])}
    for grid in sorted(folder.glob("*.yaml")):
        for name, row in read_kept(grid.with_suffix(".csv")).items():
            runs[name] = {key: _value(cell) for key, cell in row.items() if cell != "" and key != "status"}
    if (folder / "metrics/evaluate.json").exists():
        name, given = study(folder / "dvc.lock")
        runs[name] = {"name": name, "targets": "evaluate", **given}
        for file in FILES.values():
            metrics = reporting.read_json(folder / f"metrics/{file}.json")
            runs[name] |= {f"{file}/{key}": value for key, value in leaves(metrics)}
    reporting.write_json(path, {"runs": list(runs.values())})
    return reporting.read_json(path)["runs"]  # as everybody else reads them: their keys are in order


def study(lock: Path) -> tuple[str, dict[str, Any]]:
    """A name and the params of what `make study` ran last: another recipe has another name."""
    given: dict[str, Any] = {}
    for stage in yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"].values():
        given |= leaves(stage.get("params", {}).get("params.yaml", {}))
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode())
    return f"study-{digest.hexdigest()[:8]}", given


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def recipe(runs: Sequence[Run]) -> str:
    """What each stage of the study's own params gave, a row for each seed; nothing before `make study`."""
    found = [run for run in runs if _is_evaluated(run) and "sam.epochs" not in run]
    if not found:
        return ""
    lines = ["| recipe | seed | stage | val accuracy | test accuracy | test top-5 | ECE | with mirror images |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    found.sort(key=lambda run: (run["finetune/image_size"], run["finetune/epochs"], run["seed"]))
    for run in found:
        for stage, file in {"extract": "select", "finetune": "finetune", "sam": "sam"}.items():
            figures = [f"{run[f'evaluate/{stage}.test.{key}']:.4f}" for key in ("accuracy", "top5_accuracy", "ece")]
            mirrored = run.get(f"evaluate/{stage}.mirrored.accuracy")
            figures = [f"{run[f'{file}/val.accuracy']:.4f}", *figures, f"{mirrored:.4f}" if mirrored else ""]
            lines.append(f"| {_recipe_of(run)} | {run['seed']} | {stage} | {' | '.join(figures)} |")
    for run in found:
        points = [100 * run[f"evaluate/sam_minus_finetune.{end}"] for end in ("accuracy", "low", "high")]
        text = "- {}, seed {}: sam less finetune {:+.2f} points, over images [{:+.2f}, {:+.2f}], p {:.2g}."
        p_value = run["evaluate/sam_minus_finetune.p_value"]
        lines += ["", text.format(_recipe_of(run), run["seed"], *points, p_value)]
    return "### The recipe, on the official validation images\n\n" + "\n".join(lines) + "\n"


def _recipe_of(run: Run) -> str:
    return f"{run['finetune/backbone']}, {run['finetune/image_size']} px, {run['finetune/epochs']} epochs"


def _is_evaluated(run: Run) -> bool:
    return "evaluate/sam.test.accuracy" in run


def methods(runs: Sequence[Run]) -> dict[Group, dict[str, dict[Any, Run]]]:
    """DATA -> method -> seed -> its figures, of the runs that were evaluated."""
    found: dict[Group, dict[str, dict[Any, Run]]] = {}
    for run in runs:
        if not _is_evaluated(run) or "sam.epochs" not in run:
            continue
        cheaper = run.get("sam.every", 1) > 1
        group = found.setdefault(tuple(run.get(key) for key in DATA), {})
        for method, role in (
            (("every", "sam"), ("finetune", "finetune")) if cheaper else (("sam", "sam"), ("twice", "finetune"))
        ):
            figures = {title: run[f"evaluate/{role}.{key}"] for title, key in FIGURES.items()}
            images = {end: run[f"evaluate/sam_minus_finetune.{end}"] for end in ("accuracy", "low", "high")}
            group.setdefault(method, {})[run["seed"]] = figures | {"over images": images}
    return found


def title(group: Group) -> str:
    name, per_class, noise, ema = group
    images = f"{per_class} training images a class" if per_class else "all training images"
    wrong = f", {100 * noise:g} % of their labels wrong" if noise else ""
    averages = f", EMA {ema:g}" if ema else ""
    return f"{name.rpartition('/')[2]}, {images}{wrong}{averages}"


def paired(first: Mapping[Any, Run], second: Mapping[Any, Run]) -> str:
    """The difference of test accuracies over the seeds that both have, in points, with its 95 % interval (t)."""
    seeds = sorted(first.keys() & second.keys())
    points = [100 * (first[seed]["test accuracy"] - second[seed]["test accuracy"]) for seed in seeds]
    mean = statistics.mean(points)
    if len(points) < 2:
        return f"{mean:+.2f}"
    half = scipy.stats.t.ppf(0.975, len(points) - 1) * statistics.stdev(points) / len(points) ** 0.5
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def table(group: Mapping[str, Mapping[Any, Run]]) -> str:
    """A row for each method; then SAM beside finetune of twice the epochs, seed by seed, over images."""
    lines = [
        f"| method | gradients | seeds | {' | '.join(FIGURES)} | less finetune, points | less twice the epochs |",
        f"|{'---|' * (5 + len(FIGURES))}",
    ]
    for method, (name, gradients) in METHODS.items():
        seeds = group.get(method)
        if not seeds:
            continue
        cells = [_spread([run[figure] for run in seeds.values()]) for figure in FIGURES]
        for other in ("finetune", "twice"):
            cells.append(paired(seeds, group[other]) if other != method and group.get(other) else "")
        lines.append(f"| {name} | {gradients} | {len(seeds)} | {' | '.join(cells)} |")
    for seed, run in sorted(group.get("sam", {}).items()):
        ends = {end: 100 * value for end, value in run["over images"].items()}
        lines += [""] if seed == min(group["sam"]) else []
        lines.append(
            f"- Seed {seed}: sam-finetune less finetune of twice the epochs {ends['accuracy']:+.2f} points, over "
            f"images [{ends['low']:+.2f}, {ends['high']:+.2f}]."
        )
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    digits = 4 if max(values) < 1 else 1
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def trials(runs: Sequence[Run]) -> str:
    """The runs that were not evaluated, by val accuracy; a table for each data, network and size of images."""
    groups: dict[str, list[Run]] = {}
    for run in sorted((run for run in runs if not _is_evaluated(run)), key=lambda run: -_val(run)):
        size = run.get("sam/image_size") or run.get("finetune/image_size")
        network = f"{run['select/backbone']}{f' at {size} px' if size else ''}"
        data = title(tuple(run.get(key) for key in DATA))
        groups.setdefault(f"#### {network}; {data}", []).append(run)
    return "\n".join(f"{name}\n\n{_trials_alike(alike)}" for name, alike in groups.items())


def _trials_alike(runs: Sequence[Run]) -> str:
    """A row for each, with the params that differ among them."""
    lines = ["| run | seed | val accuracy | minutes |", "|---|---|---|---|"]
    keys = list(dict.fromkeys(key for run in runs for key in run))
    told = [key for key in keys if _is_told(key, runs)]
    for run in runs:
        own = [key for key in told if key in run and (run["targets"] != "finetune" or not key.startswith("sam."))]
        values = ", ".join(f"`{key}: {_shown(run[key])}`" for key in own)
        what = f"{run['targets']}: {values}" if values else run["targets"]
        lines.append(f"| {what} | {run['seed']} | {_val(run):.4f} | {float(run['seconds']) / 60:.0f} |")
    return "\n".join(lines) + "\n"


def _is_told(key: str, runs: Sequence[Run]) -> bool:
    """Whether a param has several values in these runs, or there is one run alone."""
    if key in ("name", "targets", "seed", "seconds", "data.splits", *DATA) or "/" in key:
        return False
    return len(runs) == 1 or len({_shown(run.get(key)) for run in runs}) > 1


def _val(run: Run) -> float:
    """Of the last stage that was run."""
    stages = [stage for stage in ("sam", "finetune", "select") if f"{stage}/val.accuracy" in run]
    return float(run[f"{stages[0]}/val.accuracy"])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def section(runs: Sequence[Run]) -> str:
    """All that stands between the page's two comment lines."""
    parts = [f"### {title(group)}\n\n{table(found)}" for group, found in methods(runs).items()]
    hours = sum(float(run.get("seconds", 0)) for run in runs) / 3600
    took = f"{len(runs)} runs; those of grids took {hours:.1f} hours in all.\n"
    trials_of_it = f"### Trials, chosen among by val\n\n{trials(runs)}"
    return "\n".join([*filter(None, [recipe(runs)]), *parts, trials_of_it, took])


def draw(runs: Sequence[Run], path: Path) -> None:
    """Test accuracy by method: each seed a dot, their mean a bar; a panel for each data."""
    groups = list(methods(runs).items())
    columns = min(COLUMNS, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), dpi=100, layout="constrained")
    for index, (group, found) in enumerate(groups):
        axis = figure.add_subplot(rows, columns, index + 1)
        for place, method in enumerate(each for each in METHODS if each in found):
            values = [run["test accuracy"] for run in found[method].values()]
            axis.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.6)
            axis.plot([place - 0.3, place + 0.3], [statistics.mean(values)] * 2, color=f"C{place}", linewidth=2)
        names = [METHODS[method][0].replace("`", "").replace(", ", ",\n") for method in METHODS if method in found]
        axis.set_xticks(range(len(names)), names, fontsize=7)
        axis.set_title(title(group).replace(", ", ",\n"), fontsize=9)
        axis.set_ylabel("test accuracy" if index % columns == 0 else "")
        axis.grid(axis="y", alpha=0.3)
    with reporting.whole(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})


def write(folder: Path) -> None:
    """Everything of a study's folder that comes from its runs."""
    if not (folder / "sweep.csv").is_file():
        raise reporting.InputError(f"{folder}/sweep.csv: expected the table of `make study-sweep`, found none")
    runs = collect(folder)
    page = folder / "README.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise reporting.InputError(f"{page}: expected the lines {BEGIN.strip()} and {END.strip()} once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with reporting.whole(page) as aside:
        aside.write_text(f"{before}{BEGIN}\n{section(runs)}\n{END}{after}", encoding="utf-8")
    if methods(runs):
        draw(runs, folder / "accuracy.png")
    reporting.log(f"{len(runs)} runs: {folder}/results.json, README.md")


def _main() -> None:
    parser = argparse.ArgumentParser(description="write a study's tables from its experiments")
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    reporting.run(_main)
