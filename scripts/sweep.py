"""Run a grid of DVC experiments, several at a time; write a table of all, and a picture, beside the grid's file.

    python scripts/sweep.py studies/digits/sweep.yaml [--jobs N]

Each experiment runs in a clone of the checkout (last commit and changes to tracked files) on cores of its own, and
comes back as a DVC experiment. Its name has a digest of all it depends on, so that the same command, given again after
a kill, runs what has not succeeded and nothing else. docs/sweeps.md tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, "src")  # of the checkout to run in: a study's clone may have an older schema
from flatmin import params, reporting
from flatmin.reporting import InputError

FOLDER = Path(".dvc/tmp/sweep")
FIGURES = {  # of the stages that a table shows, in their order
    "select-best": "select",
    "finetune": "finetune",
    "sam-finetune": "sam",
    "evaluate": "evaluate",
}
# What `git apply` reads, whatever the user's settings make of a diff.
DIFF = ["git", "diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--unified=3"]
DIFF += ["--src-prefix=a/", "--dst-prefix=b/", "HEAD"]
Row = Mapping[str, Any]
# What every row says beside the seed, set by the grid or not: what tells one study's data and training from another's.
DATA = ("data.name", "data.train_per_class", "data.label_noise", "finetune.ema")
ALWAYS = ("prepare", "extract-train", "select-best")
# Runs that differ in these sections alone have the stage in common: one makes it, the others find it in DVC's cache.
BEHIND = {
    "select-best": ("finetune", "sam", "evaluate"),
    "finetune": ("sam", "evaluate"),
    "sam-finetune": ("evaluate",),
}


@dataclass(frozen=True)
class Run:
    """One experiment: `values` of params to set, `settings` all params with these, `stages` that it brings about."""

    name: str
    command: Sequence[str]
    targets: Sequence[str]
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    stages: set[str]

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    @property
    def clock(self) -> Path:
        """The file with the seconds of all its attempts."""
        return FOLDER / f"{self.name}.seconds"

    def shared(self) -> set[tuple[str, str]]:
        """What it makes that other runs may need too."""
        return {
            (stage, json.dumps({key: value for key, value in self.settings.items() if key not in sections}))
            for stage, sections in BEHIND.items()
            if stage in self.stages
        }


@dataclass(frozen=True)
class Worker:
    """A run's process in a clone, in a process group of its own, begun at `began` (s) less the attempts before."""

    run: Run
    slot: int
    clone: Path
    process: subprocess.Popen[bytes]
    began: float

    def ended(self) -> bool:
        """Whether the process has ended; notes the seconds, since this one may be killed."""
        with reporting.whole(self.run.clock) as aside:
            aside.write_text(f"{time.monotonic() - self.began:.1f}")
        return self.process.poll() is not None


def read_grid(path: Path) -> tuple[list[Run], tuple[str, str] | None]:
    """The runs of a grid's file, each once, and its picture's x and y where it asks for one.

    Raises:
        InputError: a key or value is not what docs/sweeps.md says, or makes params that the schema refuses.
    """
    grid = _yaml(path)
    unknown = [key for key in grid if key not in ("targets", "runs", "picture")]
    if unknown:
        raise InputError(f"{path}: {unknown[0]}: expected targets, runs or picture, received this key")
    lists = grid.get("runs")
    if not isinstance(lists, list) or not lists:
        raise InputError(f"{path}: runs: expected a list of grids, received {lists!r}")
    runs: dict[str, Run] = {}
    for index, values in enumerate(lists):
        where = f"{path}: runs.{index}"
        if not isinstance(values, dict) or not values:
            raise InputError(f"{where}: expected a mapping from keys of params.yaml to lists, received {values!r}")
        values = {"targets": grid.get("targets", []), **values}
        targets = _targets(values.pop("targets"), path)
        for key, choices in values.items():
            if not isinstance(key, str) or not re.fullmatch(r"\w+(\.\w+)*", key):
                raise InputError(f"{where}: expected a key of params.yaml such as sam.rho, received {key!r}")
            if not isinstance(choices, list) or not choices:
                raise InputError(f"{where}.{key}: expected a list of at least one value, received {choices!r}")
        told = [key for key, choices in values.items() if len(choices) > 1] or list(values)
        for chosen in itertools.product(*values.values()):
            run = make_run(dict(zip(values, chosen, strict=True)), told, targets, where)
            runs.setdefault(run.name, run)
    found = list(runs.values())
    return found, _picture(grid["picture"], found, path) if "picture" in grid else None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a grid as in docs/sweeps.md, found no file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, a 30th of February
        raise InputError(f"{path}: expected YAML, received {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping, received {type(values).__name__}")
    return values


