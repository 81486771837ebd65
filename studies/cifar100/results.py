"""Write what comes from this study's records: results.json, accuracy.png and the tables of README.md and notes.md.

    PYTHONPATH=src python studies/cifar100/results.py

The records, grids/*.csv and version-1/, are of results version 1, with one `seed` for everything and no stage control.
A run that reached evaluate and sets `sam.epochs` is a control: it compares two of four methods. With as many epochs of
finetune it has SAM in every fifth step; with twice as many it has SAM in every step, at equal gradient evaluations. A
run that reached evaluate without `sam.epochs` is a recipe. All others are trials, which no test image was used for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scipy.stats
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from blocks import fill, table
from runs_table import ORIGIN, UNKNOWN, read_table

from flatmin.common import console, errors, files
from flatmin.common.errors import InputError
from flatmin.common.params_errors import read_yaml

Run = Mapping[str, Any]
METHODS = ("finetune", "finetune, 2x epochs", "SAM", "SAM, every 5th step")
PLAIN, TWICE, SAM, CHEAPER = METHODS
ACCURACY = "test accuracy"
METRICS = {  # title -> metric of evaluate, and its decimals
    ACCURACY: ("test.accuracy", 4),
    "ECE": ("test.ece", 4),
    "gradient rise": ("sharpness.gradient_rise", 3),
    "adaptive rise": ("sharpness.adaptive_rise", 3),
    "largest eigenvalue": ("sharpness.eigenvalue_1", 1),
}
PAIR = ("accuracy", "low", "high")  # SAM minus finetune of the same run: the difference, and its interval over images
STAGES = (("extract", "select"), ("finetune", "finetune"), ("sam", "sam"))  # of a recipe, and their files in metrics/
EARLIER = ("earlier", "removed")  # tables of settings that were given up, and of params that the schema no longer has
FROZEN = "frozen"  # a grid whose runs fine-tune for one epoch only because evaluate needs all three classifiers
TEXT = ("name", "targets", "commit", "lock", "machine", "records")  # digits in these are not a number
# What differs between the methods and seeds of a setting, or does not affect the results.
VARIED = ("name", "targets", "seed", "finetune.epochs", "sam.epochs", "sam.every", "sam.method", "seconds", "grid")
# `make study` does not record where its results come from. This is what is known of its run.
STUDY = {"commit": "31d7322", "dirty": False, "machine": "Intel Xeon with AMX", "cores": 2, "results_version": 1}
PANELS = 3  # of the picture, side by side


class Setting(NamedTuple):
    """What the controls of one comparison have in common."""

    grid: str
    data: str
    backbone: str
    image_size: int
    epochs: int
    ema: float | None
    rho: float
    others: str  # all other params, as JSON

    @property
    def recipe(self) -> str:
        ema = f", EMA {self.ema:g}" if self.ema else ""
        return f"{self.backbone}, {self.image_size} px, {self.epochs} epochs of SAM{ema}, rho {self.rho:g}"


Controls = dict[Setting, dict[str, dict[int, Run]]]  # method -> seed -> its metrics, by METRICS' titles, and `pair`


def collect(folder: Path) -> list[Run]:
    """The successful runs of all tables of the grids, and the run of `make study`.

    Raises:
        InputError: two tables have a run of one name, or a run is not of results version 1.
    """
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("grids/*.csv")):
        for name, row in read_table(path).items():
            cells = {key: cell if key in TEXT else _value(cell) for key, cell in row.items() if cell}
            run = {key: cell for key, cell in cells.items() if key != "status"} | {"grid": path.stem}
            if name in runs:
                raise InputError(f"{name}: expected it in one table, received two: {runs[name]['grid']}, {path.stem}")
            runs[name] = run
    run = study(folder / "version-1")
    runs[run["name"]] = run
    for name, run in runs.items():
        if run.get("results_version") != 1:
            raise InputError(f"{name}: expected results version 1, received {run.get('results_version', UNKNOWN)}")
    return list(runs.values())


def study(folder: Path) -> dict[str, Any]:
    """What `make study` ran. Its name has a digest of the params."""
    sections = dict[str, Any]()
    for stage in read_yaml(folder / "dvc.lock")["stages"].values():
        sections |= stage.get("params", {}).get("params.yaml", {})
    name = f"study-{hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:8]}"
    run = {"name": name, "targets": "evaluate", "grid": "params", **dict(files.leaves(sections))}
    for file in ("select", "finetune", "sam", "evaluate"):
        run |= {f"{file}/{key}": value for key, value in files.leaves(files.read_json(folder / f"metrics/{file}.json"))}
    records = files.read_json(folder / "metrics/prepare.json")["digest"][:12]
    return run | dict.fromkeys(ORIGIN, UNKNOWN) | STUDY | {"records": records}


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def data_title(run: Run) -> str:
    few, noise = run.get("data.train_per_class"), run.get("data.label_noise")
    images = f"{few} training images per class" if few else "all training images"
    wrong = f", {100 * noise:g} % of their labels wrong" if noise else ""
    return f"{run['data.name'].rpartition('/')[2]}, {images}{wrong}"


def is_evaluated(run: Run) -> bool:
    return "evaluate/sam.test.accuracy" in run


def controls(runs: Sequence[Run]) -> Controls:
    """The controls by setting: present grids first, then the study's own data, few images, and few wrong labels.

    Raises:
        InputError: two runs give different metrics for one seed of a method.
    """
    grouped: Controls = {}
    places: dict[Setting, tuple[Any, ...]] = {}
    for run in runs:
        if not is_evaluated(run) or "sam.epochs" not in run:
            continue
        others = {key: run[key] for key in sorted(run) if key not in (*VARIED, *ORIGIN) and "/" not in key}
        network = (run["finetune/backbone"], run["finetune/image_size"], run["sam.epochs"])
        recipe = (run.get("finetune.ema"), run["sam.rho"], json.dumps(others))
        setting = Setting(run["grid"], data_title(run), *network, *recipe)
        few = run.get("data.train_per_class") or math.inf
        own = (run.get("data.label_noise") or 0, setting.ema or 0, setting.rho, setting.others)
        places[setting] = (run["grid"] in EARLIER, run["grid"] != "sweep", run["data.name"], few, *own)
        for role, method in _methods(run).items():
            metrics = {title: run[f"evaluate/{role}.{key}"] for title, (key, _) in METRICS.items()}
            per_epoch = run["finetune/gradient_evaluations"] / run["finetune/epochs"]
            metrics["gradients"] = run[f"{role}/gradient_evaluations"] / per_epoch / run["sam.epochs"]
            metrics["pair"] = {end: 100 * run[f"evaluate/sam_minus_finetune.{end}"] for end in PAIR}
            seeds = grouped.setdefault(setting, {}).setdefault(method, {})
            if seeds.setdefault(run["seed"], metrics) != metrics:
                expected = f"expected one run of seed {run['seed']}"
                raise InputError(f"{run['name']}: {expected}, received two of {setting.recipe}")
    return dict(sorted(grouped.items(), key=lambda item: places[item[0]]))


def _methods(run: Run) -> dict[str, str]:
    """The method that each of a control's two trained stages is."""
    for key in ("finetune.epochs", "sam.every", "sam.rho"):
        if key not in run:
            raise InputError(f"{run['name']}: {key}: expected the grid to set it, as it sets sam.epochs; received none")
    match run["finetune.epochs"] / run["sam.epochs"], run["sam.every"], run.get("sam.method", "sam"):
        case 2, 1, "sam":
            return {"finetune": TWICE, "sam": SAM}
        case 1, 5, "sam":
            return {"finetune": PLAIN, "sam": CHEAPER}
    raise InputError(
        f"{run['name']}: expected SAM with finetune of twice its epochs, or in every fifth step with as many epochs, "
        f"received sam.epochs {run['sam.epochs']}, finetune.epochs {run['finetune.epochs']}, "
        f"sam.every {run['sam.every']}"
    )


