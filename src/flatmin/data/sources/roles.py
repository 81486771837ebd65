"""Which splits of a source the roles take, and which layouts of classes and splits cannot be meant."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping

from flatmin.common.errors import InputError
from flatmin.common.params import ROLES, Data

# The usual names of splits, in lower case, and the role that each has.
USUAL = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "predict": "predict",
}
HARDLY_CLASSES = frozenset(("val", "validation", "test", "predict"))  # train and valid may be
INVISIBLE = frozenset("\u00ad\u200b\u200e\u200f\u2060\ufeff")  # characters that copying from a page may leave in a name
MAX_LISTED = 8


def expressions(data: Data, sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the split expression of each role, in the order of `ROLES`: those of `data.splits`, or the usual ones.

    Args:
        sizes: The number of examples of each split.

    Raises:
        InputError: `data.splits` is left out, and the splits' names do not say which role each has.
    """
    if data.splits is not None:
        given = data.splits.model_dump()
        return {role: given[role] for role in ROLES if given[role] is not None}
    carved = data.val_fraction is not None or data.val_per_class is not None
    found: dict[str, str] = {}
    for split in sizes:
        role = USUAL.get(split.lower())
        if role in found:
            raise InputError(
                f"data.splits: expected one split for {role}, found {found[role]!r} and {split!r}: name one"
            )
        if role and not (role == "val" and carved):
            found[role] = split
    needed = ("train", "test") if carved else ("train", "val", "test")
    if not set(needed) <= set(found):
        raise InputError(
            f"data.splits: expected splits named {', '.join(needed)} where it is left out, found"
            f" {_listed(sizes)}; write {_proposal(sizes, found, carved)}"
        )
    return {role: found[role] for role in ROLES if role in found}


def _proposal(sizes: Mapping[str, int], found: Mapping[str, str], carved: bool) -> str:
    """Return settings that fit these splits, as one writes them."""
    train = found.get("train") or (next(iter(sizes)) if len(sizes) == 1 else None)
    if train is None:
        return "data.splits: {train: ..., val: ..., test: ...} with their names, several joined by +"
    roles = dict(found) | {"train": train}
    if "test" not in roles:
        roles |= {"train": f'"{train}[:80%]"', "test": f'"{train}[80%:]"'}
    pairs = ", ".join(f"{role}: {roles[role]}" for role in ROLES if role in roles)
    val = "" if carved or "val" in roles else ", data.val_fraction: 0.1"
    return f"data.splits: {{{pairs}}}{val}"


def named_splits(expression: str, available: Collection[str]) -> set[str]:
    """Return those of the available splits that occur in a split expression."""
    names = {part.partition("[")[0].strip() for part in expression.split("+")}
    return set(available) if "all" in names else names & set(available)


def resembles_split(name: str) -> bool:
    """Whether it is the usual name of a split, or one such as `train2017`, `test_images` or `training set`."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    return re.sub(r"^(images?|imgs?)|(images?|imgs?|set|data)$", "", letters) in USUAL


def scored_splits(data: Data, available: Collection[str]) -> set[str]:
    """Return those of the available splits that train, val or test will take, whose classes count."""
    if data.splits is None:
        return {split for split in available if USUAL.get(split.lower(), "predict") != "predict"}
    given = (data.splits.train, data.splits.val or "", data.splits.test or "")
    return set().union(*(named_splits(text, available) for text in given))


def refuse_unused(data: Data, chosen: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Refuse splits that neither a role nor `data.splits.unused` names.

    Raises:
        InputError: There are some, or `data.splits.unused` names none.
    """
    unused = (data.splits and data.splits.unused) or ""
    if unused and not named_splits(unused, sizes):
        raise InputError(f"data.splits.unused: expected splits among {_listed(sizes)}, received {unused!r}")
    names = [named_splits(text, sizes) for text in chosen.values()]
    left = {split: size for split, size in sizes.items() if split not in named_splits(unused, sizes).union(*names)}
    if left:
        raise InputError(
            f"data.splits: expected a role for each split, received {_listed(left)} unused; write"
            f" {_roles_for(left, chosen, sizes)}data.splits.unused: {'+'.join(filter(None, [unused, *left]))}"
        )


