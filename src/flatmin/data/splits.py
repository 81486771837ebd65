"""Assigns each example to a role and, on request, a wrong label."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.data import images, sources
from flatmin.data.images import BrokenImageError
from flatmin.data.sources import Source

TRAIN, VAL = 0, 1

LEFT_OUT = -1

NAMED_BROKEN = 3


def count_examples(source: Source, expressions: Mapping[str, str]) -> dict[str, int]:
    """How many examples each role's split has. Nothing may be empty, and no example may be there twice."""
    sizes: dict[str, int] = {}
    seen: list[tuple[str, sources.Slice]] = []
    for role, expression in expressions.items():
        slices = source.locate(expression, f"data.splits.{role}")
        if not slices:
            raise InputError(f"data.splits.{role}: expected examples, received none of them with {expression!r}")
        for part in slices:
            for other, earlier in seen:
                start, stop = max(part.start, earlier.start), min(part.stop, earlier.stop)
                if part.split == earlier.split and start < stop:
                    raise InputError(
                        f"data.splits.{role}: expected no example twice, received"
                        f" {part.split}[{start}:{stop}], which data.splits.{other} has too"
                    )
            seen.append((role, part))
        sizes[role] = sum(part.stop - part.start for part in slices)
    return sizes


def assign_roles(source: Source, data: Data, seed: int, class_names: list[str], broken: list[str]) -> np.ndarray | None:
    """int8 [n]: TRAIN, VAL or LEFT_OUT for each example of train's split; None where all of them are TRAIN.

    Where broken images may be left out, they are found here (`broken` grows): the counts come out as asked.
    """
    if not any((data.val_fraction, data.val_per_class, data.train_per_class, data.label_noise)):
        return None
    labels = source.labels(data.splits.train)
    refuse_unknown_labels(labels, class_names, "data.splits.train")
    readable = np.ones(len(labels), bool)
    if data.skip_broken:
        examples = source.examples(data.splits.train)
        for index, example in enumerate(console.progress(examples, "check", len(labels), "image")):
            try:
                images.read_picture(example.image)
            except BrokenImageError as error:
                broken.append(f"{example.name} ({error})")
                readable[index] = False
        refuse_broken(broken, data.skip_broken)
    return _carve_val(labels, readable, data, seed, class_names)


def _carve_val(labels: np.ndarray, readable: np.ndarray, data: Data, seed: int, class_names: list[str]) -> np.ndarray:
    """Each class is shuffled by the seed; its first go to val, the next to train.

    So `train_per_class` changes nothing in val, and a smaller one takes a part of what a larger one takes.
    """
    random = np.random.default_rng([seed, 1])
    roles = np.full(len(labels), LEFT_OUT, np.int8)
    for label, class_name in enumerate(class_names):
        members = random.permutation(np.flatnonzero((labels == label) & readable))
        val = _val_size(len(members), class_name, data)
        train = len(members) - val if data.train_per_class is None else data.train_per_class
        if train > len(members) - val:
            raise InputError(
                f"data.train_per_class: expected at most {len(members) - val}, as class {class_name!r} has,"
                f" received {train}"
            )
        roles[members[:val]] = VAL
        roles[members[val : val + train]] = TRAIN
    return roles


def _val_size(size: int, class_name: str, data: Data) -> int:
    if data.val_per_class is not None:
        key, wanted = "data.val_per_class", data.val_per_class
    elif data.val_fraction is not None:
        key, wanted = "data.val_fraction", max(1, round(data.val_fraction * size))
    else:
        return 0
    if wanted >= size:
        raise InputError(
            f"{key}: expected images of class {class_name!r} left to train on, received {wanted} for val out of {size}"
        )
    return wanted


def draw_label_noise(
    source: Source, data: Data, seed: int, class_names: list[str], roles: np.ndarray | None
) -> dict[int, int]:
    """Index in train's split -> another class, both at random, for `data.label_noise` of the examples to train on."""
    if roles is None or not data.label_noise:
        return {}
    random = np.random.default_rng([seed, 2])
    train = np.flatnonzero(roles == TRAIN)
    chosen = random.choice(train, round(data.label_noise * len(train)), replace=False)
    shifts = random.integers(1, len(class_names), len(chosen))
    labels = (source.labels(data.splits.train)[chosen] + shifts) % len(class_names)
    return dict(zip(chosen.tolist(), labels.tolist(), strict=True))


def refuse_broken(broken: list[str], allowed: int) -> None:
    if len(broken) > allowed:
        named = ", ".join(broken[:NAMED_BROKEN]) + (", ..." if len(broken) > NAMED_BROKEN else "")
        raise InputError(f"data.skip_broken: expected at most {allowed} broken images, received {len(broken)}: {named}")


def refuse_unknown_labels(labels: np.ndarray, class_names: list[str], key: str) -> None:
    outside = (labels < 0) | (labels >= len(class_names))
    if outside.any():
        raise InputError(
            f"{key}: expected labels from 0 to {len(class_names) - 1}, received {labels[outside][0]}"
            f" in {outside.sum()} of {len(labels)} examples"
        )
