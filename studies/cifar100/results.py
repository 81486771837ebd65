"""Write results.json, tables.md, accuracy.png and a part of README.md here from the records in version-1/.

    PYTHONPATH=src python studies/cifar100/results.py

The records are of results version 1, with one `seed` for everything and no stage control: they are read, not extended.
A run that reached evaluate and sets `sam.epochs` is a control: it compares two of four methods. If finetune has as many
epochs, it is compared with SAM in every fifth step; if it has twice as many, with SAM in every step, at equal gradient
evaluations. Controls of one setting and several seeds make a table. A run that reached evaluate without `sam.epochs` is
a recipe. All other runs are trials, which no test image was used for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scipy.stats
import yaml
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
from provenance import COLUMNS as PROVENANCE
from provenance import UNKNOWN, refuse_contradiction
from runs_table import read_table

from flatmin.common import console, errors, files
from flatmin.common.errors import InputError

Run = Mapping[str, Any]
BEGIN, END = "<!-- begin: written by results.py -->\n", "<!-- end -->\n"
TABLES = """# Every run of this study

Written by `results.py` from the tables of the grids. [README.md](README.md) explains them.
"""
TRIALS = "## Trials, compared by val\n\nParams that are not named are as in params.yaml.\n"
METHODS = ("finetune", "finetune, 2x epochs", "SAM", "SAM, every 5th step")
PLAIN, TWICE, SAM, CHEAPER = METHODS
METRICS = {  # title -> metric of evaluate, and its decimals
    "test accuracy": ("test.accuracy", 4),
    "ECE": ("test.ece", 4),
    "gradient rise": ("sharpness.gradient_rise", 3),
    "adaptive rise": ("sharpness.adaptive_rise", 3),
    "largest eigenvalue": ("sharpness.eigenvalue_1", 1),
}
ACCURACY = "test accuracy"
PAIR = ("accuracy", "low", "high")  # SAM minus finetune of the same run: the difference, and its interval over images
STAGES = (("extract", "select"), ("finetune", "finetune"), ("sam", "sam"))  # of a recipe, and their files in metrics/
LATER_SECTIONS = {  # targets -> sections that come after them, so they say nothing about the run
    "select-best": ("finetune", "sam", "evaluate"),
    "finetune": ("sam", "evaluate"),
    "sam-finetune": ("evaluate",),
}
RECORDS = "version-1"  # the folder of the tables, of params.yaml and of the outputs of `make study`
EARLIER = ("earlier", "removed")  # tables of settings that were given up, and of params that the schema no longer has
FROZEN = "frozen"  # a grid whose runs fine-tune for one epoch only because evaluate needs all three classifiers
TEXT = ("name", "targets", "commit", "lock", "machine", "records")  # digits in these are not a number
ORIGIN = (*PROVENANCE, "seconds", "grid")
# What differs between the methods and seeds of a setting, or does not affect the results.
VARIED = ("name", "targets", "seed", "finetune.epochs", "sam.epochs", "sam.every", "sam.method", *ORIGIN)
# `make study` does not record where its results come from. This is what is known of its run.
STUDY = {"commit": "31d7322", "dirty": False, "machine": "Intel Xeon with AMX", "cores": 2, "results_version": 1}
PANELS = 3  # of the picture, side by side


class Setting(NamedTuple):
    """What the controls of one table have in common."""

    grid: str
    data: str
    per_class: int | None
    label_noise: float | None
    backbone: str
    image_size: int
    epochs: int
    ema: float | None
    rho: float
    others: str  # all other params, as JSON

    @property
    def is_earlier(self) -> bool:
        return self.grid in EARLIER

    @property
    def title(self) -> str:
        return data_title(self.data, self.per_class, self.label_noise)

    @property
    def position(self) -> tuple[Any, ...]:
        """Present grids first, then the study's own data, few images, and few wrong labels."""
        images = self.per_class or math.inf
        own = (self.label_noise or 0, self.ema or 0, self.rho, self.others)
        return (self.is_earlier, self.grid != "sweep", self.data, images, *own)

    @property
    def recipe(self) -> str:
        ema = f", weight EMA {self.ema:g}" if self.ema else ""
        return f"{self.backbone}, {self.image_size} px, {self.epochs} epochs of SAM{ema}, rho {self.rho:g}"


