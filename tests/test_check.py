"""The check of params.yaml: one line of what is wrong, or what will run and what differences its images can show."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT, TINY

from flatmin import check, power

COUNTS = {"test": 180, "val": 54}
UNKNOWN = "which differences test and val can show is known after prepare"


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where prepare has run for params.yaml, as dvc.lock says."""
    monkeypatch.chdir(tmp_path)
    Path("metrics").mkdir()
    roles = {role: {"count": count} for role, count in {"train": 60, **COUNTS}.items()}
    Path(check.PREPARED).write_text(json.dumps({"roles": roles}))
    write_params()
    write_lock(TINY["data"])
    return tmp_path


def write_params(**sections: Any) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(TINY | sections))


def write_lock(data: Any, path: str = check.PREPARED) -> None:
    """Write what DVC keeps of prepare: the values of `data`, and a digest of each output."""
    digest = hashlib.md5(Path(check.PREPARED).read_bytes(), usedforsecurity=False).hexdigest()
    outs = [{"path": "data/records", "md5": "0.dir"}, {"path": path, "hash": "md5", "md5": digest, "size": 9}]
    stage = {"cmd": "true", "params": {"params.yaml": {"data": data}}, "outs": outs}
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"prepare": stage}}))


def test_prepared_counts_of_a_recorded_run_are_its_test_and_val_images() -> None:
    assert check.prepared_counts() == COUNTS
    # Other sections, and how the file is written, change no record.
    values = copy.deepcopy(TINY) | {"seeds": [1, 2]}
    Path("other.yaml").write_text(yaml.safe_dump(values, sort_keys=False, default_flow_style=True))
    assert check.prepared_counts("other.yaml") == COUNTS


def run_with_other_data() -> None:
    write_params(data=TINY["data"] | {"seed": 8})


def never_run() -> None:
    Path("dvc.lock").unlink()


def run_of_another_stage() -> None:
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")


def lock_is_damaged() -> None:
    Path("dvc.lock").write_text("<<<<<<< HEAD\n")


def lock_is_empty() -> None:
    Path("dvc.lock").write_text("")


def metrics_are_another_runs() -> None:
    Path(check.PREPARED).write_text(json.dumps({"roles": {role: {"count": 1} for role in COUNTS}}))


def metrics_are_missing() -> None:
    Path(check.PREPARED).unlink()


def metrics_are_not_recorded() -> None:
    write_lock(TINY["data"], "metrics/other.json")


def metrics_have_no_counts() -> None:
    Path(check.PREPARED).write_text("{}")
    write_lock(TINY["data"])


@pytest.mark.parametrize(
    "change",
    [
        run_with_other_data,
        never_run,
        run_of_another_stage,
        lock_is_damaged,
        lock_is_empty,
        metrics_are_another_runs,
        metrics_are_missing,
        metrics_are_not_recorded,
        metrics_have_no_counts,
    ],
)
def test_prepared_counts_without_a_recorded_run_of_these_params_are_unknown(change: Any) -> None:
    change()
    assert check.prepared_counts() is None


def command(*arguments: str) -> tuple[int, str, str]:
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": ""}
    run = [sys.executable, "-m", "flatmin.check", *arguments]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_check_command_prints_the_seeds_and_what_the_images_can_show() -> None:
    write_params(seeds=[7, 42])
    assert command() == (0, f"params.yaml: valid, seeds 7, 42\n{power.describe(COUNTS)}\n", "")
    run_with_other_data()
    assert command() == (0, f"params.yaml: valid, seeds 7\n{UNKNOWN}\n", "")


def test_check_command_of_wrong_params_prints_one_line() -> None:
    write_params(sam=TINY["sam"] | {"rho": -1})
    expected = "error: params.yaml: sam.rho: expected greater than or equal to 0, received -1\n"
    assert command() == (1, "", expected)
    values = {key: value for key, value in TINY.items() if key != "seeds"} | {"seed": 42}
    Path("params.yaml").write_text(yaml.safe_dump(values))
    status, out, error = command("params.yaml")
    assert (status, out) == (1, "")
    assert error.startswith("error: params.yaml: seed: expected seeds, a list")
    assert error.count("\n") == 1


def test_prepared_counts_with_a_lock_that_dvc_wrote_are_those_of_its_metrics() -> None:
    shutil.copy(ROOT / "dvc.lock", "dvc.lock")
    shutil.copy(ROOT / check.PREPARED, check.PREPARED)
    recorded = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["prepare"]["params"]["params.yaml"]
    write_params(data=recorded["data"])
    counts = check.prepared_counts()
    assert counts == {role: json.loads(Path(check.PREPARED).read_text())["roles"][role]["count"] for role in COUNTS}
