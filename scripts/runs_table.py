"""The table of a grid's experiments: what they gave, where their numbers come from; and its picture."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grids import METRICS, SEEDED, SEEDS, Picture, Run, output
from matplotlib.figure import Figure

from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.common.identity import RESULTS_VERSION as RESULTS_VERSION

Row = Mapping[str, Any]
# Params that every row has, set by the grid or not: they tell one study's data and training from another's.
SHOWN = ("seeds", "data.seed", "data.name", "data.train_per_class", "data.label_noise", "finetune.ema")
# Where numbers come from. commit: 7 digits. dirty: whether the stages' code differed from the commit's. lock: the file
# of requirements/ and a digest of it. records: a digest of the records that the run trained on.
ORIGIN = ("commit", "dirty", "results_version", "lock", "machine", "cores", "records")
UNKNOWN = "unknown"
MACHINE = "from flatmin import runtime; print(', '.join(runtime.machine()))"


@contextlib.contextmanager
def cores_only(cores: Sequence[int]) -> Iterator[None]:
    """Within the block, bind what is started to these cores: TensorFlow and Augmenter count those that they may use."""
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, everything)


def describe(checkout: Path, cores: Sequence[int]) -> dict[str, Any]:
    """The origin that all runs of a sweep share: those from this checkout on as many cores as these."""
    code = ("src", "stages", "dvc.yaml")
    differs = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *code], cwd=checkout, check=False)
    lock = "gpu" if importlib.util.find_spec("nvidia") else "cpu"  # the CUDA wheels
    with cores_only(cores):
        machine = output("env", "PYTHONPATH=src", sys.executable, "-c", MACHINE, cwd=checkout).splitlines()[-1]
    return {
        "dirty": bool(differs.returncode),
        "results_version": RESULTS_VERSION,
        "lock": f"{lock}-{files.sha256(checkout / f'requirements/{lock}.txt')[:8]}",
        "machine": machine,
        "cores": len(cores),
    }


def read_origin(run: Run, ref: str) -> dict[str, Any]:
    """The columns of ORIGIN of a run that succeeded; `unknown` where another checkout made it."""
    written = files.read_json(run.file("json")) if run.file("json").exists() else {}
    commit = output("git", "rev-parse", "--short=7", f"{ref}^").strip()
    records = json.loads(output("git", "show", f"{ref}:metrics/prepare.json"))["digest"][:12]
    return dict.fromkeys(ORIGIN, UNKNOWN) | written | {"commit": commit, "records": records}


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


def check_versions(path: Path, runs: Sequence[Run], previous: Mapping[str, Row], mix_versions: bool) -> None:
    """Refuse to continue a table with another results version than it has, unless `mix_versions`.

    Raises:
        InputError: the table would mix versions, or a row and the experiment of its name disagree.
    """
    places: dict[str, str] = {}  # version -> where it is
    for run in runs:
        ref = find(run)
        rows = {str(path): previous[run.name]} if run.name in previous else {}
        if ref:
            rows["its experiment"] = read_origin(run, ref)
        refuse_contradiction(run.name, rows)
        for place, row in (rows or {"this code": {"results_version": RESULTS_VERSION}}).items():
            where = f"{run.name}: {place}" if rows else place
            places.setdefault(str(row.get("results_version") or UNKNOWN), where)
    if len(places) > 1 and not mix_versions:
        received = " and ".join(f"{version} ({place})" for version, place in places.items())
        raise InputError(
            f"{path}: expected one results version, received {received}: to run those of another version again, delete "
            "their rows and their experiments (`dvc exp remove`); to keep them, give --mix-versions"
        )
    if str(RESULTS_VERSION) not in places:
        console.log(f"note: {path}: all runs are of results version {', '.join(places)}, this code: {RESULTS_VERSION}")


def refuse_contradiction(name: str, rows: Mapping[str, Row]) -> None:
    """Refuse results of one run that differ in records or results version; `rows`: where each stands -> its row.

    Raises:
        InputError: they differ.
    """
    for column in ("results_version", "records"):
        values = {where: str(row.get(column, UNKNOWN)) for where, row in rows.items()}
        if len(set(values.values()) - {UNKNOWN}) > 1:
            received = " and ".join(f"{value} ({where})" for where, value in values.items())
            raise InputError(f"{name}: {column}: expected one, received {received}: delete one of them")


def table(
    runs: Sequence[Run], previous: Mapping[str, Row], failed: Sequence[Run]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns, and a row for each run.

    They are name, status, targets, SHOWN, the grid's keys, metrics, ORIGIN and seconds. Metrics are those of the
    stages that the run needs: an experiment's commit also holds old ones of other stages.
    """
    keys = list(dict.fromkeys([*SHOWN, *(key for run in runs for key in run.values)]))
    rows: list[dict[str, Any]] = []
    metrics: dict[str, None] = {}
    for run in runs:
        ref, before = find(run), previous.get(run.name, {})
        status = "succeeded" if ref or before else "failed" if run in failed else "not run"
        row = {"name": run.name, "status": status, "targets": " ".join(run.targets)}
        row |= {key: cell(value(run.settings, key)) for key in keys}
        row |= dict(_metrics(run, ref)) if ref else {key: each for key, each in before.items() if "/" in key and each}
        metrics |= {key: None for key in row if "/" in key}
        made = read_origin(run, ref) if ref else {}
        if status == "succeeded":
            for key in ORIGIN:
                known = made.get(key, UNKNOWN)
                row[key] = str(cell(before.get(key) or UNKNOWN if known == UNKNOWN else known))
        clock = run.file("seconds")
        rows.append({**row, "seconds": before.get("seconds") or (clock.read_text() if clock.exists() else "")})
    return ["name", "status", "targets", *keys, *metrics, *ORIGIN, "seconds"], rows


