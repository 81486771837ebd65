"""Run a grid of DVC experiments, several at a time; write a table of all and a picture beside the grid's file.

    python scripts/sweep.py studies/digits/sweep.yaml [--jobs N]

Each experiment runs in a clone of the checkout (last commit and changes to tracked files) on cores of its own, and
comes back as a DVC experiment. Its name has a digest of all it depends on, so that the same command, given again after
a kill, runs what has not succeeded and nothing else. docs/sweeps.md tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

from flatmin import params, reporting
from flatmin.reporting import InputError

FOLDER = Path(".dvc/tmp/sweep")
FIGURES = {  # of the stages that a table shows, in their order
    "select-best": "select",
    "finetune": "finetune",
    "sam-finetune": "sam",
    "evaluate": "evaluate",
}
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
    targets: tuple[str, ...]
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    stages: tuple[str, ...]

    def shared(self) -> set[tuple[str, str]]:
        """What it makes that other runs may need too."""
        return {
            (stage, json.dumps({key: value for key, value in self.settings.items() if key not in sections}))
            for stage, sections in BEHIND.items()
            if stage in self.stages
        }

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"


@dataclass
class Worker:
    """A run's process in one of the clones."""

    run: Run
    slot: int
    process: subprocess.Popen[bytes]
    earlier: float
    began: float

    def note_seconds(self) -> float:
        """The run's seconds so far, those of killed attempts included; kept in a file, for a kill of this one."""
        seconds = self.earlier + time.monotonic() - self.began
        with reporting.whole(_seconds_file(self.run)) as aside:
            aside.write_text(f"{seconds:.1f}")
        return seconds


def read_grid(path: Path) -> tuple[list[Run], str, str]:
    """The runs of a grid's file, each once, and its picture's x and y.

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
        for chosen in itertools.product(*values.values()):
            run = make_run(dict(zip(values, chosen, strict=True)), targets, where)
            runs.setdefault(run.name, run)
    return list(runs.values()), *_picture(grid.get("picture"), list(runs.values()), path)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a grid as in docs/sweeps.md, found no file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
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
    keys = {key: None for run in runs for key in run.values}
    if picture["x"] not in keys:
        raise InputError(f"{path}: picture.x: expected one of {', '.join(keys)}, received {picture['x']!r}")
    files = [file for stage, file in FIGURES.items() if any(stage in run.stages for run in runs)]
    if not isinstance(picture["y"], str) or picture["y"].split("/")[0] not in files or "/" not in picture["y"]:
        example = f"{' or '.join(files)}, a slash and a metric such as val.accuracy"
        raise InputError(f"{path}: picture.y: expected {example}, received {picture['y']!r}")
    return picture["x"], picture["y"]


def make_run(values: Mapping[str, Any], targets: Sequence[str], where: str) -> Run:
    """A run with its settings, checked by the schema, and its name; `where` begins a message."""
    settings = copy.deepcopy(_yaml(Path("params.yaml")))
    for key, value in values.items():
        *sections, last = key.split(".")
        section = settings
        for name in sections:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value
    params.parse(settings, where)
    stages = set(FIGURES) if not targets or "evaluate" in targets else set(targets)
    stages |= set(ALWAYS) if stages & set(FIGURES) else set()
    digest = hashlib.sha256(json.dumps([settings, list(targets)]).encode())
    dvc = _yaml(Path("dvc.yaml"))["stages"]
    for file in sorted({dep for stage in stages for dep in dvc[stage]["deps"] if dep.endswith(".py")}):
        digest.update(Path(file).read_bytes())
    words = [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items()]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([*words, *targets]))[:80].strip("-.")
    name = re.sub(r"\.{2,}", ".", name)  # git takes no two dots
    return Run(f"{name}-{digest.hexdigest()[:8]}", tuple(targets), values, settings, tuple(sorted(stages)))


def override(run: Run, key: str) -> str:
    """The argument of `dvc exp run -S` for one of a run's keys."""
    section: Any = _yaml(Path("params.yaml"))
    for name in key.split("."):
        section = section.get(name, run) if isinstance(section, dict) else run
    return f"{'+' if section is run else ''}{key}={_hydra(run.values[key])}"


