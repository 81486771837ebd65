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

from pydantic import Field, ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH, as in the image
from flatmin.common import params
from flatmin.common.errors import InputError
from flatmin.common.identity import RESULTS_VERSION as RESULTS_VERSION
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
Pipeline = dict[str, Any]  # stage -> its definition in dvc.yaml, each after the stages that it needs


class Picture(params.Section):
    """A metric against a param, both columns of the table."""

    x: str
    y: str


class Grid(params.Section):
    """A grid's file. Every entry of `runs` gives all combinations of its values; one may have targets of its own."""

    targets: list[str] = Field([])
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
        """The run's file with this suffix: log, of all attempts, or json, which says where its numbers come from."""
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
            settings = copy.deepcopy(unchanged)
            for key, value in each.items():
                set_value(settings, key, value, f"{path}: runs.{index}")
            checked = params.parse(settings, f"{path}: runs.{index}")
            words = [*(f"{key.rpartition('.')[2]}-{each[key]}" for key in varying), *targets]
            name = f"{file_name('-'.join(words))}-{identity(targets, checked, pipeline)}"
            stages = needed_stages(targets, pipeline)
            shared = frozenset(f"{stage} {identity([stage], checked, pipeline)}" for stage in METRICS.keys() & stages)
            runs.setdefault(name, Run(name, targets, each, settings, stages, shared))
    return list(runs.values()), grid.picture


def file_name(text: str) -> str:
    """A text as the beginning of a git ref and a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+|\.\.+", "-", text)[:80].strip("-.")


def read_pipeline() -> Pipeline:
    """The stages of dvc.yaml."""
    stages: Pipeline = read_yaml("dvc.yaml")["stages"]
    return stages


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


def get_value(settings: Any, key: str) -> Any:
    """The value of a key such as sam.rho; None without it."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def identity(targets: Sequence[str], settings: params.Params, pipeline: Pipeline) -> str:
    """A digest of what determines a run's results: its targets, the params that its stages use and the results version.

    The order of keys does not matter, nor whether a default value is written out, so a new key in the schema renames no
    run; nor does code that changes no number.
    """
    values = settings.model_dump(mode="json", exclude_defaults=True)
    used = {key: get_value(values, key) for key in used_params(needed_stages(targets, pipeline), pipeline)}
    return hashlib.sha256(json.dumps([RESULTS_VERSION, list(targets), used], sort_keys=True).encode()).hexdigest()[:8]


def needed_stages(targets: Sequence[str], pipeline: Pipeline) -> set[str]:
    """The targets, or all stages where there are none, with every stage whose outputs they need."""
    needed, wanted = set[str](), list[str]()
    for name, stage in reversed(pipeline.items()):
        pairs = itertools.product(wanted, _paths(stage, "outs", "metrics", "plots"))
        if name in (targets or pipeline) or any(one.startswith(other) or other.startswith(one) for one, other in pairs):
            needed.add(name)
            wanted += _paths(stage, "deps")
    return needed


def used_params(stages: Iterable[str], pipeline: Pipeline) -> set[str]:
    """The sections and keys of params.yaml that stages read, or that dvc.yaml itself fills in (`${backbones}`)."""
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
