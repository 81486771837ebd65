"""A temporary git and DVC repository with this checkout's files, for tests that run the pipeline as its user does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]

# The default study cut to seconds: random weights, tiny images, two epochs.
TINY: dict[str, Any] = {
    "seeds": [7],
    "runtime": {},
    "data": {
        "source": "bundled",
        "name": "digits",
        "seed": 7,
        "image_size": 16,
        "splits": {"train": "train[:10%]", "val": "train[10%:13%]", "test": "train[90%:]"},
        "train_per_class": 6,
    },
    "augment": {"engine": "imgaug", "n": 1, "m": 3, "crop": 1},
    "backbones": ["EfficientNetLite0"],
    "extract": {
        "seed": 7,
        "optimizer": "adam",
        "learning_rate": 0.01,
        "batch_size": 25,
        "epochs": 2,
        "image_size": 32,
        "weights": {"MobileNet025": "none"},
    },
    "finetune": {
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "batch_size": 25,
        "epochs": 2,
        "image_size": 32,
        "fine_tune_at": {"EfficientNetLite0": "block7a_expand_conv"},
    },
    "select": {"metric": "accuracy", "tolerance": 0.0},
    "audit": {},
    "sam": {"method": "sam", "rho": 0.05, "adaptive": False, "every": 1},
    "finalize": {"tolerance": 0.0},
    "evaluate": {"sharpness": {"images": 8, "steps": 5, "probes": 2}},
}


class Repository:
    """A checkout in a folder of its own, with its own DVC cache and `$FLATMIN_CACHE` alongside."""

    def __init__(self, folder: Path, params: dict[str, Any] | None = None) -> None:
        self._locate(folder)
        files = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        for name in files.stdout.splitlines():
            if (ROOT / name).is_file() and not name.startswith(("metrics/", "plots/")) and name != "dvc.lock":
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        if params is not None:
            self.write_params(params)
        self.run("git", "init", "--quiet", "--initial-branch", "main")
        self.commit("start")

    @classmethod
    def existing(cls, folder: Path) -> Repository:
        """Return the repository that was made in `folder`, or that such a folder was copied to."""
        repository = cls.__new__(cls)
        repository._locate(folder)
        return repository

    def _locate(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.cache = folder / "cache"
        self.variables: dict[str, str] = {}  # more environment for every command

    def write_params(self, params: dict[str, Any]) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params))

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)

    @property
    def environment(self) -> dict[str, str]:
        identity = {
            f"GIT_{who}_{what}": "tester@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        return {
            **os.environ,
            **identity,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLATMIN_CACHE": str(self.cache),
            "PYTHONPATH": "src",
            **self.variables,
        }

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command in the checkout, both streams in one pipe."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def run(self, *command: str, expect: int | None = 0) -> str:
        """Run a command in the checkout and return its output, both streams. expect: the exit code; None allows any."""
        with self.start(*command) as process:
            output, _ = process.communicate()
        assert expect is None or process.returncode == expect, f"{command} exited {process.returncode}:\n{output}"
        return output

    def results(self) -> dict[str, bytes]:
        """Return every file that stages wrote, but for the records, with its bytes."""
        folders = ("metrics", "plots", "models", "predictions", "evaluation", "report")
        found = [path for folder in folders for path in (self.folder / folder).rglob("*")]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found if path.is_file()}


def stages_run(output: str) -> list[str]:
    """Return the names of the stages that DVC says it runs, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]