Controls = dict[Setting, dict[str, dict[int, Run]]]  # method -> seed -> its metrics, by METRICS' titles, and `pair`


def collect(folder: Path) -> list[Run]:
    """The successful runs of all tables of the records, and the run of `make study`.

    Raises:
        InputError: two tables disagree about a run, or a run is not of results version 1.
    """
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.csv")):
        for name, row in read_table(path).items() if path.stem != "test_predictions" else ():
            cells = {
                key: cell if key in TEXT else _value(cell)
                for key, cell in row.items()
                if cell != "" and key != "status"
            }
            run = {**cells, "grid": path.stem}
            if name in runs:
                refuse_contradiction(name, {other["grid"] + ".csv": other for other in (runs[name], run)})
            runs[name] = run
    run = study(folder)
    runs[run["name"]] = run
    for name, run in runs.items():
        version = run.get("results_version", UNKNOWN)
        if version != 1:
            raise InputError(f"{folder}: {name}: expected results version 1, received {version}")
    return list(runs.values())


def study(folder: Path) -> dict[str, Any]:
    """What `make study` ran. Its name has a digest of the params."""
    lock = yaml.safe_load((folder / "dvc.lock").read_text(encoding="utf-8"))
    sections = dict[str, Any]()
    for stage in lock["stages"].values():
        sections |= stage.get("params", {}).get("params.yaml", {})
    name = f"study-{hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()[:8]}"
    run = {"name": name, "targets": "evaluate", "grid": "params", **dict(files.leaves(sections))}
    for file in ("select", "finetune", "sam", "evaluate"):
        run |= {f"{file}/{key}": value for key, value in files.leaves(files.read_json(folder / f"metrics/{file}.json"))}
    records = files.read_json(folder / "metrics/prepare.json")["digest"][:12]
    return run | dict.fromkeys(PROVENANCE, UNKNOWN) | STUDY | {"records": records}


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def data_title(data: str, per_class: int | None, label_noise: float | None) -> str:
    images = f"{per_class} training images per class" if per_class else "all training images"
    wrong = f", {100 * label_noise:g} % of their labels wrong" if label_noise else ""
    return f"{data.rpartition('/')[2]}, {images}{wrong}"


def is_evaluated(run: Run) -> bool:
    return "evaluate/sam.test.accuracy" in run


def controls(runs: Sequence[Run]) -> Controls:
    """The controls by setting, in the order of the tables.

    Raises:
        InputError: two runs give different metrics for one seed of a method.
    """
    grouped: Controls = {}
    for run in runs:
        if not is_evaluated(run) or "sam.epochs" not in run:
            continue
        methods = _methods(run)
        setting = Setting(
            run["grid"],
            run["data.name"],
            run.get("data.train_per_class"),
            run.get("data.label_noise"),
            run["finetune/backbone"],
            run["finetune/image_size"],
            run["sam.epochs"],
            run.get("finetune.ema"),
            run["sam.rho"],
            json.dumps({key: run[key] for key in sorted(run) if key not in VARIED and "/" not in key}),
        )
        for role, method in methods.items():
            metrics = {title: run[f"evaluate/{role}.{key}"] for title, (key, _) in METRICS.items()}
            metrics["gradients"] = _gradients(run, role)
            metrics["pair"] = {end: 100 * run[f"evaluate/sam_minus_finetune.{end}"] for end in PAIR}
            seeds = grouped.setdefault(setting, {}).setdefault(method, {})
            if seeds.setdefault(run["seed"], metrics) != metrics:
                expected = f"expected one run of seed {run['seed']}"
                raise InputError(f"{run['name']}: {expected}, received two of {setting.recipe}")
    return dict(sorted(grouped.items(), key=lambda item: item[0].position))


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