def _roles_for(left: Mapping[str, int], chosen: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Return settings, followed by "or", that give the splits which are left the roles of their names."""
    usual = {USUAL[split.lower()]: split for split in sizes if split.lower() in USUAL}
    new = {role: split for role, split in usual.items() if split in left and role not in chosen}
    if {"train", "test"} <= set(usual) and set(left) & set(usual.values()):
        pairs = ", ".join(f"{role}: {usual[role]}" for role in ROLES if role in usual)
        return f"data.splits: {{{pairs}}}{' without data.val_fraction or val_per_class' if 'val' in new else ''}, or "
    return "".join(f"data.splits.{role}: {split}, or " for role, split in new.items())


def refuse_splits_as_classes(classes: Collection[str], folder: str, split: str = "") -> None:
    """Refuse classes whose names are those of splits.

    Args:
        folder: Of the data.
        split: The folder in it which has these classes; "" if it has them itself.

    Raises:
        InputError: All are or resemble some, or one is for train and one for val or test, or can hardly be a class.
    """
    lower = {name.lower() for name in classes}
    usual = {USUAL[name] for name in lower if name in USUAL}
    several = "train" in usual and len(usual) > 1
    if several or lower & HARDLY_CLASSES or (lower and all(resembles_split(name) for name in lower)):
        raise InputError(
            f"data.name: expected classes, received {_names(classes)} in {os.path.join(folder, split)}, which are names"
            " of splits: sort the images of each split into a folder for each class (train/CLASS/...), or list them"
            " in a table with labels (data.source: table)"
            + (f"; if {split} is not needed, name it in data.splits.unused, or move it away" if split else "")
        )


def refuse_spellings(classes: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """Refuse a class that is spelled in several ways.

    Args:
        classes: The names of the classes in each split.

    Returns:
        The pairs of classes which differ only in the spelling, and which a split has both of.

    Raises:
        InputError: Two names look the same or are one number, or differ only in the spelling and no split has both.
    """
    spellings: dict[str, list[str]] = {}
    for name in sorted(set().union(*classes.values())):
        spellings.setdefault(_folded(name), []).append(name)
    pairs = []
    for names in spellings.values():
        for index, second in enumerate(names):
            for first in names[:index]:
                splits = [split for split, members in classes.items() if first in members or second in members]
                together = any({first, second} <= set(members) for members in classes.values())
                if not together or _visible(first) == _visible(second):
                    raise InputError(
                        f"data.name: expected one spelling of each class, received {first!a} and {second!a}"
                        f" in {', '.join(splits)}"
                    )
                pairs.append((first, second))
    return pairs


def refuse_lacking(classes: Mapping[str, Collection[str]], chosen: Mapping[str, str]) -> None:
    """Refuse a class of val or test that train lacks.

    Raises:
        InputError: There is one.
    """
    known = set().union(*(classes[split] for split in named_splits(chosen["train"], classes)))
    for role in ("val", "test"):
        for split in sorted(named_splits(chosen.get(role, ""), classes)):
            if lacking := sorted(set(classes[split]) - known):
                raise InputError(
                    f"data.splits.train: expected images of each class, received none of {lacking[0]!r}, which {split}"
                    f" has ({len(lacking)} of {len(known | set(classes[split]))} classes are missing)"
                )


def in_order(class_names: Iterable[str]) -> list[str]:
    """Sort class names: by number if all are integers, else as text."""
    names = sorted(class_names)
    if all(re.fullmatch(r"-?[0-9]+", name, re.ASCII) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return names


def given_names(data: Data, class_names: list[str]) -> list[str]:
    """Return the names that `data.class_names` gives to the classes.

    Args:
        class_names: The source's, in the order of the labels.

    Raises:
        InputError: There are too few classes, another number of names, or a name is that of another class.
    """
    if len(class_names) < 2:
        received = f"{len(class_names)}" + "".join(f": {name!r}" for name in class_names)
        raise InputError(f"data.name: expected at least two classes, received {received}")
    given = data.class_names
    if given is None:
        return class_names
    if len(given) != len(class_names):
        raise InputError(f"data.class_names: expected {len(class_names)} names, received {len(given)}")
    shuffled = sorted(given) == sorted(class_names)
    strict = data.source in ("folder", "table")
    folded = {_folded(name): name for name in class_names}
    for name, own in zip(given, class_names, strict=True):
        other = folded.get(_folded(name), own)
        if (shuffled and name != own) or (strict and other != own and _folded(name) != _folded(own)):
            raise InputError(
                f"data.class_names: expected new names in the order of the classes {_names(class_names)}, received"
                f" {name!r} for {own!r}, although it is another class: leave data.class_names out, or reorder it"
            )
    return given


def _listed(sizes: Mapping[str, int]) -> str:
    shown = [f"{split} ({size})" for split, size in list(sizes.items())[:MAX_LISTED]]
    return ", ".join(shown) + (", ..." if len(sizes) > MAX_LISTED else "")


def _names(names: Collection[str]) -> str:
    return ", ".join(list(names)[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")


def _visible(name: str) -> str:
    shown = "".join(char for char in unicodedata.normalize("NFC", name) if char not in INVISIBLE)
    return _value(shown) or " ".join(shown.split())


def _folded(name: str) -> str:
    folded = unicodedata.normalize("NFKC", _visible(name)).casefold()
    return _value(folded) or re.sub(r"[\s_-]+", " ", folded).strip()


def _value(name: str) -> str:
    """One spelling of a number (`1`, `01`, `1.0`) or truth value (`True`, `true`); "" for other names."""
    if name.casefold() in ("true", "false"):
        return name.casefold()
    if not re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?", name):
        return ""
    whole, _, rest = name.lstrip("+-").partition(".")
    digits = f"{whole.lstrip('0') or '0'}.{rest.rstrip('0')}"
    return f"-{digits}" if name.startswith("-") and digits != "0." else digits
