"""Reads what the stages wrote about a study."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flatmin.common import files
from flatmin.common.params import Params
from flatmin.common.params_errors import read_yaml

METHODS = ("finetune", "control", "sam")
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}
CURVES = ("epoch", "loss", "val_loss", "val_accuracy")
REQUIRED = "required"
OWN_STAGE = "report"  # its entry of dvc.lock is that of an earlier report


@dataclass(frozen=True)
class Inputs:
    """The files and folders that a report is made from.

    Attributes:
        dataset: dataset.json of the records.
        prepare, select, audit, final, evaluate: the metrics of these stages.
        trainings: by method, extract too, the folder with the metrics of its trainings.
        curves: by method, the folder with its training curves.
        augment: the picture of what training sees.
        confusion: actual and predicted class of each test image.
        audited, evaluation: the folders that audit and evaluate wrote for the report.
        lock: dvc.lock, which may be missing.
    """

    dataset: str
    prepare: str
    select: str
    audit: str
    final: str
    evaluate: str
    trainings: Mapping[str, str]
    curves: Mapping[str, str]
    augment: str
    confusion: str
    audited: str
    evaluation: str
    lock: str


@dataclass(frozen=True)
class Study:
    """What the stages wrote.

    Attributes:
        params: all of params.yaml, checked.
        inputs: where it lies.
    """

    params: Any
    inputs: Inputs

    @cached_property
    def prepare(self) -> dict[str, Any]:
        return files.read_json(self.inputs.prepare)

    @cached_property
    def dataset(self) -> dict[str, Any]:
        return files.read_json(self.inputs.dataset)

    @cached_property
    def select(self) -> dict[str, Any]:
        return files.read_json(self.inputs.select)

    @cached_property
    def audit(self) -> dict[str, Any]:
        return files.read_json(self.inputs.audit)

    @cached_property
    def final(self) -> dict[str, Any]:
        return files.read_json(self.inputs.final)

    @cached_property
    def evaluated(self) -> dict[str, Any]:
        return files.read_json(self.inputs.evaluate)

    @cached_property
    def shown(self) -> dict[str, Any]:
        """shown.json of evaluate: pictures, and the released network."""
        return files.read_json(f"{self.inputs.evaluation}/shown.json")

    @cached_property
    def found(self) -> dict[str, Any]:
        """shown.json of audit: pairs and suspects."""
        return files.read_json(f"{self.inputs.audited}/shown.json")

    @cached_property
    def labelled(self) -> bool:
        """Whether test has labels, so that there are scores."""
        return "sam_minus_control" in self.evaluated

    @property
    def seeds(self) -> list[int]:
        return list(self.params.seeds)

    def training(self, method: str, item: int | str) -> dict[str, Any]:
        """The metrics of one training, such as finetune of a seed, or extract of a backbone."""
        return files.read_json(f"{self.inputs.trainings[method]}/{item}.json")

    def curves(self, method: str, item: int | str) -> dict[str, list[float]]:
        """The curves of one training, by the columns of CURVES."""
        rows = files.read_csv(f"{self.inputs.curves[method]}/{item}.csv")
        return {column: [float(row[column]) for row in rows] for column in CURVES}

    def table(self, name: str) -> list[dict[str, str]]:
        """The rows of a table that evaluate wrote for the report."""
        return files.read_csv(f"{self.inputs.evaluation}/{name}.csv")

    def picture(self, name: str) -> str:
        """A picture of evaluate as a data URI."""
        return data_uri(Path(self.inputs.evaluation, "pictures", name))

    def picture_of_audit(self, name: str) -> str:
        return data_uri(Path(self.inputs.audited, "pictures", name))

    @cached_property
    def locked(self) -> list[tuple[str, str, str, int]]:
        """Kind (code, data, model or result), path, digest and bytes of what dvc.lock lists for the stages so far.

        It keeps entries of seeds and backbones that params.yaml no longer lists, which are left out here.
        """
        if not Path(self.inputs.lock).exists():
            return []
        items = {"", *map(str, self.params.seeds), *self.params.backbones}
        found: dict[str, tuple[str, str, str, int]] = {}
        for name, stage in sorted(read_yaml(self.inputs.lock)["stages"].items()):
            if name == OWN_STAGE or name.partition("@")[2] not in items:
                continue
            for entry in (*stage.get("deps", ()), *stage.get("outs", ())):
                path = entry["path"]
                found[path] = (_kind(path), path, str(entry.get("md5", "")), int(entry.get("size", 0)))
        return sorted(found.values())


def _kind(path: str) -> str:
    kinds = {"src": "code", "stages": "code", "data": "data", "models": "model"}
    return kinds.get(path.partition("/")[0], "result")


def data_uri(path: Path) -> str:
    """A PNG or JPEG file as a URI that holds all of it."""
    return f"data:{MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def changed_params(params: Any, schema: type[BaseModel] = Params, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Key, value and default of each key that is not its default; the default is REQUIRED where there is none.

    Args:
        params: an object with the attributes of `schema`, whose values are checked.
        prefix: of the keys.
    """
    found: list[tuple[str, Any, Any]] = []
    for name, field in schema.model_fields.items():
        value, key = getattr(params, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            found += changed_params(value, type(value), f"{key}.")
        elif field.is_required() or value != field.default:
            found.append((key, value, REQUIRED if field.is_required() else field.default))
    return found


def mean_by_method(rows: Sequence[Mapping[str, str]], seeds: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
    """Coverage and accuracy of each method, in percent: the mean over its seeds, of evaluate's coverage.csv."""
    by_model: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append((100 * float(row["coverage"]), 100 * float(row["accuracy"])))
    found = {"extract": by_model["extract"]}
    for method in METHODS:
        of_seeds = [by_model[f"{method}@{seed}"] for seed in seeds]
        found[method] = [
            (points[0][0], sum(accuracy for _, accuracy in points) / len(points))
            for points in zip(*of_seeds, strict=True)
        ]
    return found