def difference(first: Mapping[int, Run], second: Mapping[int, Run]) -> str:
    """Of test accuracies in points, over the seeds that both have, with a 95 % interval (t); empty without seeds."""
    points = [100 * (first[seed][ACCURACY] - second[seed][ACCURACY]) for seed in first.keys() & second.keys()]
    if not points:
        return ""
    mean = statistics.mean(points)
    if len(points) == 1:
        return f"{mean:+.2f}"
    half = scipy.stats.t.ppf(0.975, len(points) - 1) * statistics.stdev(points) / len(points) ** 0.5
    return interval({"accuracy": mean, "low": mean - half, "high": mean + half})


def interval(points: Mapping[str, float]) -> str:
    return f"{points['accuracy']:+.2f} [{points['low']:+.2f}, {points['high']:+.2f}]"


def spread(values: Sequence[float], decimals: int) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{deviation}"


def summary(grouped: Controls) -> str:
    """A row for each setting of the present grids: what SAM gains, and accuracies. The notes have every method."""
    gains, shown = ((SAM, TWICE), (SAM, PLAIN)), (PLAIN, TWICE, SAM)
    rows = []
    for setting, methods in grouped.items():
        if setting.grid not in EARLIER:
            seeds = {method: methods.get(method, {}) for method in shown}
            values = ([run[ACCURACY] for run in each.values()] for each in seeds.values())
            accuracies = [spread(each, 4) if each else "" for each in values]
            differences = (difference(seeds[one], seeds[other]) for one, other in gains)
            settings = f"{setting.epochs}, {setting.rho:g}, {max(map(len, seeds.values()))}"
            rows.append((setting.data, *differences, *accuracies, settings))
    columns = ("data", *(f"{one} - {other}" for one, other in gains), *shown, "epochs, rho, seeds")
    return table(columns, rows)


