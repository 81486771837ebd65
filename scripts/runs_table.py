"""The table of a grid's experiments: what they gave, where their numbers come from; and its picture."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grids import METRICS, RESULTS_VERSION, SEEDED, SEEDS, Picture, Run, get_value, output
from matplotlib.figure import Figure

from flatmin.common import files
from flatmin.common.errors import InputError

Row = Mapping[str, Any]
# Params that every row has, set by the grid or not: they tell one study's data and training from another's.
SHOWN = ("seeds", "data.seed", "data.name", "data.train_per_class", "data.label_noise", "finetune.ema")
# Where numbers come from. commit: 7 digits. dirty: whether the stages' code differed from the commit's. lock: the file
# of requirements/ and a digest of it. records: a digest of the records that the run trained on.
ORIGIN = ("commit", "dirty", "results_version", "lock", "machine", "cores", "records")
UNKNOWN = "unknown"
MACHINE = "from flatmin import runtime; print(', '.join(runtime.machine()))"


def on_cores(cores: Sequence[int]) -> list[str]:
    """What binds a command to these cores: TensorFlow and the augmenting processes count those that they may use."""
    return ["taskset", "--cpu-list", ",".join(map(str, cores))]


def describe(checkout: Path, cores: Sequence[int]) -> dict[str, Any]:
    """The origin that all runs of a sweep share: those from this checkout on as many cores as these."""
    code = ("src", "stages", "dvc.yaml")
    differs = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=checkout, check=False)
    lock = "gpu" if importlib.util.find_spec("nvidia") else "cpu"  # the CUDA wheels
    command = (*on_cores(cores), "env", "PYTHONPATH=src", sys.executable, "-c", MACHINE)
    return {
        "dirty": bool(differs.returncode),
        "results_version": RESULTS_VERSION,
        "lock": f"{lock}-{files.sha256(checkout / f'requirements/{lock}.txt')[:8]}",
        "machine": output(*command, cwd=checkout).splitlines()[-1],
        "cores": len(cores),
    }


def find(run: Run) -> str | None:
    """The git ref of a run's experiment if it has succeeded in this checkout, whatever commit it started from."""
    refs = output("git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{run.name}").split()
    return refs[0] if refs else None


def read_table(path: Path) -> dict[str, Row]:
    """Name -> row of the runs that a table has as succeeded, on this machine or another; nothing without the file.

    Raises:
        InputError: a row does not have one cell for each column, or a name is there twice.
    """
    succeeded: dict[str, Row] = {}
    for row in files.read_csv(path) if path.exists() else []:
        name = row.get("name", "")
        if None in row or None in row.values():
            raise InputError(f"{path}: {name}: expected a cell for each column, received more or fewer")
        if name and row.get("status") == "succeeded":
            if name in succeeded:
                raise InputError(f"{path}: {name}: expected one row, received two")
            succeeded[name] = row
    return succeeded


def table(runs: Sequence[Run], previous: Mapping[str, Row], failed: Sequence[Run]) -> tuple[list[str], list[Row]]:
    """Columns, and a row for each run: that of an earlier table, or else what its experiment gave.

    They are name, status, targets, SHOWN, the grid's keys, metrics, ORIGIN and seconds. Metrics are those of the stages
    that the run needs: an experiment's commit also holds old ones of other stages.
    """
    keys = list(dict.fromkeys([*SHOWN, *(key for run in runs for key in run.values)]))
    rows: list[Row] = []
    for run in runs:
        gave: dict[str, Any] = {"status": "failed" if run in failed else "not run"}
        if before := previous.get(run.name):
            gave = {key: each for key, each in before.items() if each and (key == "status" or is_result(key))}
        elif ref := find(run):
            gave = {"status": "succeeded", **dict(read_metrics(run, ref)), **read_origin(run, ref)}
        params = {key: cell(get_value(run.settings, key)) for key in keys}
        rows.append({"name": run.name, "targets": " ".join(run.targets), **params, **gave})
    metrics = dict.fromkeys(key for row in rows for key in row if "/" in key)
    return ["name", "status", "targets", *keys, *metrics, *ORIGIN, "seconds"], rows