def _targets(targets: Any, path: Path) -> tuple[str, ...]:
    stages = list(_yaml(Path("dvc.yaml"))["stages"])
    for target in targets if isinstance(targets, list) else [targets]:
        if not isinstance(targets, list) or target not in stages:
            raise InputError(f"{path}: targets: expected a list of {', '.join(stages)}, received {target!r}")
    return tuple(targets)


def _picture(picture: Any, runs: Sequence[Run], path: Path) -> tuple[str, str]:
    if not isinstance(picture, dict) or set(picture) != {"x", "y"}:
        raise InputError(f"{path}: picture: expected x and y, received {picture!r}")
    keys = list({key: None for run in runs for key in run.values})
    if picture["x"] not in keys:
        raise InputError(f"{path}: picture.x: expected one of {', '.join(keys)}, received {picture['x']!r}")
    files = [file for stage, file in FIGURES.items() if any(stage in run.stages for run in runs)]
    if not isinstance(picture["y"], str) or picture["y"].split("/")[0] not in files or "/" not in picture["y"]:
        example = f"{' or '.join(files)}, a slash and a metric such as val.accuracy"
        raise InputError(f"{path}: picture.y: expected {example}, received {picture['y']!r}")
    return picture["x"], picture["y"]


def make_run(values: Mapping[str, Any], told: Sequence[str], targets: Sequence[str], where: str) -> Run:
    """A run with its settings, checked by the schema; `told` are the keys in its name, `where` begins a message."""
    settings, given = _yaml(Path("params.yaml")), []
    for key, value in values.items():
        *sections, last = key.split(".")
        section = settings
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise InputError(f"{where}: {key}: expected a key within mappings, received one within {section!r}")
        if last in section and isinstance(value, dict):  # else it would be merged with the one that is there
            given += ["-S", f"~{key}"]
            del section[last]
        given += ["-S", f"{'' if last in section else '+'}{key}={_hydra(value)}"]
        section[last] = value
    params.parse(settings, where)
    dvc = _yaml(Path("dvc.yaml"))["stages"]
    stages = set(dvc) if not targets or "evaluate" in targets else set(targets)
    stages |= set(ALWAYS) if stages & set(FIGURES) else set()
    digest = hashlib.sha256(json.dumps([settings, list(targets)]).encode())
    for file in sorted({dep for stage in stages for dep in dvc[stage]["deps"] if dep.endswith(".py")}):
        digest.update(Path(file).read_bytes())
    words = [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items() if key in told]
    name = re.sub(r"[^A-Za-z0-9.]+|\.\.+", "-", "-".join([*words, *targets]))
    name = f"{name[:80].strip('-.')}-{digest.hexdigest()[:8]}"
    return Run(name, ["dvc", "exp", "run", "--name", name, *given, *targets], targets, values, settings, stages)


