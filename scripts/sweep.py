"""Run a grid of DVC experiments, several at a time; write a table of all, and a picture, beside the grid's file.

    python scripts/sweep.py studies/digits/sweep.yaml [--jobs N]

Each experiment runs in a clone of the checkout (last commit and changes to tracked files) on cores of its own, and
comes back as a DVC experiment. Its name has a digest of all it depends on, so that the same command, given again after
a kill, runs what has not succeeded and nothing else. docs/sweeps.md tells more.
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

from grids import FOLDER, Run, read_grid
from runs_table import Row, draw, find, output, read_kept, spread, table
from tqdm import tqdm

from flatmin import reporting
from flatmin.reporting import InputError

# What `git apply` reads, whatever the user's settings make of a diff.
DIFF = ["git", "diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--unified=3"]
DIFF += ["--src-prefix=a/", "--dst-prefix=b/", "HEAD"]


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


def run_all(runs: Sequence[Run], jobs: int, kept: Mapping[str, Row], failed: list[Run]) -> None:
    """Run what has not succeeded, so many at a time on a share of the cores each; put what fails into `failed`."""
    here = {run.name for run in runs if find(run)}  # what the table alone has may be another machine's
    pending = [run for run in runs if run.name not in kept.keys() | here]
    reporting.log(f"{len(runs)} experiments: {len(runs) - len(pending)} have succeeded, {len(pending)} to run")
    shares = share(sorted(os.sched_getaffinity(0)), jobs, len(runs))
    workers: list[Worker] = []
    made = {shared for run in runs if run.name in here for shared in run.shared()}
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
    output("git", "clone", "--quiet", ".", str(base))
    output("git", "checkout", "--quiet", "--detach", output("git", "rev-parse", "HEAD").strip(), cwd=base)
    changes = subprocess.run(DIFF, check=True, capture_output=True).stdout
    if changes:
        subprocess.run(["git", "apply", "--whitespace=nowarn"], cwd=base, input=changes, check=True)
    for key in ("user.name", "user.email"):
        value = subprocess.run(["git", "config", key], capture_output=True, text=True, check=False).stdout.strip()
        if value:
            output("git", "config", key, value, cwd=base)
    if Path(".dvc/config.local").exists():
        shutil.copy2(".dvc/config.local", base / ".dvc/config.local")
    output("dvc", "config", "--local", "cache.dir", output("dvc", "cache", "dir").strip(), cwd=base)


def start(run: Run, slot: int, cores: Sequence[int]) -> Worker:
    """Start a run in a copy of the base, on these cores."""
    clone = FOLDER / f"clone-{slot}"
    shutil.rmtree(clone, ignore_errors=True)
    shutil.copytree(FOLDER / "base", clone, symlinks=True)
    environment = {**os.environ, "FLATMIN_SWEEP": str(FOLDER.resolve())}
    for name in ("FLATMIN_CACHE", "FLATMIN_WEIGHTS", "TFDS_DATA_DIR"):
        given = environment.get(name)
        # TFDS takes ~ and addresses such as gs:// too.
        if given and not (name == "TFDS_DATA_DIR" and re.match(r"~|\w+://", given)):
            environment[name] = os.path.abspath(given)
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
        head = output("git", "rev-parse", "HEAD", cwd=worker.clone).strip()
        ref = f"refs/exps/{head[:2]}/{head[2:]}/{run.name}"
        subprocess.run(["git", "fetch", "--quiet", str(worker.clone), f"+{ref}:{ref}"], check=False)
    succeeded = find(run) is not None
    reporting.log(f"{run.name}: {'succeeded' if succeeded else f'failed, see {run.log}'} ({run.clock.read_text()} s)")
    return succeeded


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
        if kept and not kept.keys() & {run.name for run in runs}:
            commits = ", ".join(sorted({row.get("commit") or "?" for row in kept.values()}))
            reporting.log(f"note: {written}: the {len(kept)} runs there are of other code or params (commit {commits})")
        try:
            run_all(runs, jobs, kept, failed)
        finally:
            columns, rows = table(runs, kept, failed)
            if not kept or any(row["status"] == "succeeded" for row in rows):  # else of other code: stays until then
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
        keys = [column for column in columns[2:-2] if "/" not in column]
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
