"""Record an edit of the code that moves no number, without running the study again.

DVC runs a stage whose code changed. After a refactor that is in vain: this asks DVC whether code is all that changed,
runs the golden test, records the code in dvc.lock and lists it as accepted in accepted.json, so that caches are found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc.repo import Repo

from flatmin.common import errors, identity
from flatmin.common.errors import InputError, first_line
from flatmin.common.params_errors import read_yaml
from flatmin.common.stage import CODE

GOLDEN_TEST = "tests/golden.py"


def main() -> None:
    check_version()
    check_only_code_changed()
    for room in identity.rooms():
        identity.source_digest(room)  # what the golden test is about to show
    run_golden_test()
    # Again, since a minute has passed: DVC records everything as it is now.
    identity.check_source_unchanged()
    check_only_code_changed()
    dvc("commit", "--force", "--quiet")
    identity.write_accepted()


def check_version() -> None:
    version, _ = identity.read_accepted()
    if version not in (None, identity.RESULTS_VERSION):
        raise InputError(
            f"RESULTS_VERSION: expected {version}, as accepted.json has it, received {identity.RESULTS_VERSION}: "
            "numbers that change on purpose take `make golden` and `dvc repro`"
        )


def check_only_code_changed() -> None:
    """Raise a line for everything but code that differs from what dvc.lock records."""
    found = [*stages_never_run()] or [*changes(json.loads(dvc("status", "--json")))]
    for line in found[:-1]:
        print(f"error: {line}", file=sys.stderr)
    if found:
        raise InputError(found[-1])


def stages_never_run() -> Iterator[str]:
    """A line for each stage that dvc.lock does not know, or knows with other params, data or outputs.

    `dvc status` says nothing of an entry that dvc.yaml no longer has, nor of a frozen stage.
    """
    recorded = read_lock()
    dvc("stage", "list")  # words what is wrong with dvc.yaml in a line
    for stage in Repo().index.stages:
        name = stage.addressing
        if name not in recorded:
            yield f"{name}: never ran: run `dvc repro` first"
            continue
        if stage.frozen:
            yield f"{name}: expected a stage that is not frozen: `dvc status` says nothing of it"
        for kind, declared, locked in declared_and_locked(stage, recorded[name]):
            for entry in sorted(declared ^ locked):
                how = "is not in dvc.lock" if entry in declared else "is in dvc.lock alone"
                yield f"{name}: {kind} {entry}: {how}: run `dvc repro` first"


def read_lock() -> dict[str, Any]:
    if not Path("dvc.lock").exists():
        return {}
    try:
        stages = read_yaml("dvc.lock")["stages"]
        return dict(stages)
    except (KeyError, TypeError, ValueError):
        raise InputError("dvc.lock: expected stages, as `dvc repro` writes them, found none") from None


def declared_and_locked(stage: Any, lock: dict[str, Any]) -> Iterator[tuple[str, set[str], set[str]]]:
    """What dvc.yaml and dvc.lock name of params, data and outputs: (kind, names in dvc.yaml, names in dvc.lock)."""
    declared = {key for dep in stage.params for key in dep.params}
    yield "param", declared, {key for values in lock.get("params", {}).values() for key in values}
    deps = (dep.def_path for dep in stage.deps if dep not in stage.params)
    data, locked = (
        {path for path in paths if not path.startswith(CODE)} for paths in (deps, [dep["path"] for dep in lock["deps"]])
    )
    yield "dependency", data, locked
    yield "output", {out.def_path for out in stage.outs}, {out["path"] for out in lock.get("outs", ())}


def changes(status: dict[str, Any]) -> Iterator[str]:
    """A line for each change in `dvc status --json` but those of code and commands."""
    for stage, entries in status.items():
        for entry in entries:
            if entry == "changed command":
                continue
            kinds = entry if isinstance(entry, dict) else {entry: {}}
            for kind, items in kinds.items():
                if kind == "changed deps":
                    yield from changed_dependencies(stage, items)
                elif kind == "changed outs":
                    yield from changed_outputs(stage, items)
                else:
                    yield f"{stage}: {kind}: run `dvc repro` first"


def changed_dependencies(stage: str, items: dict[str, Any]) -> Iterator[str]:
    for path, change in items.items():
        if isinstance(change, dict):  # of a params file
            for key, how in change.items():
                yield f"{stage}: {path}: {key}: {how} since the stage ran: run `dvc repro` first"
        elif not path.startswith(CODE):
            yield f"{stage}: {path}: {change} since the stage ran: run `dvc repro` first"


def changed_outputs(stage: str, items: dict[str, str]) -> Iterator[str]:
    for path, change in items.items():
        missing = {"deleted": "missing", "not in cache": "missing in DVC's cache"}.get(change)
        if missing:
            yield f"{stage}: {path}: {missing}: run `dvc repro` or `dvc pull` first"
        else:
            yield f"{stage}: {path}: {change} since the stage wrote it: run `dvc repro` or `dvc checkout` first"


def run_golden_test() -> None:
    if not Path(GOLDEN_TEST).is_file():
        raise InputError(f"{GOLDEN_TEST}: expected the golden test, found none")
    if subprocess.run([sys.executable, GOLDEN_TEST]).returncode:
        raise InputError(f"{GOLDEN_TEST}: failed, so nothing is accepted")


def dvc(*arguments: str) -> str:
    """Run DVC; its standard output."""
    command = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True)
    if command.returncode:
        said = command.stderr.partition("ERROR: ")[2] or command.stderr
        raise InputError(f"dvc {arguments[0]}: {first_line(said)}")
    return command.stdout


if __name__ == "__main__":
    errors.run(main)
