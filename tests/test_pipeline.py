"""The pipeline as its user runs it, in a temporary repository."""

from __future__ import annotations

import ast
import copy
import csv
import json
import os
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from repository import ROOT, TINY, Repository, stages_run

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# With epochs enough to be killed among them.
STUDY = TINY | {section: TINY[section] | {"epochs": 5} for section in ("extract", "finetune")}


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
    from flatmin.common.params import Params

    named = {name for stage in DVC.values() for name in stage["params"]}
    assert named == set(Params.model_fields)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository in which the tiny study has run and is committed."""
    repository = Repository(tmp_path_factory.mktemp("study"), STUDY)
    output = repository.run("dvc", "repro")
    assert set(stages_run(output)) == {*DVC, "extract-train@EfficientNetLite0"} - {"extract-train"}
    assert "prepare: train 60, val 54, test 180; 10 classes" in output.splitlines()
    assert "oneDNN" not in output, "what TensorFlow writes as it is imported"
    repository.commit("study")
    return repository


def read(repository: Repository, name: str) -> Any:
    return json.loads((repository.folder / "metrics" / f"{name}.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_metrics_hold_the_keys_that_other_programs_rely_on(study: Repository) -> None:
    records = json.loads((study.folder / "data/records/dataset.json").read_text())
    assert read(study, "prepare")["digest"] == records["digest"]
    for name, passes in (("extract/EfficientNetLite0", 1), ("finetune", 1), ("sam", 2)):
        metrics = read(study, name)
        assert set(metrics["val"]) == {"accuracy", "top5_accuracy", "loss"}
        assert metrics["epochs"] == 5
        assert 1 <= metrics["best_epoch"] <= 5
        assert metrics["gradient_evaluations"] == 60 * 5 * passes
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
    found = rows(study.folder / "predictions/test.csv")
    assert list(found[0]) == ["name", "label", "extract", "finetune", "sam"]
    assert len({row["name"] for row in found}) == len(found)
    right = sum(row["label"] == row["sam"] for row in found) / len(found)
    assert right == pytest.approx(read(study, "evaluate")["sam"]["test"]["accuracy"])


@pytest.mark.slow
def test_preview_is_a_picture(study: Repository) -> None:
    with Image.open(study.folder / "plots/augment.png") as picture:
        assert picture.width >= 400
        assert len(picture.convert("L").getcolors(2**16) or []) > 50


@pytest.mark.slow
def test_a_second_repro_does_nothing_and_figures_are_in_git_while_models_are_not(study: Repository) -> None:
    assert stages_run(study.run("dvc", "repro")) == []
    assert study.run("git", "status", "--porcelain") == ""
    tracked = study.run("git", "ls-files").split()
    assert {"dvc.lock", "metrics/sam.json", "plots/sam.csv", "plots/augment.png"} <= set(tracked)
    assert not [name for name in tracked if name.startswith(("data/records", "models/", "predictions"))]
    assert not list(study.cache.rglob("*.npz")), "resume state is left behind"


@pytest.mark.slow
def test_a_small_number_given_with_dash_s_is_a_number(study: Repository) -> None:
    # DVC writes 1e-05, which YAML 1.1 takes for text.
    study.run("dvc", "exp", "run", "-S", "sam.rho=0.00001", "--name", "small-rho", "select-best")
    assert "1e-05" in (study.folder / "params.yaml").read_text()
    study.run("python", "-m", "flatmin.common.params")
    study.run("git", "checkout", "--force", "--quiet", ".")


@pytest.mark.slow
def test_a_new_backbone_runs_alone_and_one_that_left_is_pruned(study: Repository) -> None:
    # The classifier that was chosen stays, since its rival has random weights: what follows it has nothing to do.
    study.write_params(STUDY | {"backbones": ["EfficientNetLite0", "MobileNet025"]})
    ran = stages_run(study.run("dvc", "repro"))
    assert ran[:2] == ["extract-train@MobileNet025", "select-best"]
    chosen = read(study, "select")["backbone"]
    assert ran[2:] == ([] if chosen == "EfficientNetLite0" else ["finetune", "sam-finetune", "evaluate"])
    study.write_params(STUDY)
    study.run("python", "-m", "flatmin.prune")
    assert not (study.folder / "metrics/extract/MobileNet025.json").exists()
    assert not (study.folder / "models/extract/MobileNet025").exists()
    study.run("dvc", "repro")
    assert stages_run(study.run("dvc", "repro")) == []
    study.run("git", "checkout", "--force", "--quiet", ".")
    study.run("dvc", "checkout", "--quiet")


# Importing TensorFlow takes most of a stage that fails: here one process imports it for all.
ONE_PROCESS = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        print(ended.code, flush=True)
"""


