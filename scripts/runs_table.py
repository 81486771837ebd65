"""The table of a grid's experiments, and its picture."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grids import METRICS, Run
from matplotlib.figure import Figure

from flatmin import reporting
from flatmin.reporting import InputError

Row = Mapping[str, Any]
# What every row says beside the seed, set by the grid or not: what tells one study's data and training from another's.
DATA = ("data.name", "data.train_per_class", "data.label_noise", "finetune.ema")


def find(run: Run) -> str | None:
    """The git ref of a run that has succeeded, whatever commit it started from."""
    refs = output("git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{run.name}").split()
    return refs[0] if refs else None


def read_kept(path: Path) -> dict[str, Row]:
    """Name -> row of the runs that an earlier table has as succeeded, on this machine or another.

    Raises:
        InputError: a row has not a cell for each column.
    """
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if None in row or None in row.values():
            raise InputError(f"{path}: {row.get('name')}: expected a cell for each column, received more or fewer")
    return {row["name"]: row for row in rows if row.get("name") and row.get("status") == "succeeded"}


def table(
    runs: Sequence[Run], kept: Mapping[str, Row], failed: Sequence[Run]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns, and a row for each run: name, status, targets, seed, DATA, what runs set, figures, commit, seconds.

    Figures are those of the stages that the run brought about: an experiment's commit holds the others' old ones.
    """
    keys = list(dict.fromkeys(["seed", *DATA, *(key for run in runs for key in run.values)]))
    rows: list[dict[str, Any]] = []
    figures: dict[str, None] = {}
    for run in runs:
        ref, before = find(run), kept.get(run.name, {})
        status = "succeeded" if ref or before else "failed" if run in failed else "not run"
        row = {"name": run.name, "status": status, "targets": " ".join(run.targets)}
        row |= {key: _cell(_value(run.settings, key)) for key in keys}
        for stage, file in METRICS.items() if ref else ():
            if stage in run.stages:
                values = json.loads(output("git", "show", f"{ref}:metrics/{file}.json"))
                row |= {f"{file}/{key}": value for key, value in leaves(values)}
        if not ref:
            row |= {key: value for key, value in before.items() if "/" in key and value != ""}
        figures |= {key: None for key in row if "/" in key}
        seconds = run.clock.read_text() if run.clock.exists() else ""
        commit = output("git", "rev-parse", "--short=7", f"{ref}^").strip() if ref else before.get("commit", "")
        rows.append({**row, "commit": commit, "seconds": before.get("seconds") or seconds})
    return ["name", "status", "targets", *keys, *figures, "commit", "seconds"], rows


def _value(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list | bool) else "" if value is None else value


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, each with its keys joined by dots."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def spread(rows: Sequence[Row], x: str, y: str, keys: Sequence[str]) -> dict[str, dict[Any, list[float]]]:
    """The seeds' y, for each line of a picture (the values of `keys` tell them apart) and each x in order.

    Raises:
        InputError: a y is no number.
    """
    others = [key for key in keys if key not in (x, "seed") and len({row[key] for row in rows}) > 1]
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


def draw(lines: Mapping[str, Mapping[Any, Sequence[float]]], x: str, y: str, path: Path) -> None:
    """Write a PNG of `spread`'s lines: every run a dot, the mean a line; neighbouring x are equally far apart."""
    ticks = sorted({value for points in lines.values() for value in points}, key=_order)
    figure = Figure(figsize=(6.4, 4.2), dpi=100, layout="constrained")
    axis = figure.subplots()
    for index, (label, points) in enumerate(lines.items()):
        shift = 0.06 * (index - (len(lines) - 1) / 2)
        where = [ticks.index(value) + shift for value in points]
        means = [sum(values) / len(values) for values in points.values()]
        (line,) = axis.plot(where, means, label=label, linewidth=1.8)
        for place, values in zip(where, points.values(), strict=True):
            axis.plot([place] * len(values), values, "o-", color=line.get_color(), alpha=0.5, linewidth=1)
    axis.set_xticks(range(len(ticks)), [str(value) for value in ticks])
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    with reporting.whole(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})


def output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints.

    Raises:
        InputError: it fails.
    """
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(command)}: expected it to succeed, received: {done.stderr.strip()[:500]}")
    return done.stdout
