"""Count the looks at test: the distinct sets of models that evaluate has scored, over all commits of all refs.

    python scripts/test_looks.py

A model that was changed after a look at its test score is tuned on test, a little. So it matters how many looks there
were, and what differed between them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH
from flatmin.common import errors, files

NOT_SEEN = (
    "It cannot see looks of deleted experiments and branches, of other clones (those in .studies/ too), of runs that "
    "were never committed, and by other means than evaluate."
)


class Look(NamedTuple):
    """The first dvc.lock with a set of models: its commit, its date, and all params that it records."""

    commit: str
    date: str
    params: Mapping[str, Any]


def looks() -> tuple[list[Look], int]:
    """The looks, oldest first, and how many versions of dvc.lock can't be read."""
    found: dict[frozenset[str], Look] = {}
    broken = 0
    for commit, date, text in versions():
        try:
            stages = yaml.safe_load(text)["stages"]
            models = scored(stages)
        except (yaml.YAMLError, KeyError, TypeError, AttributeError):
            broken += 1
            continue
        if models and models not in found:
            found[models] = Look(commit, date, recorded_params(stages))
    return list(found.values()), broken


def versions() -> Iterator[tuple[str, str, str]]:
    """Commit, date and text of each distinct dvc.lock, oldest first; last the one in the working tree."""
    # --full-history: also a merge's own, and those of a branch that a merge has dropped.
    listed = git(
        "log", "--all", "--full-history", "-m", "--date-order", "--reverse", "--format=%h %cs", "--", "dvc.lock"
    )
    seen = set[str]()
    for commit, date in (line.split() for line in listed.splitlines()):
        text = git("show", f"{commit}:dvc.lock", check=False)
        if text and text not in seen:
            seen.add(text)
            yield commit, date, text
    lock = Path("dvc.lock")
    if lock.exists() and lock.read_text(encoding="utf-8") not in seen:
        yield "dvc.lock", "not committed", lock.read_text(encoding="utf-8")


def git(*arguments: str, check: bool = True) -> str:
    return subprocess.run(["git", *arguments], check=check, capture_output=True, text=True, errors="replace").stdout


def scored(stages: Mapping[str, Any]) -> frozenset[str]:
    """The digests of the models that evaluate depends on, whatever their folders were called; none without evaluate."""
    deps = stages.get("evaluate", {}).get("deps", [])
    return frozenset(dep["md5"] for dep in deps if dep["path"].startswith("models/"))


def recorded_params(stages: Mapping[str, Any]) -> dict[str, Any]:
    """All params of a dvc.lock by key, those of the code, such as RESULTS_VERSION, too."""
    found: dict[str, Any] = {}
    for stage in stages.values():
        for values in stage.get("params", {}).values():
            found |= dict(files.leaves(values))
    return found


def differing(found: list[Look]) -> list[str]:
    """For each look, the keys that not all looks have with one value, with its own values."""
    keys = dict.fromkeys(key for look in found for key in look.params)
    varying = [key for key in keys if len({str(look.params.get(key)) for look in found}) > 1]
    return [", ".join(f"{key} {look.params[key]}" for key in varying if key in look.params) for look in found]


def main() -> None:
    found, broken = looks()
    for number, (look, params) in enumerate(zip(found, differing(found), strict=True), 1):
        print(f"{number}. {look.commit} {look.date}: {params or 'the only params'}")
    print(f"{len(found)} sets of models were scored on test.")
    if broken:
        print(
            f"Not counted, because they are not what DVC writes, after a merge perhaps: versions of dvc.lock, {broken}."
        )
    print(NOT_SEEN)


if __name__ == "__main__":
    errors.run(main)
