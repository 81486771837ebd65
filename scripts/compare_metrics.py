"""Compare the metrics of two checkouts value by value: python scripts/compare_metrics.py OLD NEW

What was renamed in between is mapped by the table under "Renamed" in CHANGELOG.md: keys by its rows whose last cell
names files of metrics/, where `sam.test.*` stands for all keys below, and files by its rows that name one in place of a
key. Exit status 1 and one line for each value that differs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH
from flatmin.common.files import leaves, read_json

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


class Rename(NamedTuple):
    """A row of CHANGELOG.md's table. old, new: a file of metrics/, or a key of the files that match `files`."""

    old: str
    new: str
    files: Sequence[str]


def read_renames() -> list[Rename]:
    """The rows of CHANGELOG.md's table on metrics."""
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (.*metrics/.*) \|$", CHANGELOG.read_text(encoding="utf-8"), re.M)
    return [Rename(old, new, where.replace("\\*", "*").split(", ")) for old, new, where in rows]


def read(checkout: Path, renames: Sequence[Rename]) -> dict[str, Any]:
    """Every value of a checkout's metrics/ by file and key, under its new name."""
    moved = {rename.old: rename.new for rename in renames}
    found = {}
    for path in sorted((checkout / "metrics").rglob("*.json")):
        file = str(path.relative_to(checkout))
        values = dict(leaves(read_json(path)))
        own = [rename for rename in renames if any(fnmatch(file, pattern) for pattern in rename.files)]
        for key, value in values.items():
            found[f"{moved.get(file, file)}: {new_key(key, values, own)}"] = value
    return found


def new_key(key: str, keys: Collection[str], renames: Sequence[Rename]) -> str:
    """A key's name today.

    keys: all of its file. If one of them has the new name, the file is of today, and the old name means something else.
    """
    for old, new, _ in renames:
        below, new_below = old.removesuffix("*"), new.removesuffix("*")
        is_old = key == old if below == old else key.startswith(below)
        if is_old and not any(each.startswith(new_below) for each in keys):
            return new_below + key.removeprefix(below)
    return key


def main(old: str, new: str) -> None:
    renames = read_renames()
    before, after = (read(Path(checkout), renames) for checkout in (old, new))
    if not before or not after:
        sys.exit(f"error: {old if not before else new}: expected metrics/*.json, received none")
    missing = object()
    differing = [
        key
        for key in sorted(before.keys() | after.keys())
        if (type(before.get(key, missing)), before.get(key)) != (type(after.get(key, missing)), after.get(key))
    ]
    for key in differing:
        print(f"{key}: {before.get(key, 'missing')} and {after.get(key, 'missing')}")
    print(f"{len(before)} values in {old}, {len(after)} in {new}, {len(differing)} differ")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {__doc__.splitlines()[0].split(': ')[1]}")
    main(*sys.argv[1:])
