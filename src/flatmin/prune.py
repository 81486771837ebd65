"""Delete what stages wrote for backbones and seeds that params.yaml no longer lists: `python -m flatmin.prune`.

DVC leaves the outputs of a matrix on disk when an item leaves its list.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flatmin.common import console, errors, params
from flatmin.common.params_errors import read_yaml


def prune(lists: Mapping[str, Any], root: Path | str = ".") -> list[str]:
    """Delete the outputs of dvc.yaml's matrix stages for items that their list lacks; return `stage@item` of each.

    Args:
        lists: by the name of the list that a matrix goes over, such as `backbones`, its items.
    """
    pruned = []
    for stage, item, path in sorted(set(_outputs(lists, Path(root)))):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        pruned.append(f"{stage}@{item}")
    return sorted(set(pruned))


def _outputs(lists: Mapping[str, Any], root: Path) -> Iterator[tuple[str, str, Path]]:
    """Stage, item and path of each output of an item that is in no list."""
    stages = read_yaml(root / "dvc.yaml")["stages"]
    for stage, values in stages.items():
        for axis, variable in values.get("matrix", {}).items():
            kept = {str(item) for item in lists[variable.removeprefix("${").removesuffix("}")]}
            for output in (*values.get("outs", ()), *values.get("metrics", ()), *values.get("plots", ())):
                template = output if isinstance(output, str) else next(iter(output))
                folder, _, name = template.rpartition("/")
                prefix, marker, suffix = name.partition("${item." + axis + "}")
                for path in (root / folder).glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}") if marker else ():
                    item = path.name.removeprefix(prefix).removesuffix(suffix)
                    if item not in kept and not item.startswith("."):
                        yield stage, item, path


def _main() -> None:
    for name in prune(params.load().model_dump()):
        console.log(f"pruned: {name}, which params.yaml no longer lists")


if __name__ == "__main__":
    errors.run(_main)
