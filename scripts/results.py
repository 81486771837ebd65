"""Collect a study's experiments in its results.json, and write the tables and the picture of its pages from that.

    python scripts/results.py studies/cifar100

results.json keeps every run that a grid's table ever had as succeeded, and those of `make study`. Written from it are
tables.md, accuracy.png and, in README.md, what stands between two comment lines.

A run with `sam.epochs` that reached evaluate is a control: it compares two of four methods. Where finetune has as many
epochs, it stands beside a cheaper SAM; where it has twice as many, beside SAM itself, at equal gradient evaluations.
Controls of the same setting and of several seeds make a table. A run without `sam.epochs` that reached evaluate is a
recipe. All others are trials, and were never evaluated.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import scipy.stats
import yaml
from grids import BEHIND
from matplotlib.figure import Figure
from runs_table import DATA, METRICS, leaves, read_kept

from flatmin import reporting
from flatmin.reporting import InputError

BEGIN, END = "<!-- from results.json, by scripts/results.py -->\n", "<!-- end -->\n"
TABLES = "# Every run of this study\n\nFrom results.json, by `python scripts/results.py`. "
TABLES += "[README.md](README.md) says what they mean.\n"
TRIALS = "## Trials, chosen among by val\n\nWhat is not told is as in params.yaml at the run's commit.\n"
METHODS = ("finetune", "finetune, 2x epochs", "SAM", "SAM, every 5th step")
PLAIN, TWICE, SAM, CHEAPER = METHODS
FIGURES = {  # title -> metric of evaluate, and its decimals
    "test accuracy": ("test.accuracy", 4),
    "ECE": ("test.ece", 4),
    "gradient rise": ("sharpness.gradient_rise", 3),
    "adaptive rise": ("sharpness.adaptive_rise", 3),
    "largest eigenvalue": ("sharpness.eigenvalue_1", 1),
}
ACCURACY = next(iter(FIGURES))
NEEDED = ("name", "seed", "data.name")  # of a run
TEXT = ("name", "targets", "commit")  # a commit's digits may look like a number
PAIR = ("accuracy", "low", "high")  # of SAM less the finetune beside it: the difference, and its interval over images
COLUMNS = 3  # of the picture's panels
STAGES = (("extract", "select"), ("finetune", "finetune"), ("sam", "sam"))  # of a recipe, and their files in metrics/
FROZEN = "frozen"  # a grid whose runs fine-tune as a token, since evaluate wants all three classifiers
# What differs between the methods and seeds of a setting, or says nothing of it.
VARIED = ("name", "targets", "seed", "finetune.epochs", "sam.epochs", "sam.every", "sam.method", "commit", "seconds")
Run = Mapping[str, Any]


class Setting(NamedTuple):
    """What the controls of one table have in common; `grid` is None for runs of code or params that no grid has now."""

    grid: str | None
    data: str
    per_class: int | None
    label_noise: float | None
    backbone: str
    image_size: int
    epochs: int
    ema: float | None
    rho: float
    others: str  # all else that the table has of its params, as JSON

    @property
    def title(self) -> str:
        return title(self.data, self.per_class, self.label_noise)

    @property
    def place(self) -> tuple[Any, ...]:
        """Its order: what a grid has now, the study's own data, few images, few wrong labels first."""
        per_class = self.per_class or math.inf
        return (
            self.grid is None,
            self.grid != "sweep",
            self.data,
            per_class,
            self.label_noise or 0,
            self.ema or 0,
            self.rho,
            self.others,
        )

    @property
    def recipe(self) -> str:
        averages = f", weight EMA {self.ema:g}" if self.ema else ""
        return f"{self.backbone}, {self.image_size} px, {self.epochs} epochs of SAM{averages}, rho {self.rho:g}"


Controls = dict[Setting, dict[str, dict[int, Run]]]  # method -> seed -> its figures, by FIGURES' titles, and `pair`