def methods_table(grouped: Controls) -> str:
    """A row for each setting and method, with differences over seeds and how many seeds' own intervals leave out 0."""
    rows = []
    for setting, methods in grouped.items():
        name = f"{setting.data}; {setting.recipe}{' (given up)' if setting.grid in EARLIER else ''}"
        for method in (each for each in METHODS if each in methods):
            seeds = methods[method]
            cells = [f"{statistics.mean(run['gradients'] for run in seeds.values()):.3g}", len(seeds)]
            cells += [spread([run[key] for run in seeds.values()], decimals) for key, (_, decimals) in METRICS.items()]
            cells += ["" if other == method else difference(seeds, methods.get(other, {})) for other in (PLAIN, TWICE)]
            clear = sum(not run["pair"]["low"] <= 0 <= run["pair"]["high"] for run in seeds.values())
            rows.append((name, method, *cells, f"{clear} of {len(seeds)}" if method in (SAM, CHEAPER) else ""))
    gains = ("- finetune, points", "- finetune, 2x epochs, points", "seeds whose own interval over images leaves out 0")
    return table(("setting", "method", "gradients", "seeds", *METRICS, *gains), rows)


def recipes(runs: Sequence[Run], present: bool) -> str:
    """Accuracies of each recipe over its seeds, those of the `present` grids; or of all recipes, seed by seed."""

    def recipe(run: Run) -> tuple[int, int, str, str]:
        return run["finetune/image_size"], run["finetune/epochs"], run["grid"], run["finetune/backbone"]

    listed = [run for run in runs if is_evaluated(run) and "sam.epochs" not in run]
    ordered = sorted(listed, key=lambda run: (*recipe(run), run["seed"]))
    groups = [list(seeds) for _, seeds in itertools.groupby(ordered, key=recipe)]
    shown = [group for group in groups if group[0]["grid"] not in EARLIER] if present else [[run] for run in ordered]
    rows = []
    for seeds in shown:
        first, which = seeds[0], len(seeds) if present else seeds[0]["seed"]
        name = f"{first['finetune/backbone']}, {first['finetune/image_size']} px, {first['finetune/epochs']} epochs"
        stages: Sequence[tuple[str, str]] = STAGES
        gain = _sam_minus_finetune(seeds)
        if first["grid"] == FROZEN:
            name, stages, gain = f"{first['select/backbone']}, frozen", STAGES[:1], ""
        cells = [""] * 6
        for index, (stage, file) in enumerate(stages):
            for column, key in enumerate((f"{file}/val.accuracy", f"evaluate/{stage}.test.accuracy")):
                cells[2 * index + column] = spread([run[key] for run in seeds], 4)
        rows.append((name, which, *cells, gain))
    columns = [f"{title}, {role}" for title in ("frozen", "finetune", CHEAPER) for role in ("val", "test")]
    return table(("recipe", "seeds" if present else "seed", *columns, "SAM - finetune, points of test"), rows)


