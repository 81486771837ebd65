"""Print how many of the pipeline's stages an edited line of src/flatmin reruns, on average over all lines.

    python scripts/rerun_share.py [COMMIT ...]

Without a commit it counts in the working tree. A stage is rerun when the edited file, or a folder that holds it, is
among the stage's deps in dvc.yaml; what DVC then finds unchanged and skips is not taken off.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def read(commit: str | None, name: str) -> str:
    """A file's text in the working tree or at a commit."""
    if commit is None:
        return (ROOT / name).read_text(encoding="utf-8")
    return git("show", f"{commit}:{name}")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def stages_rerun(commit: str | None = None) -> tuple[dict[str, tuple[int, int]], int]:
    """Count the lines of each source file and the stages that depend on it.

    Returns:
        File -> (lines, stages that depend on it), and the number of stages in dvc.yaml.
    """
    stages = yaml.safe_load(read(commit, "dvc.yaml"))["stages"]
    if commit is None:
        names = [path.relative_to(ROOT).as_posix() for path in (ROOT / "src/flatmin").rglob("*.py")]
    else:
        names = git("ls-tree", "-r", "--name-only", commit, "src/flatmin").splitlines()
    found = {}
    for name in sorted(names):
        if name.endswith(".py"):
            holders = {name, *(str(parent) for parent in Path(name).parents)}
            count = sum(not holders.isdisjoint(stage["deps"]) for stage in stages.values())
            found[name] = len(read(commit, name).splitlines()), count
    return found, len(stages)


def share(commit: str | None = None) -> float:
    """Return the average fraction of stages, from 0 to 1, weighted by lines."""
    files, stages = stages_rerun(commit)
    return sum(lines * count for lines, count in files.values()) / sum(lines for lines, _ in files.values()) / stages


def main(commit: str | None = None) -> None:
    """Print the lines of source by the number of stages that they rerun, and the average."""
    print(commit or "working tree")
    files, stages = stages_rerun(commit)
    for count in range(stages, -1, -1):
        names = [name for name, (_, reruns) in files.items() if reruns == count]
        if names:
            lines = sum(files[name][0] for name in names)
            short = ", ".join(name.removeprefix("src/flatmin/") for name in names)
            print(f"{count} of {stages} stages: {lines:5} lines: {short}")
    print(f"an edited line reruns {share(commit):.0%} of the stages")


if __name__ == "__main__":
    arguments: list[str | None] = [*sys.argv[1:]]
    for commit in arguments or [None]:
        try:
            main(commit)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {commit}: expected a commit with a dvc.yaml, received: {error.stderr.strip()}")
