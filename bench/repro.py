"""The seconds of the default study by stage and part: `dvc repro` in a clone of this checkout's last commit.

    python bench/repro.py [COMMIT]

Prints a table and adds the key `profile` to bench/results.json, or for another commit `profile_before`. Views and
epochs are timed by the lines that stages print; importing by a process that does nothing else; the rest of a stage is
building, converting and tracing its network, checking and saving. What is left of the whole is DVC's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sam_cost import RESULTS, add
from speed import VIEW_LINE, clone_checkout

STAGE = re.compile(r"Running stage '([^'@]+)(?:@(.+))?'")
EPOCH = re.compile(r"^\S+ \d+/\d+: loss .*\((?P<seconds>[\d.]+) s\)")
IMPORTS = {  # what each stage imports once it runs
    "prepare": "from flatmin.common import params, stage; from flatmin.data import writer",
    "augment-preview": "from flatmin.common import params, stage; from flatmin.inputs import preview",
    "extract-train": "from flatmin.common import params, stage; from flatmin.training import stages",
    "select-best": "from flatmin.common import params, stage; from flatmin.selection import backbone",
    "finetune": "from flatmin.common import params, stage; from flatmin.training import stages",
    "control": "from flatmin.common import params, stage; from flatmin.training import stages",
    "sam-finetune": "from flatmin.common import params, stage; from flatmin.training import stages",
    "finalize": "from flatmin.common import params, stage; from flatmin.selection import finalize",
    "evaluate": "from flatmin.common import params, stage; from flatmin.evaluation import evaluate",
}
PARTS = ("importing", "views", "epochs", "rest")


def importing(folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds of each stage's imports, the second time, when the files are in memory."""
    found = {}
    for stage, imports in IMPORTS.items():
        for _ in range(2):
            started = time.monotonic()
            subprocess.run(
                [sys.executable, "-c", imports], cwd=folder, env=environment, check=True, capture_output=True
            )
            found[stage] = time.monotonic() - started
    return found


def measure(commit: str) -> dict[str, dict[str, float]]:
    """Stage -> part -> seconds; with `dvc` and `whole`, which have one part."""
    with tempfile.TemporaryDirectory(prefix="flatmin-profile-") as name:
        folder = Path(name) / "clone"
        environment = clone_checkout(folder, commit) | {"PYTHONPATH": "src"}
        (folder / "dvc.lock").unlink()  # as if nothing had been computed
        imports = importing(folder, environment)
        command = ["dvc", "repro"]
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        found: dict[str, dict[str, float]] = {}
        stage, since = "", started
        with process.stdout:
            for line in process.stdout:
                now = time.monotonic()
                if match := STAGE.search(line):
                    stage = match[1] if match[2] is None else f"{match[1]} {match[2]}"
                    found[stage] = dict.fromkeys(PARTS, 0.0) | {"importing": imports[match[1]]}
                    since = now
                elif stage and line.startswith("Updating lock file"):
                    found[stage]["rest"] = now - since - sum(found[stage].values())
                    stage = ""
                elif stage and (match := VIEW_LINE.match(line)):
                    found[stage]["views"] += float(match["seconds"])
                elif stage and (match := EPOCH.match(line)):
                    found[stage]["epochs"] += float(match["seconds"])
        if process.wait():
            raise RuntimeError(f"dvc repro exited {process.returncode}")
        whole = time.monotonic() - started
    stages = sum(sum(parts.values()) for parts in found.values())
    return found | {"dvc": {"rest": whole - stages}, "whole": {"rest": whole}}


def table(profile: dict[str, dict[str, float]]) -> str:
    """A row for each stage."""
    lines = [f"| seconds | {' | '.join(PARTS)} | all |", f"|---|{'---|' * (len(PARTS) + 1)}"]
    for stage, parts in profile.items():
        cells = (f"{parts[part]:.1f}" if parts.get(part) else "" for part in PARTS)
        lines.append(f"| {stage} | {' | '.join(cells)} | {sum(parts.values()):.1f} |")
    return "\n".join(lines) + "\n"


def main(commit: str = "HEAD") -> None:
    """Measure, write and print."""
    profile = {
        stage: {part: round(seconds, 1) for part, seconds in parts.items()} for stage, parts in measure(commit).items()
    }
    add(RESULTS, {"profile" if commit == "HEAD" else "profile_before": profile})
    print(table(profile), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
