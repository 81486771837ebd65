"""Read a grid: the file that lists which experiments a sweep runs. docs/sweeps.md describes its keys."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH, as in the image
from flatmin.common import params
from flatmin.common.errors import InputError
from flatmin.common.params_errors import explain, read_yaml

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


class Picture(BaseModel):
    """A metric against a param, both columns of the table."""

    model_config = ConfigDict(extra="forbid")
    x: str
    y: str


class Grid(BaseModel):
    """A grid's file. Every entry of `runs` gives all combinations of its values; one may have targets of its own."""

    model_config = ConfigDict(extra="forbid")
    targets: list[str] = []
    runs: Annotated[list[dict[str, Annotated[list[Any], Field(min_length=1)]]], Field(min_length=1)]
    picture: Picture | None = None


@dataclass(frozen=True)
class Run:
    """One experiment.

    values: the params that the grid sets. settings: all params, with these. stages: all that it needs. shared: one
    string for each stage whose outputs other runs may need too; one run computes them, the others find them in DVC's
    cache.
    """

    name: str
    targets: Sequence[str]
    values: Mapping[str, Any]
    settings: Mapping[str, Any]
    stages: set[str]
    shared: frozenset[str]

    def file(self, suffix: str) -> Path:
        """A file that the sweep keeps for the run.

        log: of its progress. seconds: of all attempts. json: the last attempt's code and machine. process: what
        identifies the present attempt's process.
        """
        return FOLDER / f"{self.name}.{suffix}"


def read_grid(path: Path) -> tuple[list[Run], Picture | None]:
    """The runs of a grid's file, each once, and the picture that it asks for.

    Raises:
        InputError: a key or value is not as in docs/sweeps.md, or the schema refuses the resulting params.
    """
    values = read_yaml(path)
    try:
        grid = Grid.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, values)}") from None
    pipeline, unchanged = read_pipeline(), read_yaml("params.yaml")
    runs: dict[str, Run] = {}
    for index, entry in enumerate(grid.runs):
        targets = tuple(entry.pop("targets", grid.targets))
        if set(targets) - set(pipeline) or len(set(targets)) < len(targets):
            expected = f"{', '.join(pipeline)}, each once"
            raise InputError(f"{path}: targets: expected some of {expected}, received {list(targets)}")
        varying = [key for key, choices in entry.items() if len(choices) > 1] or list(entry)
        for chosen in itertools.product(*entry.values()):
            each = dict(zip(entry, chosen, strict=True))
            run = make_run(each, varying, targets, unchanged, pipeline, f"{path}: runs.{index}")
            runs.setdefault(run.name, run)
    return list(runs.values()), grid.picture


def read_pipeline() -> Pipeline:
    """The stages of dvc.yaml."""
    stages: Pipeline = read_yaml("dvc.yaml")["stages"]
    return stages


def make_run(
    values: Mapping[str, Any],
    varying: Sequence[str],
    targets: Sequence[str],
    unchanged: Mapping[str, Any],
    pipeline: Pipeline,
    where: str,
) -> Run:
    """A run with its settings, checked by the schema.

    varying: the keys that go into its name. unchanged: params.yaml's values. where: begins an error's message.
    """
    settings: dict[str, Any] = copy.deepcopy(dict(unchanged))
    for key, value in values.items():
        set_value(settings, key, value, where)
    checked = params.parse(settings, where)
    stages = needed_stages(targets, pipeline)
    words = [f"{key.rpartition('.')[2]}-{value}" for key, value in values.items() if key in varying]
    prefix = re.sub(r"[^A-Za-z0-9.]+|\.\.+", "-", "-".join([*words, *targets]))
    name = f"{prefix[:80].strip('-.')}-{identity(targets, checked, pipeline)}"
    shared = frozenset(f"{stage} {identity([stage], checked, pipeline)}" for stage in METRICS if stage in stages)
    return Run(name, targets, values, settings, stages, shared)


def set_value(settings: Any, key: str, value: Any, where: str) -> None:
    """Set a key such as sam.rho. A mapping as value, such as a schedule, replaces the present one.

    Raises:
        InputError: something on the way to the key is no mapping.
    """
    *sections, last = key.split(".")
    for name in sections:
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            raise InputError(f"{where}: {key}: expected a key within mappings, received one within {settings!r}")
    settings[last] = copy.deepcopy(value)


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
            pairs = itertools.product(wanted, made)
            if name not in needed and any(one.startswith(other) or other.startswith(one) for one, other in pairs):
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


def output(*command: str, cwd: Path | None = None) -> str:
    """The output of a command.

    Raises:
        InputError: it fails.
    """
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(command)}: expected it to succeed, received: {done.stderr.strip()[:500]}")
    return done.stdout
