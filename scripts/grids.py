"""Read a grid, the file that says which experiments a sweep runs. docs/sweeps.md tells what stands in it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, "src")  # of the checkout to run in: a study's clone may have an older schema
from flatmin import params
from flatmin.reporting import InputError

FOLDER = Path(".dvc/tmp/sweep")
METRICS = {  # stage -> its file in metrics/, of the stages that a table shows, in their order
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
        if not isinstance(targets, list) or target not in stages or targets.count(target) > 1:
            raise InputError(f"{path}: targets: expected a list of {', '.join(stages)}, each once, received {target!r}")
    return tuple(targets)


def _picture(picture: Any, runs: Sequence[Run], path: Path) -> tuple[str, str]:
    if not isinstance(picture, dict) or set(picture) != {"x", "y"}:
        raise InputError(f"{path}: picture: expected x and y, received {picture!r}")
    keys = list({key: None for run in runs for key in run.values})
    if picture["x"] not in keys:
        raise InputError(f"{path}: picture.x: expected one of {', '.join(keys)}, received {picture['x']!r}")
    files = [file for stage, file in METRICS.items() if any(stage in run.stages for run in runs)]
    file, _, metric = str(picture["y"]).partition("/")
    if file not in files or not metric:
        example = f"{' or '.join(files)}, a slash and a metric such as val.accuracy"
        raise InputError(f"{path}: picture.y: expected {example}, received {picture['y']!r}")
    return picture["x"], picture["y"]


def make_run(values: Mapping[str, Any], told: Sequence[str], targets: Sequence[str], where: str) -> Run:
    """A run with its settings, checked by the schema; `told` are the keys in its name, `where` begins a message."""
    settings, given = _yaml(Path("params.yaml")), []
    for key, value in values.items():
        if "${" in str(value):
            raise InputError(
                f"{where}: {key}: expected no ${{, which DVC takes for another key's value, received {value!r}"
            )
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
    stages |= set(ALWAYS) if stages & set(METRICS) else set()
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
    if isinstance(value, str):  # a backslash stands for itself but before a quote
        quoted = re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + (found[2] and r"\""), value)
        return f'"{quoted}"'
    return json.dumps(value, default=str)  # a date: the schema refuses it