def _hydra(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return json.dumps(value, default=str)  # a date: the schema refuses it


def run_all(runs: Sequence[Run], jobs: int, kept: Mapping[str, Row], failed: list[Run]) -> None:
    """Run what has not succeeded, so many at a time on a share of the cores each; put what fails into `failed`."""
    pending = [run for run in runs if run.name not in kept and find(run) is None]
    reporting.log(f"{len(runs)} experiments: {len(runs) - len(pending)} have succeeded, {len(pending)} to run")
    shares = share(sorted(os.sched_getaffinity(0)), jobs, len(runs))
    workers: list[Worker] = []
    made = {shared for run in runs if run not in pending for shared in run.shared()}
    try:
        clear()
        make_base()
        with tqdm(total=len(pending), desc="sweep", disable=None) as bar:
            while pending or workers:
                busy = {shared for worker in workers for shared in worker.run.shared()} - made
                run = next((run for run in pending if not run.shared() & busy), None)
                if run and len(workers) < len(shares):
                    pending.remove(run)
                    slot = min(set(range(len(shares))) - {worker.slot for worker in workers})
                    workers.append(start(run, slot, shares[slot]))
                    continue
                time.sleep(1)
                for worker in [worker for worker in workers if worker.ended()]:
                    if finish(worker):
                        made |= worker.run.shared()
                    else:
                        failed.append(worker.run)
                    workers.remove(worker)
                    bar.update()
    finally:
        for worker in workers:
            end(worker)
        clear()


def share(cores: Sequence[int], jobs: int, runs: int) -> list[Sequence[int]]:
    """Part cores among so many jobs, half as many as cores where that is 0, at most one for each of the grid's runs.

    Equally, and whatever is still to run: how many cores a training has moves its figures.
    """
    jobs = max(1, min(jobs or len(cores) // 2, len(cores), runs))
    each = len(cores) // jobs
    return [cores[slot * each : (slot + 1) * each] for slot in range(jobs)]


def make_base() -> None:
    """Clone this checkout as it is now: changes to tracked files, git's identity, DVC's settings and its cache."""
    base = FOLDER / "base"
    _output("git", "clone", "--quiet", ".", str(base))
    _output("git", "checkout", "--quiet", "--detach", _output("git", "rev-parse", "HEAD").strip(), cwd=base)
    changes = subprocess.run(DIFF, check=True, capture_output=True).stdout
    if changes:
        subprocess.run(["git", "apply", "--whitespace=nowarn"], cwd=base, input=changes, check=True)
    for key in ("user.name", "user.email"):
        value = subprocess.run(["git", "config", key], capture_output=True, text=True, check=False).stdout.strip()
        if value:
            _output("git", "config", key, value, cwd=base)
    if Path(".dvc/config.local").exists():
        shutil.copy2(".dvc/config.local", base / ".dvc/config.local")
    _output("dvc", "config", "--local", "cache.dir", _output("dvc", "cache", "dir").strip(), cwd=base)


def start(run: Run, slot: int, cores: Sequence[int]) -> Worker:
    """Start a run in a copy of the base, on these cores."""
    clone = FOLDER / f"clone-{slot}"
    shutil.rmtree(clone, ignore_errors=True)
    shutil.copytree(FOLDER / "base", clone, symlinks=True)
    environment = {**os.environ, "FLATMIN_SWEEP": str(FOLDER.resolve())}
    if "FLATMIN_CACHE" in environment:
        environment["FLATMIN_CACHE"] = os.path.abspath(environment["FLATMIN_CACHE"])
    began = time.monotonic() - (float(run.clock.read_text()) if run.clock.exists() else 0)
    reporting.log(f"{run.name}: started")
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # the run inherits it; TensorFlow and Augmenter count the cores that they may use
    try:
        with run.log.open("ab") as log:
            process = subprocess.Popen(
                run.command, cwd=clone, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
    finally:
        os.sched_setaffinity(0, everything)
    return Worker(run, slot, clone, process, began)


def finish(worker: Worker) -> bool:
    """Take an ended run's experiment into this checkout; whether it succeeded."""
    run = worker.run
    end(worker)  # where DVC was killed, what it had started goes on
    if worker.process.returncode == 0:
        head = _output("git", "rev-parse", "HEAD", cwd=worker.clone).strip()
        ref = f"refs/exps/{head[:2]}/{head[2:]}/{run.name}"
        subprocess.run(["git", "fetch", "--quiet", str(worker.clone), f"+{ref}:{ref}"], check=False)
    succeeded = find(run) is not None
    reporting.log(f"{run.name}: {'succeeded' if succeeded else f'failed, see {run.log}'} ({run.clock.read_text()} s)")
    return succeeded


def find(run: Run) -> str | None:
    """The git ref of a run that has succeeded, whatever commit it started from."""
    refs = _output("git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{run.name}").split()
    return refs[0] if refs else None


def end(worker: Worker) -> None:
    """End all that a run's process started; a training's state is whole at any time."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=10)
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()


def clear() -> None:
    """End and delete what a killed sweep of this checkout left: processes, which have its mark, and clones."""
    mark = f"FLATMIN_SWEEP={FOLDER.resolve()}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
    for clone in [FOLDER / "base", *FOLDER.glob("clone-*")]:
        shutil.rmtree(clone, ignore_errors=True)


def read_kept(path: Path) -> dict[str, Row]:
    """Name -> row of the runs that an earlier table has as succeeded, on this machine or another."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["name"]: row for row in rows if row.get("name") and row.get("status") == "succeeded"}


def table(
    runs: Sequence[Run], kept: Mapping[str, Row], failed: Sequence[Run]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows, one for each run: name, status, targets, seed, DATA, what any run sets, figures, seconds.

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
        for stage, file in FIGURES.items() if ref else ():
            if stage in run.stages:
                values = json.loads(_output("git", "show", f"{ref}:metrics/{file}.json"))
                row |= {f"{file}/{key}": value for key, value in leaves(values)}
        if not ref:
            row |= {key: value for key, value in before.items() if "/" in key and value != ""}
        figures |= {key: None for key in row if "/" in key}
        seconds = run.clock.read_text() if run.clock.exists() else ""
        rows.append({**row, "seconds": before.get("seconds") or seconds})
    return ["name", "status", "targets", *keys, *figures, "seconds"], rows


def _value(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else "" if value is None else value


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


def _output(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def sweep(path: Path, jobs: int) -> None:
    """Run a grid's experiments; write the table beside its file, when stopped as well, and the picture."""
    runs, picture = read_grid(path)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{FOLDER}: expected no other sweep of this checkout, found one running") from None
        signal.signal(signal.SIGTERM, _interrupt)
        written = path.with_suffix(".csv")
        kept, failed = read_kept(written), list[Run]()
        try:
            run_all(runs, jobs, kept, failed)
        finally:
            columns, rows = table(runs, kept, failed)
            reporting.write_csv(written, columns, [[row.get(column, "") for column in columns] for row in rows])
    if failed:
        logs = ", ".join(str(run.log) for run in failed)
        raise InputError(f"{len(failed)} of {len(runs)} experiments: expected success, failed: {logs}")
    files = [written]
    if picture:
        x, y = picture
        if y not in columns:
            raise InputError(f"{path}: picture.y: expected a column of {written}, received {y!r}")
        files.append(path.with_suffix(".png"))
        keys = [column for column in columns[2:-1] if "/" not in column]
        draw(spread([row for row in rows if y in row], x, y, keys), x, y, files[-1])
    reporting.log(f"{len(runs)} experiments: {' and '.join(map(str, files))}")


def _main() -> None:
    parser = argparse.ArgumentParser(description="run a grid of experiments")
    parser.add_argument("grid", type=Path)
    parser.add_argument("--jobs", type=int, default=0, help="so many at a time (default: half as many as cores)")
    arguments = parser.parse_args()
    sweep(arguments.grid, arguments.jobs)


if __name__ == "__main__":
    reporting.run(_main)
