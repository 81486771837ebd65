"""Run a grid of DVC experiments, several at a time; write their table, a picture and what val tells apart next to it.

    python scripts/sweep.py studies/digits/sweep.yaml [--jobs N] [--mix-versions]

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
from grids import FOLDER, Run, output, read_grid, set_value
from ruamel.yaml import YAML
from runs_table import Row, check_versions, cores_only, describe, draw, find, read_table, table

from flatmin.common import console, errors, files
from flatmin.common.errors import InputError

# The process records its own number, start and boot before it becomes the run, so a sweep killed at any moment has left
# it: fields 1 and 22 of /proc/PID/stat, whose second one is `(sh)` then.
RECORDED = ["sh", "-c", 'cut -d " " -f 1,22 /proc/$$/stat | cat - /proc/sys/kernel/random/boot_id >"$0" && exec "$@"']
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

    def has_ended(self) -> bool:
        """Whether the process has ended. Also stores the run's seconds so far, since the sweep itself may be killed."""
        with files.atomic_write(self.run.file("seconds")) as temporary:
            temporary.write_text(f"{time.monotonic() - self.began:.1f}")
        return self.process.poll() is not None


def run_all(runs: Sequence[Run], jobs: int, previous: Mapping[str, Row], failed: list[Run]) -> None:
    """Run what has not succeeded, `jobs` at a time on equally many cores each; append what fails to `failed`."""
    here = {run.name for run in runs if find(run)}  # only the table has the others, maybe from another machine
    pending = [run for run in runs if run.name not in previous.keys() | here]
    console.log(f"{len(runs)} experiments: {len(runs) - len(pending)} have succeeded, {len(pending)} to run")
    clear()
    if not pending:
        return
    slots = divide_cores(sorted(os.sched_getaffinity(0)), jobs, len(runs))
    workers: list[Worker] = []
    available = {shared for run in runs if run.name in here for shared in run.shared}
    try:
        make_base()
        origin = describe(FOLDER / "base", slots[0])
        while pending or workers:
            busy = {shared for worker in workers for shared in worker.run.shared} - available
            run = next((run for run in pending if not run.shared & busy), None)
            if run and len(workers) < len(slots):
                pending.remove(run)
                slot = min(set(range(len(slots))) - {worker.slot for worker in workers})
                workers.append(start(run, slot, slots[slot], origin))
                continue
            time.sleep(1)
            for worker in [worker for worker in workers if worker.has_ended()]:
                if finish(worker):
                    available |= worker.run.shared
                else:
                    failed.append(worker.run)
                workers.remove(worker)
    finally:
        for worker in workers:
            end(worker)
        clear()


