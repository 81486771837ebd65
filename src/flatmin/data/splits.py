"""Assigns each example to a role: checks the splits, carves val out of train, draws wrong labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import images
from flatmin.data.groups import APART, carve
from flatmin.data.sources.base import Slice, Source
from flatmin.images import BrokenImageError

# Codes in the array of `assign_roles`. The first two are positions in `params.ROLES`.
TRAIN, VAL, LEFT_OUT = 0, 1, -1

MAX_LISTED_BROKEN = 3


def count_examples(source: Source, expressions: Mapping[str, str]) -> dict[str, int]:
    """Count the examples in the split expression of each role.

    Raises:
        InputError: An expression is empty, or an example occurs twice.
    """
    sizes: dict[str, int] = {}
    seen: list[tuple[str, Slice]] = []
    for role, expression in expressions.items():
        slices = source.locate(expression, f"data.splits.{role}")
        if not slices:
            raise InputError(f"data.splits.{role}: expected at least one example, received none with {expression!r}")
        for part in slices:
            for other, earlier in seen:
                start, stop = max(part.start, earlier.start), min(part.stop, earlier.stop)
                if part.split == earlier.split and start < stop:
                    raise InputError(
                        f"data.splits.{role}: expected each example only once, received"
                        f" {part.split}[{start}:{stop}], which data.splits.{other} also contains"
                    )
            seen.append((role, part))
        sizes[role] = sum(part.stop - part.start for part in slices)
    return sizes


def assign_roles(
    source: Source, data: Data, class_names: list[str], broken: list[str], listed: Path
) -> np.ndarray | None:
    """Assign the examples of train's split to train and val.

    If broken images may be skipped, all images are read here, so that the requested numbers of images are readable.

    Args:
        broken: The broken images found here are appended to this list.
        listed: See `refuse_broken`.

    Returns:
        int8 [n]: TRAIN, VAL or LEFT_OUT for each example of train's split; None if all of them are TRAIN.
    """
    changes_labels = data.label_noise or data.shuffle_labels
    if not any((data.val_fraction, data.val_per_class, data.train_per_class, changes_labels)):
        return None
    train = source.expressions["train"]
    labels = source.labels(train)
    refuse_unknown_labels(labels, class_names, "data.splits.train")
    readable = np.ones(len(labels), bool)
    if data.skip_broken:
        readable = _check_readable(source, train, len(labels), data, broken)
        if len(broken) > data.skip_broken:  # so that the refusal lists all
            for expression in source.expressions.values():
                if expression != train:
                    _check_readable(source, expression, None, data, broken)
        refuse_broken(broken, data.skip_broken, listed)
    groups = source.groups(train) if data.group else None
    return _carve_val(labels, readable, data, class_names, groups)


def _check_readable(source: Source, expression: str, count: int | None, data: Data, broken: list[str]) -> np.ndarray:
    """Read all images of a split expression. Returns bool [n]: which are readable; `broken` gets the others."""
    readable = []
    for example in console.progress(source.examples(expression), "check", count, "image"):
        try:
            images.read_picture(example.encoded(), max_pixels=data.max_pixels)
        except BrokenImageError as error:
            broken.append(f"{example.name} ({error})")
            readable.append(False)
        else:
            readable.append(True)
    return np.array(readable, bool)


def _carve_val(
    labels: np.ndarray, readable: np.ndarray, data: Data, class_names: list[str], groups: np.ndarray | None
) -> np.ndarray:
    """Shuffle each class by the seed; its first images become val, the following ones train.

    Therefore `train_per_class` does not affect val, and a smaller value selects a subset of what a larger one selects.
    With groups, whole ones become val.
    """
    random = np.random.default_rng([data.seed, 1])
    roles = np.full(len(labels), LEFT_OUT, np.int8)
    in_val = np.zeros(len(labels), bool)
    if groups is not None and data.val_fraction:
        in_val[readable] = carve(groups[readable], labels[readable], data.val_fraction, data.seed)
        roles[in_val] = VAL
    for label, class_name in enumerate(class_names):
        members = random.permutation(np.flatnonzero((labels == label) & readable & ~in_val))
        val = _val_size(len(members), class_name, data) if groups is None else 0
        train = len(members) - val if data.train_per_class is None else data.train_per_class
        if train > len(members) - val:
            raise InputError(
                f"data.train_per_class: expected at most {len(members) - val}, the number of images left in class"
                f" {class_name!r}, received {train}"
            )
        roles[members[:val]] = VAL
        roles[members[val : val + train]] = TRAIN
    return roles


def _val_size(class_size: int, class_name: str, data: Data) -> int:
    """Return how many of a class's images go to val."""
    if data.val_per_class is not None:
        key, val_size = "data.val_per_class", data.val_per_class
    elif data.val_fraction is not None:
        key, val_size = "data.val_fraction", max(1, round(data.val_fraction * class_size))
    else:
        return 0
    if val_size >= class_size:
        raise InputError(
            f"{key}: expected to leave images of class {class_name!r} for training,"
            f" received {val_size} for val out of {class_size}"
        )
    return val_size