def _metrics(run: Run, ref: str) -> Iterator[tuple[str, Any]]:
    """The metrics of a run's stages: means over its seeds; what is no number only where all seeds have the same.

    The seeds' own values in finalize and evaluate are left out, since the table has their mean.
    """
    for stage in (stage for stage in METRICS if stage in run.stages):
        names = [f"{METRICS[stage]}/{seed}" for seed in run.settings["seeds"]] if stage in SEEDED else [METRICS[stage]]
        found = [dict(files.leaves(json.loads(output("git", "show", f"{ref}:metrics/{name}.json")))) for name in names]
        for key in (key for key in found[0] if ".seeds." not in key):
            values = [each.get(key) for each in found]
            numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
            if len(numbers) == len(found):
                yield f"{METRICS[stage]}/{key}", statistics.mean(numbers)
            elif all(each == values[0] for each in values):
                yield f"{METRICS[stage]}/{key}", values[0]


def value(settings: Any, key: str) -> Any:
    """The value of a key such as sam.rho; None without it."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def cell(value: Any) -> Any:
    """A value of params or metrics as a table has it."""
    return json.dumps(value) if isinstance(value, dict | list | bool) else "" if value is None else value


def draw(columns: Sequence[str], rows: Sequence[Row], picture: Picture, path: Path) -> None:
    """Write a PNG of `spread`'s lines: each run is a dot, the mean a line; x values are evenly spaced.

    Raises:
        InputError: the picture's x or y is no column, or a y is no number.
    """
    for key, name in (("x", picture.x), ("y", picture.y)):
        if name not in columns:
            raise InputError(f"picture.{key}: expected a column of the table, received {name!r}")
    keys = [column for column in columns[2:-1] if "/" not in column and column not in ORIGIN]
    rows = [row for row in rows if picture.y in row]
    lines = spread(rows, picture.x, picture.y, [*keys, "results_version"])
    ticks = sorted({value for points in lines.values() for value in points}, key=_order)
    figure = Figure(figsize=(6.4, 4.2), dpi=100, layout="constrained")
    axis = figure.subplots()
    for index, (label, points) in enumerate(lines.items()):
        where = [ticks.index(value) + 0.06 * (index - (len(lines) - 1) / 2) for value in points]
        (line,) = axis.plot(where, [statistics.mean(values) for values in points.values()], label=label, linewidth=1.8)
        for position, values in zip(where, points.values(), strict=True):
            axis.plot([position] * len(values), values, "o-", color=line.get_color(), alpha=0.5, linewidth=1)
    axis.set_xticks(range(len(ticks)), [str(value) for value in ticks])
    axis.set(xlabel=picture.x, ylabel=picture.y)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    with files.atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def spread(rows: Sequence[Row], x: str, y: str, keys: Sequence[str]) -> dict[str, dict[Any, list[float]]]:
    """Each line of a picture -> each x, in order -> the y of its runs, which differ in SEEDS. `keys` tell lines apart.

    Raises:
        InputError: a y is not a number.
    """
    others = [key for key in keys if key not in (x, *SEEDS) and len({row[key] for row in rows}) > 1]
    lines: dict[str, dict[Any, list[float]]] = {}
    for row in sorted(rows, key=lambda row: _order(row[x])):
        label = ", ".join(f"{key} {row[key]}" for key in others) or "mean of seeds"
        try:
            value = float(row[y])
        except (TypeError, ValueError):
            raise InputError(f"picture.y: expected a metric that is a number, received {y}: {row[y]!r}") from None
        lines.setdefault(label, {}).setdefault(row[x], []).append(value)
    return lines


def _order(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value
