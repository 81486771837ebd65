"""Run a grid of DVC experiments, several at a time; write their table, a picture and what val tells apart next to it.

    python scripts/sweep.py studies/digits/sweep.yaml [--jobs N]

Each experiment runs on its own cores in a clone of the checkout (the last commit plus changes to tracked files), and is
stored as a DVC experiment. Its name has a digest of its targets and params, so the same command, given again
after a kill, runs what has not succeeded yet and nothing else. docs/sweeps.md has the details.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import on_val
from dvc.utils.serialize import modify_yaml
from grids import FOLDER, Run, output, read_grid, set_value
from runs_table import Row, describe, draw, find, on_cores, read_table, table

from flatmin.common import console, errors, files
from flatmin.common.errors import InputError

# Its standard input is a pipe that the sweep alone holds. When that closes, as the sweep was killed, the run's process
# group ends itself: no process is ever ended by a number that may be another's by now.
TIED = ["sh", "-c", 'exec 3<&0 </dev/null; { read -r _ <&3; kill -KILL 0; } & exec "$@" 3<&-', "sh"]
PLACES = ("FLATMIN_CACHE", "FLATMIN_WEIGHTS", "TFDS_DATA_DIR")  # variables that may be relative to the checkout


@dataclass(frozen=True)
class Worker:
    """A run's process in a clone, with its own process group.

    began: the start, on the monotonic clock in seconds, minus the time of earlier attempts.
    """

    run: Run
    slot: int
    clone: Path
    process: subprocess.Popen[bytes]
    began: float


def run_all(runs: Sequence[Run], jobs: int, previous: Mapping[str, Row], failed: list[Run]) -> None:
    """Run what has not succeeded, `jobs` at a time on equally many cores each; append what fails to `failed`."""
    here = {run.name for run in runs if find(run)}  # only the table has the others, maybe from another machine
    pending = [run for run in runs if run.name not in previous.keys() | here]
    console.log(f"{len(runs)} experiments: {len(runs) - len(pending)} have succeeded, {len(pending)} to run")
    if not pending:
        return
    slots = divide_cores(sorted(os.sched_getaffinity(0)), jobs, len(runs))
    workers: list[Worker] = []
    available = {shared for run in runs if run.name in here for shared in run.shared}
    try:
        origin = describe(make_base(), slots[0])
        while pending or workers:
            busy = {shared for worker in workers for shared in worker.run.shared} - available
            run = next((run for run in pending if not run.shared & busy), None)
            if run and len(workers) < len(slots):
                pending.remove(run)
                slot = min(set(range(len(slots))) - {worker.slot for worker in workers})
                workers.append(start(run, slot, slots[slot], origin))
                continue
            time.sleep(1)
            for worker in [worker for worker in workers if worker.process.poll() is not None]:
                if finish(worker):
                    available |= worker.run.shared
                else:
                    failed.append(worker.run)
                workers.remove(worker)
    finally:
        for worker in workers:
            end(worker)
        for clone in FOLDER.glob("clone-*"):
            shutil.rmtree(clone, ignore_errors=True)


def divide_cores(cores: Sequence[int], jobs: int, runs: int) -> list[Sequence[int]]:
    """The cores of each job. jobs 0 means half as many as cores; there are never more than runs in the grid.

    Every job has equally many, however few runs are left: the number of cores changes a training's numbers.
    """
    jobs = max(1, min(jobs or len(cores) // 2, len(cores), runs))
    each = len(cores) // jobs
    return [cores[slot * each : (slot + 1) * each] for slot in range(jobs)]


def make_base() -> Path:
    """Clone this checkout as it is now: with changes to tracked files, the settings of git and DVC, and DVC's cache."""
    base = FOLDER / "clone-base"
    shutil.rmtree(base, ignore_errors=True)  # of a sweep that was killed
    output("git", "clone", "--quiet", ".", str(base))
    changes = output("git", "-c", "user.name=sweep", "-c", "user.email=sweep", "stash", "create").strip()
    if changes:
        output("git", "fetch", "--quiet", os.getcwd(), changes, cwd=base)
        output("git", "read-tree", "-u", "--reset", changes, cwd=base)
        output("git", "reset", "--quiet", cwd=base)
    for settings in (".git/config", ".dvc/config.local"):
        if Path(settings).exists():
            shutil.copy2(settings, base / settings)
    output("dvc", "config", "--local", "cache.dir", output("dvc", "cache", "dir").strip(), cwd=base)
    return base