def groups_of_roles(source: Source, roles: np.ndarray | None) -> Iterator[tuple[str, np.ndarray]]:
    """Give the groups, text [n], of each role that must share none with another: `roles` as of `assign_roles`."""
    for role, expression in source.expressions.items():
        groups = source.groups(expression)
        if role == "train" and roles is not None:
            yield "train", groups[roles == TRAIN]
            yield "val", groups[roles == VAL]
        elif role in APART:
            yield role, groups


def draw_labels(
    source: Source, data: Data, class_names: list[str], roles: np.ndarray | None
) -> dict[str, dict[int, int]]:
    """Draw the labels that `label_noise` or `shuffle_labels` ask for.

    Returns:
        For the split expressions of train and val, the index of each example whose label is drawn, and that label. With
        `label_noise` they are that fraction of train, each with the label of another class. With `shuffle_labels` they
        are all of train and all of val, each role with its own labels permuted: val decides epochs, and would find
        those in which an accident fits its true labels.
    """
    if roles is None or not (data.label_noise or data.shuffle_labels):
        return {}
    random = np.random.default_rng([data.seed, 2])
    labels = source.labels(source.expressions["train"])
    train = np.flatnonzero(roles == TRAIN)
    if data.label_noise:
        drawn = random.choice(train, round(data.label_noise * len(train)), replace=False)
        shifts = random.integers(1, len(class_names), len(drawn))
        return {"train": _by_index(drawn, (labels[drawn] + shifts) % len(class_names))}
    carved = np.flatnonzero(roles == VAL)
    shuffled = {"train": _by_index(train, random.permutation(labels[train]))}
    shuffled["train"] |= _by_index(carved, random.permutation(labels[carved]))
    if "val" in source.expressions:
        given = source.labels(source.expressions["val"])
        shuffled["val"] = _by_index(np.arange(len(given)), random.permutation(given))
    return shuffled


def _by_index(indices: np.ndarray, labels: np.ndarray) -> dict[int, int]:
    return dict(zip(indices.tolist(), labels.tolist(), strict=True))


def refuse_broken(broken: list[str], allowed: int, listed: Path) -> None:
    """Raise InputError if there are more than `allowed` broken images.

    Args:
        broken: The names with the reasons.
        listed: The text file that then holds all of them, a line for each. Otherwise it is removed.
    """
    if len(broken) <= allowed:
        listed.unlink(missing_ok=True)
        return
    with files.atomic_write(listed) as temporary:
        lines = [text.replace("\r", "\\r").replace("\n", "\\n") + "\n" for text in broken]
        temporary.write_text("".join(lines), encoding="utf-8")
    shown = ", ".join(broken[:MAX_LISTED_BROKEN]) + (", ..." if len(broken) > MAX_LISTED_BROKEN else "")
    raise InputError(
        f"data.skip_broken: expected at most {allowed} broken images, received {len(broken)}: {shown}; all are listed"
        f" in {listed}"
    )


def refuse_unknown_labels(labels: np.ndarray, class_names: list[str], key: str) -> None:
    """Raise InputError if a label (int [n]) is not the index of a class."""
    invalid = (labels < 0) | (labels >= len(class_names))
    if invalid.any():
        raise InputError(
            f"{key}: expected labels from 0 to {len(class_names) - 1}, received {labels[invalid][0]}"
            f" in {invalid.sum()} of {len(labels)} examples"
        )


def refuse_missing_classes(labels: np.ndarray, class_names: list[str]) -> None:
    """Raise InputError if a class is not among train's labels, int [n]."""
    missing = np.setdiff1d(np.arange(len(class_names)), labels)
    if len(missing):
        raise InputError(
            f"data.splits.train: expected images of each class, received none of {class_names[missing[0]]!r}"
            f" ({len(missing)} of {len(class_names)} classes are missing)"
        )