def collect(folder: Path) -> list[Run]:
    """The runs of results.json with those of the grids' tables that succeeded, by name."""
    runs: dict[str, dict[str, Any]] = {run["name"]: {**run, "grid": None} for run in read(folder / "results.json")}
    for grid in sorted(folder.glob("*.csv")):
        for name, row in read_kept(grid).items():
            cells = {
                key: cell if key in TEXT else _value(cell)
                for key, cell in row.items()
                if cell != "" and key != "status"
            }
            runs[name] = {**cells, "grid": grid.stem}
    if (folder / "metrics/evaluate.json").exists():
        name, given = study(folder / "dvc.lock")
        runs[name] = {"name": name, "targets": "evaluate", "grid": "params", **given}
        for file in METRICS.values():
            metrics = reporting.read_json(folder / f"metrics/{file}.json")
            runs[name] |= {f"{file}/{key}": value for key, value in leaves(metrics)}
    return json.loads(json.dumps(list(runs.values()), sort_keys=True))  # as everybody else reads them


def read(path: Path) -> list[Run]:
    """The runs of a results.json; none where there is no such file.

    Raises:
        InputError: it holds something else.
    """
    found = reporting.read_json(path).get("runs") if path.exists() else []
    if not isinstance(found, list) or not all(isinstance(run, dict) and set(NEEDED) <= run.keys() for run in found):
        raise InputError(
            f"{path}: expected runs, a list of mappings with {', '.join(NEEDED)} each, received {str(found)[:80]}"
        )
    return found


def study(lock: Path) -> tuple[str, dict[str, Any]]:
    """A name and the params of what `make study` ran last: another recipe, or other code, has another name."""
    given, code = dict[str, Any](), dict[str, str]()
    for stage in yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"].values():
        given |= leaves(stage.get("params", {}).get("params.yaml", {}))
        code |= {dep["path"]: dep["md5"] for dep in stage["deps"] if dep["path"].endswith(".py")}
    digest = hashlib.sha256(json.dumps([given, code], sort_keys=True).encode())
    return f"study-{digest.hexdigest()[:8]}", given


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def title(data: str, per_class: int | None, label_noise: float | None) -> str:
    """What the training images of a run were, from its params of DATA."""
    images = f"{per_class} training images a class" if per_class else "all training images"
    wrong = f", {100 * label_noise:g} % of their labels wrong" if label_noise else ""
    return f"{data.rpartition('/')[2]}, {images}{wrong}"


def is_evaluated(run: Run) -> bool:
    return "evaluate/sam.test.accuracy" in run


def controls(runs: Sequence[Run]) -> Controls:
    """The controls by their setting, in its order.

    Raises:
        InputError: two runs give one seed of a method different figures.
    """
    found: Controls = {}
    for run in runs:
        if not is_evaluated(run) or "sam.epochs" not in run:
            continue
        methods = _methods(run)
        setting = Setting(
            *(run[key] if key in ("grid", "data.name") else run.get(key) for key in ("grid", *DATA[:3])),
            run["finetune/backbone"],
            run["finetune/image_size"],
            run["sam.epochs"],
            run.get("finetune.ema"),
            run["sam.rho"],
            json.dumps(
                {key: value for key, value in run.items() if key not in VARIED and "/" not in key}, sort_keys=True
            ),
        )
        for role, method in methods.items():
            figures = {title: run[f"evaluate/{role}.{key}"] for title, (key, _) in FIGURES.items()}
            figures["gradients"] = _gradients(run, role)
            figures["pair"] = {end: 100 * run[f"evaluate/sam_minus_finetune.{end}"] for end in PAIR}
            others = found.setdefault(setting, {}).setdefault(method, {})
            if others.setdefault(run["seed"], figures) != figures:
                raise InputError(
                    f"{run['name']}: expected one run of seed {run['seed']}, found two of {setting.recipe}"
                )
    return dict(sorted(found.items(), key=lambda item: item[0].place))


def _methods(run: Run) -> dict[str, str]:
    """The method that each of a control's two trained stages is."""
    for key in ("finetune.epochs", "sam.every", "sam.rho"):
        if key not in run:
            raise InputError(f"{run['name']}: {key}: expected the grid to set it, as it sets sam.epochs; found none")
    match run["finetune.epochs"] / run["sam.epochs"], run["sam.every"], run.get("sam.method", "sam"):
        case 2, 1, "sam":
            return {"finetune": TWICE, "sam": SAM}
        case 1, 5, "sam":
            return {"finetune": PLAIN, "sam": CHEAPER}
    raise InputError(
        f"{run['name']}: expected SAM beside finetune of twice its epochs, or every fifth step beside as many epochs, "
        f"received sam.epochs {run['sam.epochs']}, finetune.epochs {run['finetune.epochs']}, "
        f"sam.every {run['sam.every']}"
    )


