"""Read a grid: the file that lists which experiments a sweep runs. docs/sweeps.md describes its keys."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH, as in the image
from flatmin.common import params
from flatmin.common.errors import InputError

FOLDER = Path(".dvc/tmp/sweep")
METRICS = {  # stage -> its file in metrics/, or its folder with a file for each seed, of those that a table shows
    "select-best": "select",
    "finetune": "finetune",
    "sam-finetune": "sam",
    "control": "control",
    "finalize": "final",
    "evaluate": "evaluate",
}
SEEDED = ("finetune", "sam-finetune", "control")  # stages that run once for each of `seeds`
SEEDS = ("seeds", "data.seed", "extract.seed")  # keys in which runs of one setting differ
Pipeline = Mapping[str, Any]  # stage -> its definition in dvc.yaml


@dataclass(frozen=True)
class Run:
    """One experiment.

    values: the params that the grid sets. settings: all params, with these. stages: all that it needs. shared: one
    string for each stage whose outputs other runs may need too; one run computes them, the others find them in DVC's
    cache.
    """

    name: str
    command: Sequence[str]
    targets: Sequence[str]
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    stages: set[str]
    shared: frozenset[str]

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    @property
    def clock(self) -> Path:
        """The file with the total seconds of all attempts."""
        return FOLDER / f"{self.name}.seconds"

    @property
    def provenance(self) -> Path:
        """The file with the code and machine of the last attempt (provenance.py)."""
        return FOLDER / f"{self.name}.json"

    @property
    def process(self) -> Path:
        """The file that identifies the process of the current attempt."""
        return FOLDER / f"{self.name}.process"


def read_grid(path: Path) -> tuple[list[Run], tuple[str, str] | None]:
    """The runs of a grid's file, each once, and the picture's x and y where it asks for one.

    Raises:
        InputError: a key or value is not as in docs/sweeps.md, or the schema refuses the resulting params.
    """
    grid = _yaml(path)
    unknown = [key for key in grid if key not in ("targets", "runs", "picture")]
    if unknown:
        raise InputError(f"{path}: {unknown[0]}: expected targets, runs or picture, received this key")
    lists = grid.get("runs")
    if not isinstance(lists, list) or not lists:
        raise InputError(f"{path}: runs: expected a list of grids, received {lists!r}")
    pipeline, params_yaml = read_pipeline(), _yaml(Path("params.yaml"))
    runs: dict[str, Run] = {}
    for index, values in enumerate(lists):
        where = f"{path}: runs.{index}"
        if not isinstance(values, dict) or not values:
            raise InputError(f"{where}: expected a mapping from keys of params.yaml to lists, received {values!r}")
        values = {"targets": grid.get("targets", []), **values}
        targets = _targets(values.pop("targets"), pipeline, path)
        for key, choices in values.items():
            if not isinstance(key, str) or not re.fullmatch(r"\w+(\.\w+)*", key):
                raise InputError(f"{where}: expected a key of params.yaml such as sam.rho, received {key!r}")
            if not isinstance(choices, list) or not choices:
                raise InputError(f"{where}.{key}: expected a list of at least one value, received {choices!r}")
        varying = [key for key, choices in values.items() if len(choices) > 1] or list(values)
        for chosen in itertools.product(*values.values()):
            settings = copy.deepcopy(params_yaml)
            run = make_run(dict(zip(values, chosen, strict=True)), varying, targets, settings, pipeline, where)
            runs.setdefault(run.name, run)
    listed = list(runs.values())
    return listed, _picture(grid["picture"], listed, path) if "picture" in grid else None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a grid as in docs/sweeps.md, found no file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not text, a 30th of February
        raise InputError(f"{path}: expected YAML, received {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping, received {type(values).__name__}")
    return values


def read_pipeline() -> Pipeline:
    """The stages of dvc.yaml."""
    stages: Pipeline = _yaml(Path("dvc.yaml"))["stages"]
    return stages


def _targets(targets: Any, pipeline: Pipeline, path: Path) -> tuple[str, ...]:
    for target in targets if isinstance(targets, list) else [targets]:
        if not isinstance(targets, list) or target not in pipeline or targets.count(target) > 1:
            expected = f"a list of {', '.join(pipeline)}, each once"
            raise InputError(f"{path}: targets: expected {expected}, received {target!r}")
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


def make_run(
    values: Mapping[str, Any],
    varying: Sequence[str],
    targets: Sequence[str],
    settings: dict[str, Any],
    pipeline: Pipeline,
    where: str,
) -> Run:
    """A run with its settings, checked by the schema.

    varying: the keys that go into its name. settings: params.yaml's, which this changes. where: begins an error's
    message.
    """
    overrides: list[str] = []
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
        if last in section and isinstance(value, dict):  # otherwise it would be merged with the present one
            overrides += ["-S", f"~{key}"]
            del section[last]
        overrides += ["-S", f"{'' if last in section else '+'}{key}={_hydra(value)}"]
        section[last] = value
    checked = params.parse(settings, where)
    stages = needed_stages(targets, pipeline)
    words = [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items() if key in varying]
    prefix = re.sub(r"[^A-Za-z0-9.]+|\.\.+", "-", "-".join([*words, *targets]))
    name = f"{prefix[:80].strip('-.')}-{identity(targets, checked, pipeline)}"
    shared = frozenset(f"{stage} {identity([stage], checked, pipeline)}" for stage in METRICS if stage in stages)
    command = ["dvc", "exp", "run", "--name", name, *overrides, *targets]
    return Run(name, command, targets, values, settings, stages, shared)


def identity(targets: Sequence[str], settings: params.Params, pipeline: Pipeline) -> str:
    """A digest of what determines a run's results: its targets and the params of the sections that its stages use.

    The order of keys does not matter, nor whether a default value is written out, so a new key in the schema renames no
    run. The code is no part of it; its version is a column of the table.
    """
    used = used_params(needed_stages(targets, pipeline), pipeline)
    values = settings.model_dump(mode="json", exclude_defaults=True)
    sections = {name: section for name, section in values.items() if name in used}
    for section, _, key in (name.partition(".") for name in sorted(used)):
        if key and section not in used and key in values[section]:
            sections.setdefault(section, {})[key] = values[section][key]
    return hashlib.sha256(json.dumps([list(targets), sections], sort_keys=True).encode()).hexdigest()[:8]


def needed_stages(targets: Sequence[str], pipeline: Pipeline) -> set[str]:
    """The targets, or all stages where there are none, with every stage whose outputs they need."""
    needed = set(targets or pipeline)
    pending = list(needed)
    while pending:
        wanted = _paths(pipeline[pending.pop()], "deps")
        for name, stage in pipeline.items():
            made = _paths(stage, "outs", "metrics", "plots")
            if name not in needed and any(_overlap(*pair) for pair in itertools.product(wanted, made)):
                needed.add(name)
                pending.append(name)
    return needed


def used_params(stages: Iterable[str], pipeline: Pipeline) -> set[str]:
    """The sections of params.yaml that stages read, or that dvc.yaml itself fills in (`${backbones}`).

    Single keys are among them where a stage reads no more of a section: `extract.image_size`.
    """
    used = set[str]()
    for stage in stages:
        used |= {key for key in pipeline[stage].get("params", ()) if isinstance(key, str)}
        used |= set(re.findall(r"\$\{(\w+)", json.dumps(pipeline[stage])))
    return used


def _paths(stage: Mapping[str, Any], *kinds: str) -> list[str]:
    entries = [entry for kind in kinds for entry in stage.get(kind, [])]  # each a path, or a path with its settings
    return [f"{path}/" for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]


def _overlap(one: str, other: str) -> bool:
    """Whether one path is the other, or lies within it."""
    return one.startswith(other) or other.startswith(one)


def _hydra(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_hydra, value)) + "]"
    if isinstance(value, str):  # a backslash stands for itself, except before a quote
        quoted = re.sub(r'(\\*)("|\Z)', lambda match: 2 * match[1] + (match[2] and r"\""), value)
        return f'"{quoted}"'
    return json.dumps(value, default=str)  # a date: the schema refuses it
