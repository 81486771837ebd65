"""Where a run's numbers come from: written as the run starts, read into the columns of its table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grids import Run

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.common.identity import RESULTS_VERSION as RESULTS_VERSION

# Columns of a table. commit: 7 digits. dirty: whether the stages' code differed from the commit's. lock: the file of
# requirements/ and a digest of it. records: a digest of the records that the run trained on.
COLUMNS = ("commit", "dirty", "results_version", "lock", "machine", "cores", "records")
UNKNOWN = "unknown"
CODE = ("src", "stages", "dvc.yaml")
MACHINE = "from flatmin import runtime; print(', '.join(runtime.machine()))"


def describe(checkout: Path, cores: Sequence[int]) -> dict[str, Any]:
    """The provenance that all runs of a sweep share: those from this checkout on as many cores as these."""
    differs = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *CODE], cwd=checkout, check=False)
    lock = "gpu" if importlib.util.find_spec("nvidia") else "cpu"  # the CUDA wheels
    digest = files.sha256(checkout / f"requirements/{lock}.txt")
    return {
        "commit": output("git", "rev-parse", "--short=7", "HEAD", cwd=checkout).strip(),
        "dirty": bool(differs.returncode),
        "results_version": RESULTS_VERSION,
        "lock": f"{lock}-{digest[:8]}",
        "machine": _machine(checkout, cores),
        "cores": len(cores),
    }


def _machine(checkout: Path, cores: Sequence[int]) -> str:
    """The machine as a stage on these cores sees it."""
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # the process inherits it
    try:
        return output("env", "PYTHONPATH=src", sys.executable, "-c", MACHINE, cwd=checkout).splitlines()[-1]
    finally:
        os.sched_setaffinity(0, everything)


def read(run: Run, ref: str) -> dict[str, Any]:
    """The columns of a run that succeeded; `unknown` where another checkout made it."""
    written = files.read_json(run.provenance) if run.provenance.exists() else {}
    prepared = json.loads(output("git", "show", f"{ref}:metrics/prepare.json"))
    known = {
        **written,
        "commit": output("git", "rev-parse", "--short=7", f"{ref}^").strip(),
        "records": prepared["digest"][:12],
    }
    return {column: known.get(column, UNKNOWN) for column in COLUMNS}


def refuse_contradiction(name: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse two results of one run that differ in records or results version; `rows`: where each stands -> its row.

    Raises:
        InputError: they differ.
    """
    for column, what in (("results_version", "results version"), ("records", "digest of the records")):
        values = {where: str(row.get(column, UNKNOWN)) for where, row in rows.items()}
        if len(set(values.values()) - {UNKNOWN}) > 1:
            received = " and ".join(f"{value} ({where})" for where, value in values.items())
            raise InputError(f"{name}: expected one {what}, received {received}: delete one of them")


def output(*command: str, cwd: Path | None = None) -> str:
    """The output of a command.

    Raises:
        InputError: it fails.
    """
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(command)}: expected it to succeed, received: {done.stderr.strip()[:500]}")
    return done.stdout