def _gradients(run: Run, role: str) -> float:
    """How many gradients a stage took of an image, as a multiple of those of finetune for SAM's epochs."""
    of_epoch = run["finetune/gradient_evaluations"] / run["finetune/epochs"]
    return float(run[f"{role}/gradient_evaluations"] / of_epoch / run["sam.epochs"])


def difference(first: Mapping[int, Run], second: Mapping[int, Run]) -> str:
    """Of test accuracies over the seeds that both have, in points, with its 95 % interval (t); empty without seeds."""
    points = [100 * (first[seed][ACCURACY] - second[seed][ACCURACY]) for seed in first.keys() & second.keys()]
    if not points:
        return ""
    mean = statistics.mean(points)
    if len(points) == 1:
        return f"{mean:+.2f}"
    half = scipy.stats.t.ppf(0.975, len(points) - 1) * statistics.stdev(points) / len(points) ** 0.5
    return _interval({"accuracy": mean, "low": mean - half, "high": mean + half})


def spread(values: Sequence[float], decimals: int) -> str:
    """Mean and standard deviation of some seeds."""
    deviation = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{decimals}f}{deviation}"


def summary(found: Controls) -> str:
    """A row for each setting of the present grids: accuracies, and what SAM gains."""
    lines = [
        f"| data | epochs | rho | seeds | {' | '.join(METHODS)} | SAM - finetune, 2x epochs | SAM - finetune | "
        "SAM, every 5th step - finetune |",
        f"|{'---|' * (len(METHODS) + 7)}",
    ]
    for setting, methods in found.items():
        if setting.grid is None:
            continue
        seeds = {method: methods.get(method, {}) for method in METHODS}
        accuracies = [spread([run[ACCURACY] for run in each.values()], 4) if each else "" for each in seeds.values()]
        gains = [difference(seeds[a], seeds[b]) for a, b in ((SAM, TWICE), (SAM, PLAIN), (CHEAPER, PLAIN))]
        count = max(map(len, seeds.values()))
        cells = [setting.title, str(setting.epochs), f"{setting.rho:g}", str(count), *accuracies, *gains]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def recipes(runs: Sequence[Run], now: bool) -> str:
    """What each stage of the recipes gave, a row for each seed and one for all of them.

    Of params that stand somewhere `now`; or of all, and then with the sharpness.
    """
    sharpness = {} if now else {name: key for name, key in FIGURES.items() if key[0].startswith("sharpness.")}
    columns = ("recipe (pixels and epochs of finetune)", "seed", "stage", "val accuracy", "test accuracy")
    columns += ("test top-5", "ECE", "with flips", *sharpness)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    found = [run for run in runs if is_evaluated(run) and "sam.epochs" not in run and (run["grid"] or not now)]
    found.sort(key=lambda run: (*_recipe(run), run["seed"]))
    for recipe, same in itertools.groupby(found, key=_recipe):
        seeds = list(same)
        for run in seeds:
            lines += _stages([run], sharpness.values())
        if recipe.grid and len(seeds) > 1:
            lines += _stages(seeds, sharpness.values())
    return "\n".join(lines) + "\n" if found else ""


class _Recipe(NamedTuple):
    """What its seeds have in common; `grid` is empty for runs of code or params that no grid has now."""

    image_size: int
    epochs: int
    grid: str
    backbone: str


def _recipe(run: Run) -> _Recipe:
    return _Recipe(run["finetune/image_size"], run["finetune/epochs"], run["grid"] or "", run["finetune/backbone"])


def _stages(seeds: Sequence[Run], sharpness: Iterable[tuple[str, int]]) -> list[str]:
    """A row for each stage, and the difference that SAM makes: over images for one seed, over seeds for some."""
    one, recipe = seeds[0], _recipe(seeds[0])
    frozen = recipe.grid == FROZEN
    name = f"{recipe.backbone}, {recipe.image_size} px, {recipe.epochs} epochs"
    if frozen:
        name = f"{one['select/backbone']}, frozen"
    start = f"| {name} | {one['seed'] if len(seeds) == 1 else f'all {len(seeds)}'} |"
    optional = [("mirrored.accuracy", 4), *sharpness]
    lines = []
    for stage, file in STAGES[:1] if frozen else STAGES:
        keys = [
            f"{file}/val.accuracy",
            *(f"evaluate/{stage}.test.{key}" for key in ("accuracy", "top5_accuracy", "ece")),
        ]
        figures = [spread([run[key] for run in seeds], 4) for key in keys]
        for metric, decimals in optional:
            key = f"evaluate/{stage}.{metric}"
            figures.append(spread([run[key] for run in seeds], decimals) if key in one else "")
        what = stage
        if stage == "sam":
            what += f", {one['sam/gradient_evaluations'] / one['finetune/gradient_evaluations']:.2g}x gradients"
        lines.append(f"{start} {what} | {' | '.join(figures)} |")
    if not frozen:
        lines.append(f"{start} sam - finetune, points | | {_sam_minus_finetune(seeds)} |" + " |" * (2 + len(optional)))
    return lines