def is_result(column: str) -> bool:
    """Whether a column tells what a run gave or where that comes from."""
    return "/" in column or column in (*ORIGIN, "seconds")


def read_origin(run: Run, ref: str) -> dict[str, Any]:
    """An experiment's ORIGIN, `unknown` if another checkout made it, and the seconds that all attempts took."""
    written = files.read_json(run.file("json")) if run.file("json").exists() else {}
    commit = output("git", "rev-parse", "--short=7", f"{ref}^").strip()
    records = json.loads(output("git", "show", f"{ref}:metrics/prepare.json"))["digest"][:12]
    found = dict.fromkeys(ORIGIN, UNKNOWN) | written | {"commit": commit, "records": records}
    return {key: cell(each) for key, each in found.items()}


def read_metrics(run: Run, ref: str) -> Iterator[tuple[str, Any]]:
    """The metrics of a run's stages: means over its seeds; what is no number only where all seeds have the same.

    The seeds' own values in finalize and evaluate are left out, since the table has their mean.
    """
    for stage in (stage for stage in METRICS if stage in run.stages):
        names = [f"{METRICS[stage]}/{seed}" for seed in run.settings["seeds"]] if stage in SEEDED else [METRICS[stage]]
        found = [dict(files.leaves(json.loads(output("git", "show", f"{ref}:metrics/{name}.json")))) for name in names]
        for key in (key for key in found[0] if ".seeds." not in key):
            values: list[Any] = [each.get(key) for each in found]
            if all(type(each) in (int, float) for each in values):
                yield f"{METRICS[stage]}/{key}", statistics.mean(values)
            elif all(each == values[0] for each in values):
                yield f"{METRICS[stage]}/{key}", values[0]


def cell(value: Any) -> Any:
    """A value of params or metrics as a table has it."""
    return json.dumps(value) if isinstance(value, dict | list | bool) else "" if value is None else value


def draw(columns: Sequence[str], rows: Sequence[Row], picture: Picture, path: Path) -> None:
    """Write a PNG: each run is a dot, the mean over SEEDS a line, one for each combination of the other params.

    Raises:
        InputError: the picture's x or y is no column, or a y is no number.
    """
    for key, name in (("x", picture.x), ("y", picture.y)):
        if name not in columns:
            raise InputError(f"picture.{key}: expected a column of the table, received {name!r}")
    rows = sorted((row for row in rows if picture.y in row), key=lambda row: _order(row[picture.x]))
    figure = Figure(figsize=(6.4, 4.2), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.xaxis.update_units([str(row[picture.x]) for row in rows])  # evenly spaced, in this order
    for label, points in spread(rows, picture).items():
        (line,) = axis.plot([*points], [statistics.mean(values) for values in points.values()], label=label)
        for x, values in points.items():
            axis.plot([x] * len(values), values, "o", color=line.get_color(), alpha=0.5)
    axis.set(xlabel=picture.x, ylabel=picture.y)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def spread(rows: Sequence[Row], picture: Picture) -> dict[str, dict[str, list[float]]]:
    """Each line of a picture -> each x -> the y of its runs.

    Raises:
        InputError: a y is not a number.
    """
    params = [key for key in rows[0] if key not in ("name", "status", picture.x, *SEEDS) and not is_result(key)]
    varying = [key for key in params if len({row[key] for row in rows}) > 1]
    lines: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        label = ", ".join(f"{key} {row[key]}" for key in varying) or "mean of seeds"
        try:
            y = float(row[picture.y])
        except (TypeError, ValueError):
            received = f"{picture.y}: {row[picture.y]!r}"
            raise InputError(f"picture.y: expected a metric that is a number, received {received}") from None
        lines.setdefault(label, {}).setdefault(str(row[picture.x]), []).append(y)
    return lines


def _order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value
