"""The Makefile's targets, the commands of every day, and the notebook."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import tiny_params
from repository import ROOT, Repository, stages_run

from flatmin.common import params

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make, as in the image")
needs_environment = pytest.mark.skipif(
    not (ROOT / ".venv/cpu.done").exists(), reason="there is no .venv, which `make setup` makes"
)


def make(*arguments: str) -> str:
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_make
def test_make_without_a_target_lists_targets_that_expand_to_commands() -> None:
    lines = make().splitlines()
    targets = [line.split()[0] for line in lines if line.startswith("  ")]
    assert {"repro", "setup", "check", "test", "format", "golden", "accept", "study", "sweep", "image"} <= set(targets)
    for target in targets:
        assert make("--dry-run", target, "NAME=digits").strip(), target


@pytest.mark.slow
@needs_make
@needs_environment
def test_daily_commands_and_a_grid_run(study: Repository) -> None:
    (study.folder / ".venv").symlink_to(ROOT / ".venv")
    assert "valid" in study.run("make", "check-params")
    assert stages_run(study.run("make", "repro")) == []
    assert stages_run(study.run("dvc", "exp", "run", "-S", "sam.rho=0.1", "finalize")) == ["sam-finetune@7", "finalize"]
    assert "sam" in study.run("dvc", "metrics", "diff")
    for command in ("dvc exp show", "dvc dag"):
        assert study.run(*command.split()).strip()

    # The grid has this experiment again, from DVC's cache.
    study.run("git", "checkout", "--force", "--quiet", ".")
    study.run("dvc", "exp", "remove", "--all-commits")
    assert study.run(*shlex.split("dvc exp run --queue -S sam.rho=0.02,0.1 finalize")).count("Queued experiment") == 2
    study.run("dvc", "exp", "run", "--run-all")
    (show,) = [
        line for line in (ROOT / "docs/daily.md").read_text().splitlines() if line.startswith("dvc exp show --hide")
    ]
    table = list(csv.DictReader(study.run(*shlex.split(show), "--csv").splitlines()))
    assert list(table[0]) == ["Experiment", "sam.val.accuracy", "sam.val.loss", "sam.rho"], (
        "none that evaluate computes"
    )
    refs = study.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    for row in table[1:]:
        (ref,) = [ref for ref in refs if ref.endswith(f"/{row['Experiment']}")]
        final = json.loads(study.run("git", "show", f"{ref}:metrics/final.json"))
        assert float(row["sam.val.loss"]) == pytest.approx(final["sam"]["val"]["loss"])
    assert sorted(row["sam.rho"] for row in table[1:]) == ["0.02", "0.1"]
    assert len({row["sam.val.loss"] for row in table}) == 3, "each its own, and the commit's"
    assert max(map(len, study.run("env", "COLUMNS=200", *shlex.split(show), "--no-pager").splitlines())) <= 80


@pytest.mark.slow
@needs_make
@needs_environment
def test_make_repro_wrong_params_stop_before_dvc_starts(tmp_path: Path) -> None:
    repository = Repository(tmp_path, tiny_params(colour="red"))
    (repository.folder / ".venv").symlink_to(ROOT / ".venv")
    output = repository.run("make", "repro", expect=2)
    assert "error: params.yaml: colour: expected no such key, received 'red'" in output
    assert "Running stage" not in output


def notebook_script() -> str:
    """The notebook's code as a script: lines with an exclamation mark are commands of a shell, and must succeed."""
    cells = json.loads((ROOT / "docs/notebook.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    shell = ["bash", "-o", "pipefail", "-c"]
    return "import subprocess\n" + re.sub(
        "^!(.*)$", lambda line: f"subprocess.run({[*shell, line[1]]!r}, check=True)", code, flags=re.MULTILINE
    )


@pytest.mark.slow
@needs_make
@needs_environment
def test_notebook_goes_from_a_folder_of_pictures_to_predictions(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    (repository.folder / ".venv").symlink_to(ROOT / ".venv")
    program = tmp_path / "bin/flatmin"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT / "src"} exec {sys.executable} -m flatmin.cli "$@"\n')
    program.chmod(0o755)
    output = repository.run(
        "env", f"PATH={program.parent}:{repository.environment['PATH']}", "python", "-c", notebook_script()
    )
    assert re.search(r"^  all +\d+ +\d+ +\d+$", output, re.MULTILINE)
    assert re.search(r"^make study NAME=shapes: about .* GB here", output, re.MULTILINE)
    assert "study shapes: results in studies/shapes" in output
    predicted = re.findall(r"^(\w+) +[01]\.\d+ .* build/new-shapes/a-(\w+)\.png$", output, re.MULTILINE)
    assert sorted(shape for _, shape in predicted) == ["circle", "square", "triangle"]
    assert all(first == shape for first, shape in predicted)
    assert (repository.folder / "build/why.png").is_file()


def test_root_params_are_those_of_the_digits_study() -> None:
    assert params.load(ROOT / "params.yaml") == params.load(ROOT / "studies/digits/params.yaml")


def test_tracked_files_are_small_and_name_no_home_folder() -> None:
    git = shutil.which("git")
    assert git
    listed = subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in {".png", ""} or name.startswith("requirements/") or not path.is_file():
            continue
        assert path.stat().st_size <= 1_000_000, name
        text = path.read_text()
        for home in ("/" + "root/", "/" + "home/"):
            assert home not in text, name
