"""The pipeline as its user runs it, in a temporary repository."""

from __future__ import annotations

import ast
import copy
import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from repository import ROOT, TINY, Repository, stages_run

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def imported_modules(path: Path) -> set[Path]:
    """The modules of `src/flatmin` that a file imports, directly or not, at its top or within a function."""
    found: set[Path] = set()
    pending = [path]
    while pending:
        for node in ast.walk(ast.parse(pending.pop().read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flatmin"):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                parts = name.split(".")
                module = ROOT / "src" / Path(*parts).with_suffix(".py") if len(parts) > 1 else None
                if parts[0] == "flatmin":
                    found.add(ROOT / "src/flatmin/__init__.py")
                if parts[0] == "flatmin" and module and module.is_file() and module not in found:
                    found.add(module)
                    pending.append(module)
    return found


@pytest.mark.parametrize("stage", DVC)
def test_deps_name_every_module_that_a_stage_imports_and_no_other(stage: str) -> None:
    script = next(word for word in DVC[stage]["cmd"].split() if word.endswith(".py"))
    needed = {str(path.relative_to(ROOT)) for path in imported_modules(ROOT / script)} | {script}
    named = {dep for dep in DVC[stage]["deps"] if dep.endswith(".py")}
    assert named == needed


def test_stages_are_short() -> None:
    for path in (ROOT / "stages").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path


def test_every_section_of_params_drives_a_stage() -> None:
    from flatmin.params import Params

    named = {name for stage in DVC.values() for name in stage["params"]}
    assert named == set(Params.model_fields)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository in which the tiny study has run and is committed."""
    repository = Repository(tmp_path_factory.mktemp("study"), TINY)
    output = repository.run("dvc", "repro")
    assert set(stages_run(output)) == {*DVC, "extract-train@EfficientNetLite0"} - {"extract-train"}
    repository.commit("study")
    return repository


def read(repository: Repository, name: str) -> Any:
    return json.loads((repository.folder / "metrics" / f"{name}.json").read_text())


@pytest.mark.slow
def test_metrics_hold_the_keys_that_other_programs_rely_on(study: Repository) -> None:
    for name, passes in (("extract/EfficientNetLite0", 1), ("finetune", 1), ("sam", 2)):
        metrics = read(study, name)
        assert set(metrics["val"]) == {"accuracy", "top5_accuracy", "loss"}
        assert metrics["epochs"] == 2
        assert 1 <= metrics["best_epoch"] <= 2
        assert metrics["gradient_evaluations"] == 60 * 2 * passes
    assert read(study, "select")["backbone"] == "EfficientNetLite0"
    assert read(study, "select")["val"]["accuracy"] == read(study, "extract/EfficientNetLite0")["val"]["accuracy"]
    evaluated = read(study, "evaluate")
    for name in ("extract", "finetune", "sam"):
        assert set(evaluated[name]["test"]) == {"accuracy", "top5_accuracy", "loss", "ece"}
    for name in ("finetune", "sam"):
        eigenvalues = [evaluated[name]["sharpness"].pop(f"eigenvalue_{index}") for index in range(1, 6)]
        assert eigenvalues == sorted(eigenvalues, reverse=True)
        assert set(evaluated[name]["sharpness"]) == {"gradient_rise", "adaptive_rise", "trace"}
    difference = evaluated["sam_minus_finetune"]
    assert set(difference) == {"accuracy", "low", "high", "p_value"}
    assert difference["accuracy"] == pytest.approx(
        evaluated["sam"]["test"]["accuracy"] - evaluated["finetune"]["test"]["accuracy"]
    )


@pytest.mark.slow
def test_predictions_name_every_test_image(study: Repository) -> None:
    with (study.folder / "predictions/test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "label", "extract", "finetune", "sam"]
    assert len({row["name"] for row in rows}) == len(rows)
    right = sum(row["label"] == row["sam"] for row in rows) / len(rows)
    assert right == pytest.approx(read(study, "evaluate")["sam"]["test"]["accuracy"])


@pytest.mark.slow
def test_preview_is_a_picture(study: Repository) -> None:
    with Image.open(study.folder / "plots/augment_preview.png") as picture:
        assert picture.width >= 400
        assert len(picture.convert("L").getcolors(2**16) or []) > 50


@pytest.mark.slow
def test_a_second_repro_does_nothing_and_figures_are_in_git_while_models_are_not(study: Repository) -> None:
    assert stages_run(study.run("dvc", "repro")) == []
    assert study.run("git", "status", "--porcelain") == ""
    tracked = study.run("git", "ls-files").split()
    assert {"dvc.lock", "metrics/sam.json", "plots/sam.csv", "plots/augment_preview.png"} <= set(tracked)
    assert not [name for name in tracked if name.startswith(("data/records", "models/", "predictions"))]
    assert not list(study.cache.rglob("state.npz")), "resume state is left behind"


@pytest.mark.slow
def test_daily_commands(study: Repository) -> None:
    output = study.run("dvc", "exp", "run", "-S", "sam.rho=0.1", "--name", "larger-rho")
    assert stages_run(output) == ["sam-finetune", "evaluate"]
    assert "sam" in study.run("dvc", "metrics", "diff")
    assert "larger-rho" in study.run("dvc", "exp", "show", "--csv")
    study.run("git", "checkout", "--force", "--quiet", ".")
    study.run("dvc", "checkout", "--quiet")


@pytest.mark.slow
def test_a_small_number_given_with_dash_s_is_a_number(study: Repository) -> None:
    # DVC writes 1e-05, which YAML 1.1 takes for text.
    study.run("dvc", "exp", "run", "-S", "sam.rho=0.00001", "--name", "small-rho", "select-best")
    assert "1e-05" in (study.folder / "params.yaml").read_text()
    study.run("python", "-m", "flatmin.params")
    study.run("git", "checkout", "--force", "--quiet", ".")


@pytest.mark.slow
def test_a_new_backbone_runs_alone_and_one_that_left_is_pruned(study: Repository) -> None:
    # The classifier that was chosen stays, since its rival has random weights: what follows it has nothing to do.
    params = copy.deepcopy(TINY)
    params["backbones"] = ["EfficientNetLite0", "MobileNet025"]
    study.write_params(params)
    ran = stages_run(study.run("dvc", "repro"))
    assert ran[:2] == ["extract-train@MobileNet025", "select-best"]
    chosen = read(study, "select")["backbone"]
    assert ran[2:] == ([] if chosen == "EfficientNetLite0" else ["finetune", "sam-finetune", "evaluate"])
    study.write_params(TINY)
    study.run("python", "-m", "flatmin.selection")
    assert not (study.folder / "metrics/extract/MobileNet025.json").exists()
    assert not (study.folder / "models/extract/MobileNet025").exists()
    study.run("dvc", "repro")
    assert stages_run(study.run("dvc", "repro")) == []
    study.run("git", "checkout", "--force", "--quiet", ".")
    study.run("dvc", "checkout", "--quiet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("prepare", []),
        ("augment_preview", []),
        ("extract_train", ["EfficientNetLite0"]),
        ("select_best", []),
        ("finetune", []),
        ("sam_finetune", []),
        ("evaluate", []),
    ],
)
def test_every_stage_checks_the_whole_file(study: Repository, script: str, arguments: list[str]) -> None:
    params = copy.deepcopy(TINY)
    params["sam"] = {"rho": -1}
    before = study.figures()
    study.write_params(params)
    try:
        output = study.run("python", f"stages/{script}.py", *arguments, expect=1)
    finally:
        study.write_params(TINY)
    assert output.strip() == "error: params.yaml: sam.rho: expected greater than or equal to 0, received -1"
    assert study.figures() == before


@pytest.mark.slow
def test_missing_inputs_are_one_line(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    for command in (["augment_preview"], ["extract_train", "EfficientNetLite0"], ["finetune"], ["evaluate"]):
        output = repository.run("python", f"stages/{command[0]}.py", *command[1:], expect=1)
        assert output.startswith("error: ")
        assert len(output.splitlines()) == 1, output
    assert "Traceback" in repository.run("env", "FLATMIN_DEBUG=1", "python", "stages/finetune.py", expect=1)


@pytest.mark.slow
def test_two_clones_give_the_same_bytes_killed_or_not(study: Repository, tmp_path: Path) -> None:
    params = copy.deepcopy(TINY)
    for section in ("extract", "finetune"):
        params[section]["epochs"] = 5
    whole = Repository(tmp_path / "whole", params)
    whole.run("dvc", "repro")
    killed = Repository(tmp_path / "killed", params)
    killed.run("dvc", "repro", "select-best")
    for stage in ("finetune", "sam-finetune"):
        kill_after(killed, 2, "python", f"stages/{stage.replace('-', '_')}.py")
        output = killed.run("dvc", "repro", "--single-item", stage)
        log = [line for line in output.splitlines() if "going on after epoch" in line]
        assert len(log) == 1
        assert int(log[0].split()[-1]) >= 2
        epochs = [line for line in output.splitlines() if "/5: loss" in line]
        assert len(epochs) == 5 - int(log[0].split()[-1])
    killed.run("dvc", "repro")
    assert killed.figures() == whole.figures()


def kill_after(repository: Repository, epochs: int, *command: str) -> None:
    """Start a training and SIGKILL it and its workers once it has told of so many epochs and saved them."""
    process = repository.start(*command, start_new_session=True)
    assert process.stdout is not None
    seen = 0
    for line in process.stdout:
        seen += ": loss" in line
        if seen > epochs:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()
    assert seen > epochs, "the training ended before it could be killed"


@pytest.mark.slow
def test_a_study_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for label, color in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200))):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(20):
            picture = Image.new("RGB", (20 + index % 3, 24), tuple(value - index for value in color))
            picture.save(folder / f"class{label}" / f"{index}.{'png' if index % 2 else 'jpg'}")
    params = copy.deepcopy(TINY)
    params["data"] = {
        "source": "folder",
        "name": str(folder),
        "splits": {"train": "train[:60%]", "test": "train[60%:]"},
        "val_fraction": 0.25,
    }
    params["extract"]["epochs"] = 6
    repository = Repository(tmp_path / "study", params)
    repository.run("dvc", "repro")
    assert read(repository, "prepare")["roles"]["test"]["count"] == 24
    assert read(repository, "evaluate")["extract"]["test"]["accuracy"] > 0.6
    picture.save(folder / "class2/another.png")
    assert stages_run(repository.run("dvc", "repro")) == [], "DVC knows the folder by its name alone"
    assert stages_run(repository.run("dvc", "repro", "--force", "prepare")) == ["prepare"]
    assert "finetune" in stages_run(repository.run("dvc", "repro"))


@pytest.mark.slow
def test_a_study_of_tfds_with_unknown_labels(tmp_path: Path) -> None:
    if "TFDS_DATA_DIR" not in os.environ:
        pytest.skip("TFDS_DATA_DIR is not set: no TFDS data set at hand")
    params = copy.deepcopy(TINY)
    params["data"] = {
        "source": "tfds",
        "name": "visual_domain_decathlon/cifar100",
        "splits": {"train": "train[:2000]", "test": "validation[:100]", "predict": "test[:40]"},
        "val_per_class": 1,
        "train_per_class": 3,
    }
    repository = Repository(tmp_path, params)
    repository.run("dvc", "repro")
    with (repository.folder / "predictions/predict.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert {row["label"] for row in rows} == {"-1"}
    assert all(row["name"].startswith("cifar100/test/") for row in rows)
    assert read(repository, "prepare")["roles"]["train"]["count"] == 300


@pytest.mark.slow
def test_a_named_study_leaves_the_root_clean(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    other = copy.deepcopy(TINY)
    other["seed"] = 8
    other["data"]["splits"]["predict"] = "train[50%:52%]"
    (repository.folder / "studies/other").mkdir()
    (repository.folder / "studies/other/params.yaml").write_text(yaml.safe_dump(other))
    repository.commit("another study")
    repository.run("sh", "scripts/study.sh", "other")
    changed = repository.run("git", "status", "--porcelain").split()
    kept = ("dvc.lock", "metrics/", "plots/", "test_predictions.csv")
    assert changed[1::2] == [f"studies/other/{name}" for name in kept]
    with (repository.folder / "studies/other/test_predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == round(0.02 * 1797)
    assert all(list(row) == ["name", "finetune", "sam"] and int(row["sam"]) in range(10) for row in rows)
    assert json.loads((repository.folder / "studies/other/metrics/evaluate.json").read_text())
    assert stages_run(repository.run("sh", "scripts/study.sh", "other")) == []
    for wrong in ("", "nothing", "../other"):
        output = repository.run("sh", "scripts/study.sh", wrong, expect=1)
        assert output.startswith("error: NAME: expected")
