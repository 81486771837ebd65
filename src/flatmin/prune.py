"""Deletes what backbones left behind that the list no longer names."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from flatmin.common import console, errors, params

EXTRACT_FILES = ("models/extract/{}", "metrics/extract/{}.json", "plots/extract/{}.csv")


def prune(backbones: Sequence[str], root: Path | str = ".") -> list[str]:
    """Delete models, metrics and plots of extract-train for backbones not in the list; return their names."""
    gone = set()
    for pattern in EXTRACT_FILES:
        folder, _, suffix = pattern.rpartition("/")
        suffix = suffix.removeprefix("{}")
        for path in (Path(root) / folder).glob(f"*{suffix}"):
            name = path.name.removesuffix(suffix)
            if name not in backbones and not name.startswith("."):
                gone.add(name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sorted(gone)


def _main() -> None:
    for name in prune(params.load().backbones):
        console.log(f"pruned: extract-train of {name}, which `backbones` no longer names")


if __name__ == "__main__":
    errors.run(_main)
