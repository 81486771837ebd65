"""What the README says holds: its commands exist and run, its figures are the committed ones."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import yaml
from PIL import Image
from repository import ROOT, TINY, Repository, stages_run

from flatmin import sam
from flatmin.common import params
from flatmin.models import classifier

README = (ROOT / "README.md").read_text()


GRID = [
    "dvc exp run --queue -S sam.rho=0.02,0.1",
    "dvc exp run --run-all",
    "dvc exp show --only-changed",
]


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def metrics(name: str) -> Any:
    return json.loads((ROOT / "metrics" / f"{name}.json").read_text())


def test_every_command_is_one_that_a_test_runs() -> None:
    run_below = {
        "dvc repro --force prepare && dvc repro",
        "dvc repro",
        "dvc exp run -S sam.rho=0.1",
        "dvc metrics diff",
        "dvc exp show",
        "dvc dag",
        *GRID,
    }
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands():
        if command.startswith("make "):
            assert command.split()[1] in targets, command
        else:
            assert command in run_below, command


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make, as in the image")
@pytest.mark.parametrize("target", ["repro", "test", "check-params", "study NAME=digits", "image", "docker-repro"])
def test_make_targets_expand_to_commands(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", *target.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_make_daily_commands_and_a_grid_run(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    environment = ROOT / ".venv"
    if not (environment / "cpu.done").exists():
        pytest.skip("there is no .venv: made by `make setup`")
    (repository.folder / ".venv").symlink_to(environment)
    (repository.folder / "studies/digits/params.yaml").write_text(yaml.safe_dump(TINY))
    repository.commit("a tiny study")
    assert "valid" in repository.run("make", "check-params")
    assert "evaluate" in stages_run(repository.run("make", "repro"))
    assert stages_run(repository.run("make", "repro")) == []
    repository.commit("study")
    assert stages_run(repository.run("dvc", "exp", "run", "-S", "sam.rho=0.1")) == ["sam-finetune", "evaluate"]
    assert "sam" in repository.run("dvc", "metrics", "diff")
    for command in ("dvc exp show", "dvc dag"):
        assert repository.run(*command.split()).strip()
    assert "figures in studies/digits" in repository.run("make", "study", "NAME=digits")

    # The grid has this experiment again, from DVC's cache.
    repository.run("git", "checkout", "--force", "--quiet", ".")
    repository.run("dvc", "exp", "remove", "--all-commits")
    queue, run_all, show = (shlex.split(command) for command in GRID)
    assert repository.run(*queue).count("Queued experiment") == 2
    repository.run(*run_all)
    table = list(csv.DictReader(repository.run(*show, "--csv").splitlines()))
    done = [row for row in table if row["rev"] not in ("workspace", "main")]
    assert sorted((row["sam.rho"], row["State"]) for row in done) == [("0.02", "Success"), ("0.1", "Success")]
    assert all(float(row["sam.test.loss"]) > 0 for row in done)


def test_a_result_is_used_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = classifier.create("EfficientNetLite0", ["cat", "dog"], 32, 0.2, 1, "none")
    model.save("models/sam")
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save("picture.png")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    said, layers = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    logits = model.network(pixels[None].astype(np.float32)).numpy()
    assert said == ["cat", "dog"][int(logits.argmax())]
    assert "block5a_expand_conv" in layers
    exported = keras.models.load_model("sam.keras")
    np.testing.assert_array_equal(exported(pixels[None].astype(np.float32)), logits)


@pytest.mark.slow
def test_wrong_params_stop_make_before_dvc_starts(tmp_path: Path) -> None:
    repository = Repository(tmp_path, {**TINY, "colour": "red"})
    (repository.folder / ".venv").symlink_to(ROOT / ".venv")
    output = repository.run("make", "repro", expect=2)
    assert "error: params.yaml: colour: expected no such key, received 'red'" in output
    assert "Running stage" not in output


def test_the_table_of_params_names_every_key() -> None:
    table = README.split("## params.yaml")[1].split("\n## ")[0]
    for name, field in params.Params.model_fields.items():
        assert f"`{name}" in table, name
        section = field.annotation
        for key in getattr(section, "model_fields", {}):
            assert re.search(rf"\b{key}\b", table), f"{name}.{key}"


def test_figures_are_the_committed_ones() -> None:
    evaluated = metrics("evaluate")
    for name, row in (("extract", "extract:"), ("finetune", "| finetune"), ("sam", "| sam-finetune")):
        line = next(line for line in README.splitlines() if row in line and line.startswith("|"))
        assert f"{evaluated[name]['test']['accuracy']:.4f}" in line, line
    assert metrics("select")["backbone"] in README
    difference = evaluated["sam_minus_finetune"]
    said = " ".join(README.split("SAM less plain fine-tuning:")[1].split(".  ")[0].split())[:90]
    for key, form in (("accuracy", "+.4f"), ("low", "+.4f"), ("high", "+.4f"), ("p_value", ".2g")):
        assert format(difference[key], form) in said, said
    flatness = " ".join(README.split("going 0.05 along the gradient")[1].split("\n\n")[0].split())
    for key, form in (("gradient_rise", ".3f"), ("eigenvalue_1", ".1f")):
        figures = [format(evaluated[name]["sharpness"][key], form) for name in ("finetune", "sam")]
        assert all(re.search(rf"\b{figure}\b", flatness) for figure in figures), (key, figures)
    assert evaluated["finetune"]["test"]["accuracy"] > 0.85
    assert evaluated["sam"]["test"]["accuracy"] > 0.85


def test_factors_are_those_of_the_bench() -> None:
    results = json.loads((ROOT / "bench/results.json").read_text())
    said = README.split("once for each view")[1].split("\n\n")[0]
    for stage in ("extract", "finetune"):
        assert f" {results[f'{stage}_speedup']:.1f} times" in said, said


SAM_PAGE = (ROOT / "docs/sam.md").read_text()


@pytest.mark.parametrize("number", range(2))
def test_the_examples_of_the_sam_page_run(number: int, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", SAM_PAGE, re.DOTALL)[number]
    (tmp_path / "example.py").write_text(code)
    command = [sys.executable, "-W", "error::UserWarning", "example.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if number == 0:
        assert "accuracy" in done.stdout
        assert (tmp_path / "network.keras").is_file()


def test_the_sam_page_names_every_method_and_setting() -> None:
    for name in (*sam.METHODS, *(field.name for field in dataclasses.fields(sam.Settings))):
        assert f"`{name}" in SAM_PAGE, name


def test_the_costs_on_the_sam_page_are_the_measured_ones() -> None:
    results = json.loads((ROOT / "bench/results.json").read_text())
    for name, cost in results["sam_variants"].items():
        assert f"| {name} | {cost['step_ratio']:.2f} | {cost['memory_copies']:.2f} |" in SAM_PAGE, name
    assert results["sam_step_ratio"] <= 2.05
    assert results["sam_every_5_step_ratio"] <= 1.25
    assert results["sam_memory_copies"] <= 1.0


def test_the_root_and_studies_digits_are_the_same_study() -> None:
    assert params.load(ROOT / "params.yaml") == params.load(ROOT / "studies/digits/params.yaml")


def test_the_nearest_neighbour_scores_what_the_readme_says(tmp_path: Path) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    from flatmin.data import writer
    from flatmin.inputs import records

    settings = params.load(ROOT / "params.yaml")
    writer.write(settings.data, settings.seed, tmp_path / "records")
    found = records.Records(tmp_path / "records")

    def pixels(role: str) -> np.ndarray:
        return np.stack([image.ravel() for image, _ in found.images(role).as_numpy_iterator()]).astype(float)

    nearest = KNeighborsClassifier(1).fit(pixels("train"), found.labels("train"))
    accuracy = nearest.score(pixels("test"), found.labels("test"))
    assert f"| nearest neighbour on raw pixels, same training scans | {accuracy:.4f} |" in README
    assert f"{found.count('test'):,} test scans" in README


def test_nothing_names_a_place_outside_the_project() -> None:
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
            assert home not in text or name == "tests/test_docker.py", name