def _sam_minus_finetune(seeds: Sequence[Run]) -> str:
    if len(seeds) == 1:
        points = {end: 100 * seeds[0][f"evaluate/sam_minus_finetune.{end}"] for end in PAIR}
        return f"{_interval(points)}, p {seeds[0]['evaluate/sam_minus_finetune.p_value']:.2g}"
    sam, finetune = (
        {run["seed"]: {ACCURACY: run[f"evaluate/{stage}.test.accuracy"]} for run in seeds}
        for stage in ("sam", "finetune")
    )
    return difference(sam, finetune)


def _interval(points: Mapping[str, float]) -> str:
    return f"{points['accuracy']:+.2f} [{points['low']:+.2f}, {points['high']:+.2f}]"


def table(methods: Mapping[str, Mapping[int, Run]]) -> str:
    """A row for each method; then SAM beside the finetune of its experiment, seed by seed, over images."""
    lines = [
        f"| method | gradients | seeds | {' | '.join(FIGURES)} | - finetune, points | - finetune, 2x epochs, points |",
        f"|{'---|' * (5 + len(FIGURES))}",
    ]
    for method in (each for each in METHODS if each in methods):
        seeds = methods[method]
        gradients = statistics.mean(run["gradients"] for run in seeds.values())
        cells = [spread([run[title] for run in seeds.values()], places) for title, (_, places) in FIGURES.items()]
        cells += ["" if other == method else difference(seeds, methods.get(other, {})) for other in (PLAIN, TWICE)]
        lines.append(f"| {method} | {gradients:.3g} | {len(seeds)} | {' | '.join(cells)} |")
    lines += ["", f"| seed | {SAM} - {TWICE}, over images | {CHEAPER} - {PLAIN}, over images |", "|---|---|---|"]
    for seed in sorted({seed for seeds in methods.values() for seed in seeds}):
        pairs = [methods.get(method, {}).get(seed) for method in (SAM, CHEAPER)]
        lines.append(f"| {seed} | {' | '.join(_interval(run['pair']) if run else '' for run in pairs)} |")
    return "\n".join(lines) + "\n"


def trials(runs: Sequence[Run]) -> str:
    """The runs that were not evaluated, by val accuracy; a table for each data, network and size of images."""
    groups: dict[str, list[Run]] = {}
    shown = [run for run in runs if not is_evaluated(run) and any(key.endswith("/val.accuracy") for key in run)]
    for run in sorted(shown, key=lambda run: -_val(run)):
        size = run.get("sam/image_size") or run.get("finetune/image_size")
        data = title(run["data.name"], *(run.get(key) for key in DATA[1:3]))
        name = f"### {run['select/backbone']}{f', {size} px' if size else ''}; {data}"
        groups.setdefault(name, []).append(run)
    return "\n".join(f"{name}\n\n{_trials_alike(alike)}" for name, alike in groups.items())


def _trials_alike(runs: Sequence[Run]) -> str:
    """What most of them have where all set it; a row for each, with what else it sets that not all have alike."""
    told = [key for key in dict.fromkeys(key for run in runs for key in run) if _is_told(key, runs)]
    usual = {
        key: Counter(_shown(run[key]) for run in runs).most_common(1)[0][0]
        for key in told
        if all(key in run for run in runs)
    }
    lines = [f"Unless told: {', '.join(f'`{key}: {value}`' for key, value in usual.items())}.", ""] if usual else []
    lines += ["| run | seed | val accuracy | minutes |", "|---|---|---|---|"]
    for run in runs:
        own = [key for key in told if key in run and key.partition(".")[0] not in BEHIND.get(run["targets"], ())]
        values = [f"`{key}: {_shown(run[key])}`" for key in own if _shown(run[key]) != usual.get(key)]
        what = ": ".join([run["targets"], *filter(None, [", ".join(values)])])
        lines.append(f"| {what} | {run['seed']} | {_val(run):.4f} | {float(run.get('seconds', 0)) / 60:.0f} |")
    return "\n".join(lines) + "\n"