def _gradients(run: Run, role: str) -> float:
    """A stage's gradient evaluations, as a multiple of those of finetune for SAM's epochs."""
    per_epoch = run["finetune/gradient_evaluations"] / run["finetune/epochs"]
    return float(run[f"{role}/gradient_evaluations"] / per_epoch / run["sam.epochs"])


def difference(first: Mapping[int, Run], second: Mapping[int, Run]) -> str:
    """Of test accuracies in points, over the seeds that both have, with a 95 % interval (t); empty without seeds."""
    points = [100 * (first[seed][ACCURACY] - second[seed][ACCURACY]) for seed in first.keys() & second.keys()]
    if not points:
        return ""
    mean = statistics.mean(points)
    if len(points) == 1:
        return f"{mean:+.2f}"
    half = scipy.stats.t.ppf(0.975, len(points) - 1) * statistics.stdev(points) / len(points) ** 0.5
    return _interval({"accuracy": mean, "low": mean - half, "high": mean + half})


def _interval(points: Mapping[str, float]) -> str:
    return f"{points['accuracy']:+.2f} [{points['low']:+.2f}, {points['high']:+.2f}]"


def spread(values: Sequence[float], decimals: int) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{deviation}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def summary(grouped: Controls) -> str:
    """A row for each setting of the present grids: accuracies, and what SAM gains."""
    gains = ((SAM, TWICE), (SAM, PLAIN), (CHEAPER, PLAIN))
    rows = []
    for setting, methods in grouped.items():
        if setting.is_earlier:
            continue
        seeds = {method: methods.get(method, {}) for method in METHODS}
        accuracies = [spread([run[ACCURACY] for run in each.values()], 4) if each else "" for each in seeds.values()]
        start = (setting.title, setting.epochs, f"{setting.rho:g}", max(map(len, seeds.values())))
        rows.append((*start, *accuracies, *(difference(seeds[one], seeds[other]) for one, other in gains)))
    columns = ("data", "epochs", "rho", "seeds", *METHODS, *(f"{one} - {other}" for one, other in gains))
    return markdown(columns, rows)


def methods_table(methods: Mapping[str, Mapping[int, Run]]) -> str:
    """A row for each method; then SAM compared with the finetune of its run, seed by seed, over images."""
    rows = []
    for method in (each for each in METHODS if each in methods):
        seeds = methods[method]
        gradients = statistics.mean(run["gradients"] for run in seeds.values())
        cells = [spread([run[title] for run in seeds.values()], decimals) for title, (_, decimals) in METRICS.items()]
        cells += ["" if other == method else difference(seeds, methods.get(other, {})) for other in (PLAIN, TWICE)]
        rows.append((method, f"{gradients:.3g}", len(seeds), *cells))
    columns = ("method", "gradients", "seeds", *METRICS, "- finetune, points", "- finetune, 2x epochs, points")
    pairs = []
    for seed in sorted({seed for seeds in methods.values() for seed in seeds}):
        runs = [methods.get(method, {}).get(seed) for method in (SAM, CHEAPER)]
        pairs.append((seed, *(_interval(run["pair"]) if run else "" for run in runs)))
    over_images = ("seed", f"{SAM} - {TWICE}, over images", f"{CHEAPER} - {PLAIN}, over images")
    return f"{markdown(columns, rows)}\n{markdown(over_images, pairs)}"


def _recipe(run: Run) -> tuple[int, int, str, str]:
    """What the seeds of one recipe have in common: image size, epochs, grid (empty if earlier), backbone."""
    grid = "" if run["grid"] in EARLIER else run["grid"]
    return run["finetune/image_size"], run["finetune/epochs"], grid, run["finetune/backbone"]


