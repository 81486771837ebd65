"""Check params.yaml without running anything: `python -m flatmin.check`.

Also says which differences the images can show, where prepare has counted them for these params. `flatmin check` looks
at the data too, which need not be where a study is repeated from its cache.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from flatmin import power
from flatmin.common import console, errors, files, params
from flatmin.common.errors import InputError
from flatmin.common.params_errors import read_yaml

PREPARED = "metrics/prepare.json"


def prepared_counts(path: Path | str = "params.yaml") -> dict[str, int] | None:
    """The numbers of test and val images, if prepare has run with the `data` section of params.yaml; else None."""
    try:
        stage = read_yaml("dvc.lock")["stages"]["prepare"]
        recorded: dict[str, Any] = {out["path"]: out["md5"] for out in stage["outs"]}
        same = stage["params"]["params.yaml"]["data"] == read_yaml(path)["data"]
        digest = hashlib.md5(Path(PREPARED).read_bytes(), usedforsecurity=False).hexdigest()
        roles = files.read_json(PREPARED)["roles"]
        counts = {role: int(roles[role]["count"]) for role in ("test", "val")}
    except (InputError, OSError, KeyError, TypeError):
        return None
    return counts if same and digest == recorded.get(PREPARED) else None


def describe(settings: params.Params, path: str) -> str:
    """One line on checked params."""
    return f"{path}: valid, seeds {', '.join(map(str, settings.seeds))}"


def _main(path: str = "params.yaml") -> None:
    settings = params.load(path)
    console.log(describe(settings, path))
    counts = prepared_counts(path)
    known = power.describe(counts) if counts else "which differences test and val can show is known after prepare"
    console.log(known)


if __name__ == "__main__":
    errors.run(_main, *sys.argv[1:])