def divide_cores(cores: Sequence[int], jobs: int, runs: int) -> list[Sequence[int]]:
    """The cores of each job. jobs 0 means half as many as cores; there are never more than runs in the grid.

    Every job has equally many, however few runs are left: the number of cores changes a training's numbers.
    """
    jobs = max(1, min(jobs or len(cores) // 2, len(cores), runs))
    each = len(cores) // jobs
    return [cores[slot * each : (slot + 1) * each] for slot in range(jobs)]


def make_base() -> None:
    """Clone this checkout as it is now: with changes to tracked files, git's identity, DVC's settings and cache."""
    base = FOLDER / "base"
    output("git", "clone", "--quiet", ".", str(base))
    changes = output("git", "-c", "user.name=sweep", "-c", "user.email=sweep", "stash", "create").strip()
    if changes:
        output("git", "fetch", "--quiet", os.getcwd(), changes, cwd=base)
        output("git", "read-tree", "-u", "--reset", changes, cwd=base)
        output("git", "reset", "--quiet", cwd=base)
    for key in ("user.name", "user.email"):
        value = subprocess.run(["git", "config", key], capture_output=True, text=True, check=False).stdout.strip()
        if value:
            output("git", "config", key, value, cwd=base)
    if Path(".dvc/config.local").exists():
        shutil.copy2(".dvc/config.local", base / ".dvc/config.local")
    output("dvc", "config", "--local", "cache.dir", output("dvc", "cache", "dir").strip(), cwd=base)


def start(run: Run, slot: int, cores: Sequence[int], origin: Mapping[str, Any]) -> Worker:
    """Start a run in a copy of the base, on these cores; `origin` is its code and machine."""
    clone = FOLDER / f"clone-{slot}"
    shutil.rmtree(clone, ignore_errors=True)
    shutil.copytree(FOLDER / "base", clone, symlinks=True)
    write_params(clone / "params.yaml", run.values)
    places = {name: os.environ[name] for name in PLACES if os.environ.get(name)}
    # TFDS also takes ~ and addresses such as gs://.
    absolute = {name: os.path.abspath(place) for name, place in places.items() if not re.match(r"~|\w+://", place)}
    files.write_json(run.file("json"), origin)
    clock = run.file("seconds")
    began = time.monotonic() - (float(clock.read_text()) if clock.exists() else 0)
    console.log(f"{run.name}: started")
    command = [*RECORDED, str(run.file("process").resolve()), "dvc", "exp", "run", "--name", run.name, *run.targets]
    with run.file("log").open("ab") as log, cores_only(cores):
        process = subprocess.Popen(
            command, cwd=clone, env=os.environ | absolute, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Worker(run, slot, clone, process, began)


def write_params(path: Path, values: Mapping[str, Any]) -> None:
    """Set these keys in a YAML file, whose comments stay."""
    editor = YAML()
    editor.width = 4096
    document = editor.load(path)
    for key, value in values.items():
        set_value(document, key, value, str(path))
    editor.dump(document, path)


def finish(worker: Worker) -> bool:
    """Fetch an ended run's experiment into this checkout; whether it succeeded."""
    run = worker.run
    end(worker)  # if DVC was killed, the stage that it had started still runs
    if worker.process.returncode == 0:
        head = output("git", "rev-parse", "HEAD", cwd=worker.clone).strip()
        ref = f"refs/exps/{head[:2]}/{head[2:]}/{run.name}"
        subprocess.run(["git", "fetch", "--quiet", str(worker.clone), f"+{ref}:{ref}"], check=False)
    succeeded = find(run) is not None
    outcome = "succeeded" if succeeded else f"failed, see {run.file('log')}"
    console.log(f"{run.name}: {outcome} ({run.file('seconds').read_text()} s)")
    return succeeded


def end(worker: Worker) -> None:
    """End everything that a run's process started; a training's saved state is complete at any time."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(timeout=10)
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    worker.run.file("process").unlink(missing_ok=True)


def clear() -> None:
    """End and delete what a killed sweep of this checkout left: processes by their recorded numbers, and clones."""
    for path in FOLDER.glob("*.process"):
        group = recorded_group(path)
        if group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        path.unlink()
    for clone in [FOLDER / "base", *FOLDER.glob("clone-*")]:
        shutil.rmtree(clone, ignore_errors=True)


def recorded_group(path: Path) -> int | None:
    """The process group in a run's file, unless its number belongs to a later process now."""
    try:
        group, began, boot = path.read_text().split()
    except ValueError:  # cut short by a kill
        return None
    if boot != Path("/proc/sys/kernel/random/boot_id").read_text().strip():
        return None
    with contextlib.suppress(FileNotFoundError):  # the first process has ended, what it started may still run
        if Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[19] != began:
            return None
    return int(group)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def sweep(path: Path, jobs: int, mix_versions: bool = False) -> None:
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
        signal.signal(signal.SIGTERM, _interrupt)
        written = path.with_suffix(".csv")
        previous, failed = read_table(written), list[Run]()
        check_versions(written, runs, previous, mix_versions)
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
    parser.add_argument("--mix-versions", action="store_true", help="allow several results versions in the table")
    arguments = parser.parse_args()
    sweep(arguments.grid, arguments.jobs, arguments.mix_versions)


if __name__ == "__main__":
    errors.run(_main)