def _is_told(key: str, runs: Sequence[Run]) -> bool:
    """Whether these runs have several values of a param, params.yaml's being one."""
    if key in ("name", "targets", "seed", "seconds", "commit", "grid", "data.source", "data.splits", *DATA[:3]):
        return False
    return "/" not in key and len({_shown(run[key]) if key in run else None for run in runs}) > 1


def _val(run: Run) -> float:
    """Of the last stage that was run."""
    stages = [stage for stage in ("sam", "finetune", "select") if f"{stage}/val.accuracy" in run]
    return float(run[f"{stages[0]}/val.accuracy"])


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def tables(runs: Sequence[Run]) -> str:
    """All of tables.md."""
    now: list[str] = []
    before: list[str] = []
    for setting, methods in controls(runs).items():
        part = f"### {setting.title}\n\n{setting.recipe}.\n\n{table(methods)}"
        (now if setting.grid else before).append(part)
    hours = sum(float(run.get("seconds", 0)) for run in runs) / 3600
    took = (
        f"{len(runs)} runs; those of grids took {hours:.1f} hours in all, added up, each on its share of the cores.\n"
    )
    parts = [TABLES, f"## Recipes\n\n{recipes(runs, now=False)}", "## Controls\n", *now]
    parts += ["## Controls of earlier code or params\n", *before] if before else []
    return "\n".join([*parts, f"{TRIALS}\n{trials(runs)}", took])


def draw(found: Controls, path: Path) -> None:
    """Test accuracy by method: each seed a dot, their mean a bar; a panel for each setting of the present grids."""
    shown = {setting: methods for setting, methods in found.items() if setting.grid}
    columns = min(COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows), dpi=100, layout="constrained")
    for index, (setting, methods) in enumerate(shown.items()):
        axis = figure.add_subplot(rows, columns, index + 1)
        there = [method for method in METHODS if method in methods]
        for place, method in enumerate(there):
            values = [run[ACCURACY] for run in methods[method].values()]
            axis.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.6)
            axis.plot([place - 0.3, place + 0.3], [statistics.mean(values)] * 2, color=f"C{place}", linewidth=2)
        axis.set_xticks(range(len(there)), [method.replace(", ", ",\n") for method in there], fontsize=7)
        axis.set_title(f"{setting.title},\n{setting.epochs} epochs of SAM".replace(", ", ",\n", 1), fontsize=9)
        axis.set_ylabel(ACCURACY if index % columns == 0 else "")
        axis.grid(axis="y", alpha=0.3)
    with reporting.whole(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})


def section(runs: Sequence[Run]) -> str:
    """What stands between the two comment lines of README.md."""
    found, of_recipes = controls(runs), recipes(runs, now=True)
    parts = [summary(found)] if any(setting.grid for setting in found) else []
    return "\n".join([*parts, *([of_recipes] if of_recipes else [])])


def write(folder: Path) -> None:
    """Everything of a study's folder that comes from its runs."""
    if not (folder / "sweep.csv").is_file():
        raise InputError(f"{folder}/sweep.csv: expected the table of `make study-sweep`, found none")
    page = folder / "README.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"{page}: expected the lines {BEGIN.strip()} and {END.strip()} once each")
    runs = collect(folder)
    found = controls(runs)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    written = {page: f"{before}{BEGIN}\n{section(runs)}\n{END}{after}", folder / "tables.md": tables(runs)}
    # Nothing above has refused a run, which results.json would keep for good.
    reporting.write_json(folder / "results.json", {"runs": runs})
    for path, content in written.items():
        with reporting.whole(path) as aside:
            aside.write_text(content, encoding="utf-8")
    if any(setting.grid for setting in found):
        draw(found, folder / "accuracy.png")
    reporting.log(f"{len(runs)} runs: results.json, README.md and tables.md in {folder}")


def _main() -> None:
    parser = argparse.ArgumentParser(description="write a study's tables from its experiments")
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    reporting.run(_main)
