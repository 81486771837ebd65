"""Looks at a data set without decoding a picture: counts, and what is odd."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatmin.common.params import ROLES, Data
from flatmin.data import groups, splits, writer
from flatmin.data.sources.base import UNKNOWN, Source

_FEW = 10  # train pictures of a class, below which it is told
_UNEVEN = 3  # times as many pictures in one class as in another, from which on it is told
_NAMED = 5  # classes
_MOST_ROWS = 20  # classes of a table


@dataclass(frozen=True)
class Survey:
    """What is known of a data set before any picture is decoded.

    Attributes:
        source: the opened source.
        counts: by role, in the order of `ROLES`, the number of pictures of each class, int [classes].
        unknown: by role, the number of pictures without a label.
        odd: what a user should know, a sentence each.
    """

    source: Source
    counts: Mapping[str, np.ndarray]
    unknown: Mapping[str, int]
    odd: list[str]

    @property
    def class_names(self) -> list[str]:
        return self.source.class_names

    def total(self, role: str) -> int:
        """The number of pictures of a role."""
        return int(self.counts[role].sum()) + self.unknown[role] if role in self.counts else 0

    def table(self) -> list[str]:
        """Counts by class and role, a line each; of many classes the smallest and the largest."""
        names = self.class_names
        order = np.argsort(-self.counts["train"], kind="stable").tolist()
        if len(names) > _MOST_ROWS:
            order = [*order[:_NAMED], None, *order[-_NAMED:]]
        width = max(5, *(len(names[label]) for label in order if label is not None))
        rows = [["class", *self.counts]]
        for label in order:
            is_gap = label is None
            rows.append(["..."] if is_gap else [names[label], *(str(each[label]) for each in self.counts.values())])
        if any(self.unknown.values()):
            rows.append(["(unknown)", *map(str, self.unknown.values())])
        rows.append(["all", *(str(self.total(role)) for role in self.counts)])
        return [f"  {first:<{width}}" + "".join(f"{cell:>9}" for cell in rest) for first, *rest in rows]


def survey(data: Data) -> Survey:
    """List a data set and give every example its role, as prepare will, but for pictures that cannot be read.

    Raises:
        InputError: prepare would refuse it.
    """
    source, told = _open(data)
    sizes = splits.count_examples(source, source.expressions)
    readable = data.model_copy(update={"skip_broken": 0})  # else all pictures would be read
    codes = splits.assign_roles(source, readable, source.class_names, [], Path())
    if data.group:
        groups.refuse_shared(splits.groups_of_roles(source, codes))
    labels = {role: source.labels(expression) for role, expression in source.expressions.items()}
    if codes is not None:
        train = labels["train"]
        labels["train"] = train[codes == splits.TRAIN]
        if (codes == splits.VAL).any():
            labels["val"] = train[codes == splits.VAL]
    if "predict" in labels:
        labels["predict"] = np.full(sizes["predict"], UNKNOWN)
    counts = {
        role: np.bincount(labels[role][labels[role] >= 0], minlength=len(source.class_names))
        for role in ROLES
        if role in labels
    }
    unknown = {role: int((labels[role] < 0).sum()) for role in counts}
    for role in ("train", "val"):
        splits.refuse_unknown_labels(labels[role], source.class_names, f"data.splits.{role}")
    splits.refuse_missing_classes(labels["train"], source.class_names)
    return Survey(source, counts, unknown, [*told, *_odd(source.class_names, counts), *_groups(data)])


def _open(data: Data) -> tuple[Source, list[str]]:
    """Open a source; what it tells becomes sentences."""
    with redirect_stdout(io.StringIO()) as told:
        source = writer.open_source(data)
    return source, [line.removeprefix("prepare: ") for line in told.getvalue().splitlines()]


def split_sizes(data: Data) -> dict[str, int]:
    """The splits that a folder or table has by itself, with their numbers of pictures.

    Raises:
        InputError: it is no such folder or table.
    """
    everything = {"train": "all", "val": "all", "test": "all"}
    values = data.model_dump() | {"splits": everything, "val_fraction": None, "val_per_class": None}
    source, _ = _open(Data.model_validate(values))
    return {name: split.num_examples for name, split in source.splits.items()}


def _odd(names: list[str], counts: Mapping[str, np.ndarray]) -> list[str]:
    odd = []
    train = counts["train"]
    most, least = int(train.argmax()), int(train.argmin())
    if train[most] >= _UNEVEN * max(1, train[least]):
        odd.append(
            f"classes are uneven: {train[most]} train images of {names[most]}, {train[least]} of {names[least]};"
            " balanced_accuracy and macro_f1 of metrics/evaluate.json count every class alike"
        )
    if few := [names[label] for label in np.flatnonzero(train < _FEW)]:
        odd.append(f"fewer than {_FEW} train images of {_some(few)}")
    for role in ("val", "test"):
        lacking = [names[label] for label in np.flatnonzero(counts[role] == 0)] if counts[role].any() else []
        if lacking:
            odd.append(f"no {role} image of {_some(lacking)}")
    if not counts["test"].any():
        odd.append("no labels of test: evaluate predicts it, and scores nothing")
    return odd


def _groups(data: Data) -> list[str]:
    """Name columns of a CSV file which neither are the same in all rows nor differ in all, such as a patient's."""
    table = Path(data.name).expanduser()
    if data.source != "table" or table.suffix.lower() != ".csv":
        return []
    used = {data.group, *(value or key for key, value in data.columns)}
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    odd = []
    for column in rows[0]:
        values = {row[column] for row in rows}
        if column not in used and 2 * len(values) <= len(rows) and len(values) > 1 and _crosses(rows, column, data):
            odd.append(
                f"column {column!r} has {len(values)} values in {len(rows)} rows, and the same ones in several splits:"
                " if images of one value resemble each other (a person, a place, a day), test scores are too good;"
                f" `group: {column}` in the section data keeps the images of each value in one role"
            )
    return odd


def _crosses(rows: list[dict[str, str]], column: str, data: Data) -> bool:
    """Whether a value has several splits; without a column of splits they are drawn."""
    split = data.columns.split or "split"
    if split not in rows[0]:
        return True
    found: dict[str, str] = {}
    return any(found.setdefault(row[column], row[split]) != row[split] for row in rows)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more classes" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