def recipes(runs: Sequence[Run], present: bool) -> str:
    """A row for each stage and seed of the recipes, and for all seeds of one; of the `present` grids, or of all runs.

    The table of all runs also has their sharpness.
    """
    sharpness = {} if present else {title: key for title, key in METRICS.items() if key[0].startswith("sharpness.")}
    listed = [run for run in runs if is_evaluated(run) and "sam.epochs" not in run]
    listed = [run for run in listed if not present or run["grid"] not in EARLIER]
    rows = []
    for _, group in itertools.groupby(sorted(listed, key=lambda run: (*_recipe(run), run["seed"])), key=_recipe):
        seeds = list(group)
        together = [seeds] if len(seeds) > 1 and seeds[0]["grid"] not in EARLIER else []
        for some in [*([run] for run in seeds), *together]:
            rows += _stage_rows(some, sharpness.values())
    columns = ("recipe (pixels and epochs of finetune)", "seed", "stage", "val accuracy", "test accuracy")
    return markdown((*columns, "test top-5", "ECE", "with flips", *sharpness), rows) if rows else ""


def _stage_rows(seeds: Sequence[Run], sharpness: Iterable[tuple[str, int]]) -> list[tuple[Any, ...]]:
    """A row for each stage, and SAM's difference: over images for one seed, over seeds for several."""
    first = seeds[0]
    frozen = first["grid"] == FROZEN
    name = f"{first['finetune/backbone']}, {first['finetune/image_size']} px, {first['finetune/epochs']} epochs"
    start = (
        f"{first['select/backbone']}, frozen" if frozen else name,
        first["seed"] if len(seeds) == 1 else f"all {len(seeds)}",
    )
    optional = [("mirrored.accuracy", 4), *sharpness]
    rows: list[tuple[Any, ...]] = []
    for stage, file in STAGES[:1] if frozen else STAGES:
        keys = [f"evaluate/{stage}.test.{key}" for key in ("accuracy", "top5_accuracy", "ece")]
        cells = [spread([run[key] for run in seeds], 4) for key in (f"{file}/val.accuracy", *keys)]
        for metric, decimals in optional:
            key = f"evaluate/{stage}.{metric}"
            cells.append(spread([run[key] for run in seeds], decimals) if key in first else "")
        ratio = first["sam/gradient_evaluations"] / first["finetune/gradient_evaluations"] if stage == "sam" else 0
        rows.append((*start, f"sam, {ratio:.2g}x gradients" if ratio else stage, *cells))
    if not frozen:
        rows.append((*start, "sam - finetune, points", "", _sam_minus_finetune(seeds), *[""] * (2 + len(optional))))
    return rows


def _sam_minus_finetune(seeds: Sequence[Run]) -> str:
    if len(seeds) == 1:
        points = {end: 100 * seeds[0][f"evaluate/sam_minus_finetune.{end}"] for end in PAIR}
        return f"{_interval(points)}, p {seeds[0]['evaluate/sam_minus_finetune.p_value']:.2g}"
    sam, finetune = (
        {run["seed"]: {ACCURACY: run[f"evaluate/{stage}.test.accuracy"]} for run in seeds}
        for stage in ("sam", "finetune")
    )
    return difference(sam, finetune)


def trials(runs: Sequence[Run], params: Mapping[str, Any]) -> str:
    """The runs that were not evaluated, by val accuracy; a table for each network, size of images and data."""
    groups: dict[str, list[Run]] = {}
    shown = [run for run in runs if not is_evaluated(run) and any(key.endswith("/val.accuracy") for key in run)]
    for run in sorted(shown, key=lambda run: -_val(run)):
        size = run.get("sam/image_size") or run.get("finetune/image_size")
        data = data_title(run["data.name"], run.get("data.train_per_class"), run.get("data.label_noise"))
        title = f"### {run['select/backbone']}{f', {size} px' if size else ''}; {data}"
        groups.setdefault(title, []).append(run)
    return "\n".join(f"{title}\n\n{_trials_table(group, params)}" for title, group in groups.items())