def start(run: Run, slot: int, cores: Sequence[int], origin: Mapping[str, Any]) -> Worker:
    """Start a run in a copy of the base, on these cores; `origin` is its code and machine."""
    clone = FOLDER / f"clone-{slot}"
    shutil.rmtree(clone, ignore_errors=True)
    shutil.copytree(FOLDER / "clone-base", clone, symlinks=True)
    write_params(clone / "params.yaml", run.values)
    record = run.file("json")
    before = files.read_json(record)["seconds"] if record.exists() else 0
    files.write_json(record, {**origin, "seconds": before})
    command = [*on_cores(cores), *TIED, "dvc", "exp", "run", "--name", run.name, *run.targets]
    console.log(f"{run.name}: started")
    with run.file("log").open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=clone,
            env=os.environ | absolute_places(),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Worker(run, slot, clone, process, time.monotonic() - before)


def write_params(path: Path, values: Mapping[str, Any]) -> None:
    """Set these keys in a YAML file, whose comments stay."""
    with modify_yaml(path) as document:
        for key, value in values.items():
            set_value(document, key, value, str(path))


def absolute_places() -> dict[str, str]:
    """The folders in the environment, for a process that works elsewhere. TFDS also takes ~ and such as gs://."""
    places = {name: os.environ[name] for name in PLACES if os.environ.get(name)}
    return {name: os.path.abspath(place) for name, place in places.items() if not re.match(r"~|\w+://", place)}


def finish(worker: Worker) -> bool:
    """Fetch an ended run's experiment into this checkout; whether it succeeded."""
    run = worker.run
    seconds = end(worker)  # if DVC was killed, the stage that it had started still runs
    if worker.process.returncode == 0:
        head = output("git", "rev-parse", "HEAD", cwd=worker.clone).strip()
        ref = f"refs/exps/{head[:2]}/{head[2:]}/{run.name}"
        subprocess.run(["git", "fetch", "--quiet", str(worker.clone), f"+{ref}:{ref}"], check=False)
    succeeded = find(run) is not None
    outcome = "succeeded" if succeeded else f"failed, see {run.file('log')}"
    console.log(f"{run.name}: {outcome} ({seconds} s)")
    return succeeded


def end(worker: Worker) -> float:
    """End all processes of a run, and return the seconds that all its attempts took.

    A training's saved state is complete at any time.
    """
    with worker.process, contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=10)
        os.killpg(worker.process.pid, signal.SIGKILL)
    seconds = round(time.monotonic() - worker.began, 1)
    record = worker.run.file("json")
    files.write_json(record, files.read_json(record) | {"seconds": seconds})
    return seconds


def sweep(path: Path, jobs: int) -> None:
    """Run a grid's experiments; write the table next to its file (also when stopped), a picture and what val says."""
    if not os.getcwd().isascii():
        raise InputError(
            f"{os.getcwd()}: expected a path in ASCII, since DVC can't configure a clone elsewhere; move the checkout"
        )
    runs, picture = read_grid(path)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{FOLDER}: expected no other sweep of this checkout, found one running") from None
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        written = path.with_suffix(".csv")
        previous, failed = read_table(written), list[Run]()
        others = previous.keys() - {run.name for run in runs}
        if others:
            console.log(f"note: {written}: {len(others)} runs there are not in the grid with these params")
        try:
            run_all(runs, jobs, previous, failed)
        finally:
            columns, rows = table(runs, previous, failed)
            # A table of other params stays until one of these runs has succeeded.
            if not previous or any(row["status"] == "succeeded" for row in rows):
                files.write_csv(written, columns, [[row.get(column, "") for column in columns] for row in rows])
    if failed:
        logs = ", ".join(str(run.file("log")) for run in failed)
        raise InputError(f"{len(failed)} of {len(runs)} experiments: expected success, failed: {logs}")
    outputs, apart = [written], path.with_suffix(".val.md")
    if on_val.write(runs, apart):
        outputs.append(apart)
    if picture:
        outputs.append(path.with_suffix(".png"))
        draw(columns, rows, picture, outputs[-1])
    console.log(f"{len(runs)} experiments: {', '.join(map(str, outputs))}")


def _main() -> None:
    parser = argparse.ArgumentParser(description="run a grid of experiments")
    parser.add_argument("grid", type=Path)
    parser.add_argument("--jobs", type=int, default=0, help="how many run at a time (default: half as many as cores)")
    arguments = parser.parse_args()
    sweep(arguments.grid, arguments.jobs)


if __name__ == "__main__":
    errors.run(_main)