def _sam_minus_finetune(seeds: Sequence[Run]) -> str:
    """The difference on test: over images for one seed, over seeds for several."""
    if len(seeds) == 1:
        return interval({end: 100 * seeds[0][f"evaluate/sam_minus_finetune.{end}"] for end in PAIR})
    sam, finetune = (
        {run["seed"]: {ACCURACY: run[f"evaluate/{stage}.test.accuracy"]} for run in seeds}
        for stage in ("sam", "finetune")
    )
    return difference(sam, finetune)


def trials(runs: Sequence[Run]) -> str:
    """The runs that were not evaluated, by grid and val accuracy of their last stage, with what their grid varies."""
    rows = []
    ordered = sorted(runs, key=lambda run: (run["grid"], run["targets"]))
    for (grid, targets), group in itertools.groupby(ordered, key=lambda run: (run["grid"], run["targets"])):
        shown = [run for run in group if not is_evaluated(run) and "select/val.accuracy" in run]
        keys = dict.fromkeys(key for run in shown for key in run if "." in key and "/" not in key)
        varied = [key for key in keys if len({str(run.get(key)) for run in shown}) > 1]
        for run in shown:
            stage = next(stage for stage in ("sam", "finetune", "select") if f"{stage}/val.accuracy" in run)
            what = ", ".join([targets, *(f"`{key}: {run[key]}`" for key in varied if key in run)])
            val, minutes = f"{run[f'{stage}/val.accuracy']:.4f}", f"{float(run.get('seconds', 0)) / 60:.0f}"
            rows.append((grid, run["select/backbone"], what, val, minutes))
    rows.sort(key=lambda row: (row[0], -float(row[3])))
    hours = sum(float(run.get("seconds", 0)) for run in runs) / 3600
    took = f"\n{len(runs)} runs; those of grids took {hours:.1f} hours in all, each on its share of the cores.\n"
    return table(("grid", "network", "run", "val accuracy", "minutes"), rows) + took


def draw(grouped: Controls, path: Path) -> None:
    """Test accuracy by method: each seed a dot, their mean a bar; a panel for each setting of the present grids."""
    shown = {setting: methods for setting, methods in grouped.items() if setting.grid not in EARLIER}
    columns = min(PANELS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), dpi=100, layout="constrained")
    for index, (setting, methods) in enumerate(shown.items()):
        axis = figure.add_subplot(rows, columns, index + 1)
        present = [method for method in METHODS if method in methods]
        for position, method in enumerate(present):
            values = [run[ACCURACY] for run in methods[method].values()]
            axis.plot([position] * len(values), values, "o", color=f"C{position}", alpha=0.6)
            ends = [position - 0.3, position + 0.3]
            axis.plot(ends, [statistics.mean(values)] * 2, color=f"C{position}", linewidth=2)
        axis.set_xticks(range(len(present)), [method.replace(", ", ",\n") for method in present], fontsize=7)
        axis.set_title(f"{setting.data},\n{setting.epochs} epochs of SAM".replace(", ", ",\n", 1), fontsize=9)
        axis.set_ylabel(ACCURACY if index % columns == 0 else "")
        axis.grid(axis="y", alpha=0.3)
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def write(folder: Path) -> None:
    """Write everything in the study's folder that comes from its records.

    Raises:
        InputError: a table or a page is not as expected.
    """
    runs = collect(folder)
    grouped = controls(runs)
    fill(folder / "README.md", {"controls": summary(grouped), "recipes": recipes(runs, present=True)})
    blocks = {"controls": methods_table(grouped), "recipes": recipes(runs, present=False), "trials": trials(runs)}
    fill(folder / "notes.md", blocks)
    files.write_json(folder / "results.json", {"runs": runs})
    draw(grouped, folder / "accuracy.png")
    console.log(f"{sum(map(is_evaluated, runs))} of {len(runs)} runs have test metrics")


def _main() -> None:
    write(Path(__file__).parent)


if __name__ == "__main__":
    errors.run(_main)
