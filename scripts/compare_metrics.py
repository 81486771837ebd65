"""Compare the metrics of two checkouts value by value: python scripts/compare_metrics.py OLD NEW

Keys that were renamed in between are mapped by the table under "Renamed" in CHANGELOG.md: its rows whose last cell
names files of metrics/. Exit status 1 and one line for each value that differs.
"""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH
from flatmin.common.files import leaves, read_json

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def renamed_keys() -> list[tuple[str, str, list[str]]]:
    """The rows of CHANGELOG.md's table on metrics: (old key, new key, patterns of files)."""
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (.*metrics/.*) \|$", CHANGELOG.read_text(encoding="utf-8"), re.M)
    return [(old, new, where.replace("\\*", "*").split(", ")) for old, new, where in rows]


def read(checkout: Path, renames: list[tuple[str, str, list[str]]]) -> dict[str, Any]:
    """Every value of a checkout's metrics/ by file and key, under its new name."""
    found = {}
    for path in sorted((checkout / "metrics").rglob("*.json")):
        file = str(path.relative_to(checkout))
        keys = {old: new for old, new, patterns in renames if any(fnmatch(file, pattern) for pattern in patterns)}
        for key, value in leaves(read_json(path)):
            found[f"{file}: {keys.get(key, key)}"] = value
    return found


def main(old: str, new: str) -> None:
    renames = renamed_keys()
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
