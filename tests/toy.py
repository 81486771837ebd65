"""A checkout whose pipeline takes no time: the real package, scripts, DVC and git around two stages of arithmetic."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from repository import TINY, Repository

VERSION = {"src/flatmin/common/identity.py": ["RESULTS_VERSION"]}
DVC: dict[str, Any] = {
    "stages": {
        "count": {
            "cmd": "PYTHONPATH=src python stages/count.py",
            "deps": ["images.txt", "stages/count.py", "src/flatmin/common"],
            "params": ["data", VERSION],
            "outs": ["models/count"],
            "metrics": [{"metrics/count.json": {"cache": False}}],
        },
        "train": {
            "cmd": "PYTHONPATH=src python stages/train.py",
            "deps": ["models/count", "stages/train.py", "src/flatmin/common", "src/flatmin/inputs"],
            "params": ["data", "sam", VERSION],
            "outs": ["models/train"],
        },
    }
}
COUNT = """
from pathlib import Path

from flatmin.common import files, stage


def main(declared):
    count = len(Path("images.txt").read_text().split()) + declared.params.data.seed
    Path("models").mkdir(exist_ok=True)
    Path("models/count").write_text(str(count))
    files.write_json("metrics/count.json", {"count": count})


if __name__ == "__main__":
    stage.run("count", main)
"""
# With $WAIT it trains until there is a file `finish`.
TRAIN = """
import os
import time
from pathlib import Path

from flatmin.common import stage


def loss(count, rho):
    return count * rho


def main(declared):
    print("training with", declared.params.sam.rho, flush=True)
    while "WAIT" in os.environ and not Path("finish").exists():
        time.sleep(0.02)
    Path("models/train").write_text(str(loss(int(Path("models/count").read_text()), declared.params.sam.rho)))


if __name__ == "__main__":
    stage.run("train", main)
"""
GOLDEN = """
import sys

sys.path.append("stages")
from train import loss

if loss(10, 0.5) != 5:
    sys.exit(f"error: loss: expected 5, received {loss(10, 0.5)}")
"""


def repository(folder: Path) -> Repository:
    """The checkout, its pipeline run and committed."""
    toy = Repository(folder, TINY)
    for name, content in (
        ("dvc.yaml", yaml.safe_dump(DVC)),
        ("images.txt", "a b c"),
        ("stages/count.py", COUNT),
        ("stages/train.py", TRAIN),
        ("tests/golden.py", GOLDEN),
    ):
        (toy.folder / name).write_text(content)
    toy.run("dvc", "repro", "--quiet")
    toy.commit("toy")
    return toy


def duplicate(toy: Repository, folder: Path) -> Repository:
    """Another checkout in the same state, to be changed at will."""
    shutil.copytree(toy.folder.parent, folder, symlinks=True, dirs_exist_ok=True)
    return Repository.existing(folder)


def start_training(toy: Repository, rho: float) -> subprocess.Popen[str]:
    """Start `dvc repro` with `sam.rho`; it trains until `finish` is called."""
    edit_params(toy, rho=rho)
    toy.variables["WAIT"] = "1"
    process = toy.start("dvc", "repro")
    assert process.stdout
    for line in process.stdout:
        if line.startswith("training with"):
            return process
    raise AssertionError("did not start")


def finish(toy: Repository, process: subprocess.Popen[str]) -> str:
    """Let the training end; its output."""
    (toy.folder / "finish").touch()
    output, _ = process.communicate()
    return output


def edit_params(toy: Repository, **sam: Any) -> None:
    toy.write_params(TINY | {"sam": TINY["sam"] | sam})


def lock(toy: Repository) -> bytes:
    return (toy.folder / "dvc.lock").read_bytes()