def _trials_table(runs: Sequence[Run], params: Mapping[str, Any]) -> str:
    """The most common value of each param that differs; a row for each run, with its other values.

    params: params.yaml's, which a run has unless its grid sets another.
    """
    rows, usual = [], dict[str, str]()
    keys = dict.fromkeys(key for run in runs for key in run if "." in key and "/" not in key)
    values: list[dict[str, str]] = [
        {
            key: _shown(run.get(key, params.get(key)))
            for key in keys
            if key.partition(".")[0] not in ("data", *LATER_SECTIONS[run["targets"]])
        }
        for run in runs
    ]
    for key in keys:
        counts = Counter(each[key] for each in values if key in each)
        if len(counts) > 1:
            usual[key] = counts.most_common(1)[0][0]
    for run, each in zip(runs, values, strict=True):
        own = ", ".join(f"`{key}: {each[key]}`" for key in usual if key in each and each[key] != usual[key])
        what = f"{run['targets']}: {own}" if own else run["targets"]
        rows.append((what, run["seed"], f"{_val(run):.4f}", f"{float(run.get('seconds', 0)) / 60:.0f}"))
    common = f"Unless stated: {', '.join(f'`{key}: {value}`' for key, value in usual.items())}.\n\n" if usual else ""
    return common + markdown(("run", "seed", "val accuracy", "minutes"), rows)


def _val(run: Run) -> float:
    """Of the last stage that ran."""
    stages = [stage for stage in ("sam", "finetune", "select") if f"{stage}/val.accuracy" in run]
    return float(run[f"{stages[0]}/val.accuracy"])


def _shown(value: Any) -> str:
    if value is None:
        return "default"
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def tables(runs: Sequence[Run], params: Mapping[str, Any]) -> str:
    """All of tables.md."""
    parts = {True: list[str](), False: list[str]()}  # whether of earlier settings
    for setting, methods in controls(runs).items():
        parts[setting.is_earlier].append(f"### {setting.title}\n\n{setting.recipe}.\n\n{methods_table(methods)}")
    hours = sum(float(run.get("seconds", 0)) for run in runs) / 3600
    took = f"{len(runs)} runs; those of grids took {hours:.1f} hours in all, each on its share of the cores.\n"
    earlier = ["## Controls of earlier settings\n", *parts[True]] if parts[True] else []
    start = [TABLES, f"## Recipes\n\n{recipes(runs, present=False)}", "## Controls\n", *parts[False]]
    return "\n".join([*start, *earlier, f"{TRIALS}\n{trials(runs, params)}", took])


def draw(grouped: Controls, path: Path) -> None:
    """Test accuracy by method: each seed a dot, their mean a bar; a panel for each setting of the present grids."""
    shown = {setting: methods for setting, methods in grouped.items() if not setting.is_earlier}
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
        axis.set_title(f"{setting.title},\n{setting.epochs} epochs of SAM".replace(", ", ",\n", 1), fontsize=9)
        axis.set_ylabel(ACCURACY if index % columns == 0 else "")
        axis.grid(axis="y", alpha=0.3)
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def write(folder: Path) -> None:
    """Write everything in the study's folder that comes from its records.

    Raises:
        InputError: a table, results or README.md are not as expected; nothing is written then.
    """
    page = folder / "README.md"
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{page}: expected the lines {BEGIN.strip()} and {END.strip()} once each")
    records = folder / RECORDS
    params = dict(files.leaves(yaml.safe_load((records / "params.yaml").read_text(encoding="utf-8"))))
    runs = collect(records)
    grouped = controls(runs)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    section = f"{summary(grouped)}\n{recipes(runs, present=True)}"
    written = {page: f"{before}{BEGIN}\n{section}\n{END}{after}", folder / "tables.md": tables(runs, params)}
    files.write_json(folder / "results.json", {"runs": runs})
    for path, content in written.items():
        with files.atomic_write(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    draw(grouped, folder / "accuracy.png")
    console.log(f"{sum(map(is_evaluated, runs))} of {len(runs)} runs have test metrics")


def _main() -> None:
    write(Path(__file__).parent)


if __name__ == "__main__":
    errors.run(_main)