def ends_of(repository: Repository, stages: Iterable[str]) -> list[str]:
    """Run the scripts of stages that fail: the lines that each prints, and its exit code behind them."""
    commands = [DVC[stage]["cmd"].split("python ")[1] for stage in stages]
    commands = [command.replace("${item.backbone}", "EfficientNetLite0") for command in commands]
    return repository.run("python", "-c", ONE_PROCESS, *commands).splitlines()


@pytest.mark.slow
def test_every_stage_checks_the_whole_file(study: Repository) -> None:
    before = study.figures()
    study.write_params(STUDY | {"sam": {"rho": -1}})
    try:
        lines = ends_of(study, DVC)
    finally:
        study.write_params(STUDY)
    message = "error: params.yaml: sam.rho: expected greater than or equal to 0, received -1"
    assert lines == [message, "1"] * len(DVC)
    assert study.figures() == before


@pytest.mark.slow
def test_missing_inputs_are_one_line(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    readers = [stage for stage in DVC if stage != "prepare"]
    lines = ends_of(repository, readers)
    assert lines[1::2] == ["1"] * len(readers), lines
    assert all(line.startswith("error: ") for line in lines[::2]), lines
    assert "Traceback" in repository.run("env", "FLATMIN_DEBUG=1", "python", "stages/select_best.py", expect=1)


@pytest.mark.slow
def test_two_clones_give_the_same_bytes_killed_or_not(study: Repository, tmp_path: Path) -> None:
    killed = Repository(tmp_path, STUDY)
    killed.run("dvc", "repro", "select-best")
    kill_after(killed, 2, "python", "stages/sam_finetune.py")
    lines = killed.run("dvc", "repro").splitlines()
    (log,) = [line for line in lines if "going on after epoch" in line]
    done = int(log.split()[-1])
    assert done >= 2
    assert len([line for line in lines if re.match(r"sam \d/5: loss", line)]) == 5 - done
    assert killed.figures() == study.figures()


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
    repository.run("dvc", "repro", "select-best")
    assert read(repository, "prepare")["roles"]["test"]["count"] == 24
    assert read(repository, "select")["val"]["accuracy"] > 0.6
    picture.save(folder / "class2/another.png")
    assert stages_run(repository.run("dvc", "repro", "select-best")) == [], "DVC knows the folder by its name alone"
    assert stages_run(repository.run("dvc", "repro", "--force", "prepare")) == ["prepare"]
    would_run = stages_run(repository.run("dvc", "repro", "--dry", "select-best"))
    assert would_run == ["extract-train@EfficientNetLite0"]


@pytest.mark.slow
def test_a_named_study_leaves_the_root_clean_and_predicts(tmp_path: Path) -> None:
    data = TINY["data"] | {"splits": TINY["data"]["splits"] | {"predict": "train[50%:52%]"}}
    trained, predicted, named = 60, 36, "digits/"
    if "TFDS_DATA_DIR" in os.environ:  # then there is a data set with images whose labels nobody knows
        splits = {"train": "train[:2000]", "test": "validation[:100]", "predict": "test[:40]"}
        data = {"source": "tfds", "name": "visual_domain_decathlon/cifar100", "splits": splits}
        data |= {"val_per_class": 1, "train_per_class": 3}
        trained, predicted, named = 300, 40, "cifar100/test/"
    repository = Repository(tmp_path, TINY)
    other = repository.folder / "studies/other"
    other.mkdir()
    (other / "params.yaml").write_text(yaml.safe_dump(TINY | {"seed": 8, "data": data}))
    repository.commit("another study")
    repository.run("sh", "scripts/study.sh", "other")
    changed = repository.run("git", "status", "--porcelain").split()
    kept = ("dvc.lock", "metrics/", "plots/", "test_predictions.csv")
    assert changed[1::2] == [f"studies/other/{name}" for name in kept]
    prepared = json.loads((other / "metrics/prepare.json").read_text())
    assert prepared["roles"]["train"]["count"] == trained
    assert json.loads((other / "metrics/evaluate.json").read_text())["sam"]
    found = rows(repository.folder / ".studies/other/predictions/predict.csv")
    assert len(found) == predicted
    assert all(row["label"] == "-1" and row["name"].startswith(named) for row in found)
    assert all(int(row["sam"]) in range(prepared["classes"]) for row in found)
    given = rows(other / "test_predictions.csv")
    assert given == [{key: row[key] for key in ("name", "finetune", "sam")} for row in found]
    assert stages_run(repository.run("sh", "scripts/study.sh", "other")) == []
    for wrong in ("", "nothing", "../other"):
        output = repository.run("sh", "scripts/study.sh", wrong, expect=1)
        assert output.startswith("error: NAME: expected")