def _hydra(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    return json.dumps(value)


def run_all(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Run what has not succeeded, so many at a time on a share of the cores each; return what failed."""
    end_orphans()
    pending = [run for run in runs if find(run) is None]
    reporting.log(f"{len(runs)} experiments: {len(runs) - len(pending)} have succeeded, {len(pending)} to run")
    shares = share(sorted(os.sched_getaffinity(0)), jobs, len(pending))
    workers: list[Worker] = []
    failed: list[Run] = []
    made: set[tuple[str, str]] = set()
    try:
        with tqdm(total=len(pending), desc="sweep", disable=None) as bar:
            while pending or workers:
                busy = {shared for worker in workers for shared in worker.run.shared()} - made
                ready = [run for run in pending if not run.shared() & busy]
                if ready and len(workers) < len(shares):
                    pending.remove(ready[0])
                    slot = min(set(range(len(shares))) - {worker.slot for worker in workers})
                    workers.append(start(ready[0], slot, shares[slot]))
                    continue
                time.sleep(0.5)
                for worker in [worker for worker in workers if _ended(worker)]:
                    workers.remove(worker)
                    (made.update(worker.run.shared()) if finish(worker) else failed.append(worker.run))
                    bar.update()
    finally:
        for worker in workers:
            end(worker)
        for slot in range(len(shares)):
            shutil.rmtree(FOLDER / f"clone-{slot}", ignore_errors=True)
    return failed


def share(cores: Sequence[int], jobs: int, runs: int) -> list[Sequence[int]]:
    """Part cores among so many jobs, half as many as cores where that is 0; never more jobs than cores or runs."""
    jobs = max(1, min(jobs or len(cores) // 2, len(cores), runs))
    return [cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs] for slot in range(jobs)]


def _ended(worker: Worker) -> bool:
    worker.note_seconds()
    return worker.process.poll() is not None


def _seconds_file(run: Run) -> Path:
    return FOLDER / f"{run.name}.seconds"


def start(run: Run, slot: int, cores: Sequence[int]) -> Worker:
    """Start a run in a new clone, on these cores and in a process group of its own."""
    clone = FOLDER / f"clone-{slot}"
    shutil.rmtree(clone, ignore_errors=True)
    make_clone(clone)
    changes = [word for key in run.values for word in ("-S", override(run, key))]
    command = ["dvc", "exp", "run", "--name", run.name, *changes, *run.targets]
    environment = {**os.environ, "FLATMIN_SWEEP": _mark()}
    if "FLATMIN_CACHE" in environment:
        environment["FLATMIN_CACHE"] = os.path.abspath(environment["FLATMIN_CACHE"])
    earlier = float(_seconds_file(run).read_text()) if _seconds_file(run).exists() else 0.0
    reporting.log(f"{run.name}: started")
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # inherited by the run: TensorFlow and the augmenter count the cores they may use
    try:
        with run.log.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=clone, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
    finally:
        os.sched_setaffinity(0, everything)
    return Worker(run, slot, process, earlier, time.monotonic())


def make_clone(clone: Path) -> None:
    """Clone this checkout with its changes to tracked files, git's identity, DVC's settings and its cache."""
    _output("git", "clone", "--quiet", ".", str(clone))
    _output("git", "checkout", "--quiet", "--detach", _output("git", "rev-parse", "HEAD").strip(), cwd=clone)
    changes = subprocess.run(["git", "diff", "--binary", "HEAD"], check=True, capture_output=True).stdout
    if changes:
        subprocess.run(["git", "apply", "--whitespace=nowarn"], cwd=clone, input=changes, check=True)
    for key in ("user.name", "user.email"):
        value = subprocess.run(["git", "config", key], capture_output=True, text=True, check=False).stdout.strip()
        if value:
            _output("git", "config", key, value, cwd=clone)
    if Path(".dvc/config.local").exists():
        shutil.copy2(".dvc/config.local", clone / ".dvc/config.local")
    _output("dvc", "config", "--local", "cache.dir", _output("dvc", "cache", "dir").strip(), cwd=clone)


def finish(worker: Worker) -> bool:
    """Take an ended run's experiment into this checkout; whether it succeeded."""
    run, clone = worker.run, FOLDER / f"clone-{worker.slot}"
    seconds = worker.note_seconds()
    ref = _ref(run)
    if worker.process.returncode == 0:
        subprocess.run(["git", "fetch", "--quiet", str(clone), f"+{ref}:{ref}"], check=False, capture_output=True)
    end(worker)
    succeeded = find(run) is not None
    reporting.log(f"{run.name}: {'succeeded' if succeeded else f'failed, see {run.log}'} ({seconds:.0f} s)")
    return succeeded


def _ref(run: Run) -> str:
    head = _output("git", "rev-parse", "HEAD").strip()
    return f"refs/exps/{head[:2]}/{head[2:]}/{run.name}"


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


def _mark() -> str:
    return str(FOLDER.resolve())


def end_orphans() -> None:
    """End what a sweep of this checkout that was killed left running; it would go on beside its second start."""
    mark = f"\0FLATMIN_SWEEP={_mark()}\0".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in b"\0" + (folder / "environ").read_bytes() + b"\0":
                os.kill(int(folder.name), signal.SIGKILL)


def table(runs: Sequence[Run], failed: Sequence[Run]) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows, one for each run: name, status, targets, params that any run sets, figures, seconds.

    Figures are those of the stages that the run brought about: an experiment's commit holds the others' old ones.
    """
    keys = list({"seed": None, **{key: None for run in runs for key in run.values}})
    rows: list[dict[str, Any]] = []
    figures: dict[str, None] = {}
    for run in runs:
        ref = find(run)
        status = "succeeded" if ref else "failed" if run in failed else "not run"
        row = {"name": run.name, "status": status, "targets": " ".join(run.targets)}
        row |= {key: _cell(_value(run.settings, key)) for key in keys}
        for stage, file in FIGURES.items() if ref else ():
            if stage in run.stages:
                values = json.loads(_output("git", "show", f"{ref}:metrics/{file}.json"))
                row |= {f"{file}/{key}": value for key, value in _leaves(values)}
        figures |= {key: None for key in row if "/" in key}
        seconds = _seconds_file(run)
        rows.append({**row, "seconds": seconds.read_text() if seconds.exists() else ""})
    return ["name", "status", "targets", *keys, *figures, "seconds"], rows


def _value(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else "" if value is None else value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def draw(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], x: str, y: str, path: Path) -> None:
    """Write a PNG of y against x: every run a dot, the seeds' mean a line; a line for each of the other params' values.

    Args:
        rows: of the table. keys: the params that runs set. path: of the picture.

    Raises:
        InputError: no row has the figure y.
    """
    rows = [row for row in rows if y in row]
    if not rows:
        raise InputError(f"picture.y: expected a figure of {path.with_suffix('.csv')}, received {y!r}")
    ticks = sorted({row[x] for row in rows}, key=lambda value: (isinstance(value, str), value))
    lines: dict[str, dict[int, list[float]]] = {}
    others = [key for key in ("targets", *keys) if key not in (x, "seed") and len({row[key] for row in rows}) > 1]
    for row in rows:
        label = ", ".join(f"{key} {row[key]}" for key in others) or "mean of seeds"
        lines.setdefault(label, {}).setdefault(ticks.index(row[x]), []).append(float(row[y]))
    figure = Figure(figsize=(6.4, 4.2), dpi=100, layout="constrained")
    axis = figure.subplots()
    for index, (label, points) in enumerate(lines.items()):
        shift = 0.06 * (index - (len(lines) - 1) / 2)
        places = sorted(points)
        means = [sum(points[place]) / len(points[place]) for place in places]
        drawn = axis.plot([place + shift for place in places], means, label=label, linewidth=1.8)
        for place in places:
            values = points[place]
            axis.plot([place + shift] * len(values), values, "o-", color=drawn[0].get_color(), alpha=0.5, linewidth=1)
    axis.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
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
    """Run a grid's experiments; write the table and the picture beside its file, when stopped as well."""
    runs, x, y = read_grid(path)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{FOLDER}: expected no other sweep of this checkout, found one running") from None
        signal.signal(signal.SIGTERM, _interrupt)
        failed: list[Run] = []
        try:
            failed = run_all(runs, jobs)
        finally:
            columns, rows = table(runs, failed)
            cells = [[row.get(column, "") for column in columns] for row in rows]
            reporting.write_csv(path.with_suffix(".csv"), columns, cells)
    if failed:
        logs = ", ".join(str(run.log) for run in failed)
        raise InputError(f"{len(failed)} of {len(runs)} experiments: expected success, failed: {logs}")
    draw(rows, [column for column in columns[3:-1] if "/" not in column], x, y, path.with_suffix(".png"))
    reporting.log(f"{len(runs)} experiments: {path.with_suffix('.csv')} and {path.with_suffix('.png')}")


def _main() -> None:
    parser = argparse.ArgumentParser(description="run a grid of experiments")
    parser.add_argument("grid", type=Path)
    parser.add_argument("--jobs", type=int, default=0, help="so many at a time (default: half as many as cores)")
    arguments = parser.parse_args()
    sweep(arguments.grid, arguments.jobs)


if __name__ == "__main__":
    reporting.run(_main)
