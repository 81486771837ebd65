"""The pipeline as its user runs it, in a temporary repository."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures import STUDY, picture_folder, tiny_params
from PIL import Image
from repository import ROOT, TINY, Repository, stages_run

SOURCE = ROOT / "src"
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Imports that can refuse params and change no result: the schema knows backbones, SAM's settings, and picture sizes.
REFUSING = {("src/flatmin/common", f"src/flatmin/{room}") for room in ("images.py", "models", "sam")}


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the dotted names imported anywhere in a module of a package, but for those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (parent, node.module)))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(other, package)
        else:
            yield from imports(node, package)


def module_file(name: str) -> Path | None:
    """Return the file of a module or package of src/, None for what is neither."""
    path = SOURCE / Path(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def room(file: Path) -> str:
    """Return what dvc.yaml names for a file: a folder of src/flatmin, or a module in none."""
    first = file.relative_to(SOURCE / "flatmin").parts[0]
    return f"src/flatmin/{first}"


def imported_rooms(script: Path) -> set[str]:
    """Return the rooms of the modules that a script imports, directly or not, but those of REFUSING alone."""
    found: set[Path] = set()
    pending = [script]
    while pending:
        importer = pending.pop()
        package = ".".join(importer.parent.relative_to(SOURCE).parts) if importer.is_relative_to(SOURCE) else ""
        for name in imports(ast.parse(importer.read_text()), package):
            file = module_file(name) if name.split(".")[0] == "flatmin" else None
            if file is None or file in found or file == SOURCE / "flatmin/__init__.py":
                continue
            if importer == script or (room(importer), room(file)) not in REFUSING:
                found.add(file)
                pending.append(file)
    return {room(file) for file in found}


def script_of(stage: str) -> str:
    return next(word for word in DVC[stage]["cmd"].split() if word.endswith(".py"))


@pytest.mark.parametrize("stage", DVC)
def test_deps_are_the_rooms_that_the_stage_imports(stage: str) -> None:
    script = script_of(stage)
    named = {dep for dep in DVC[stage]["deps"] if dep.startswith(("src/", "stages/"))}
    assert named == imported_rooms(ROOT / script) | {script}


def records(path: str) -> str:
    """A path, or that of all records, of which scripts name the folder alone."""
    return re.sub(r"^data/records/.*", "data/records", path)


@pytest.mark.parametrize("stage", DVC)
def test_script_paths_are_those_that_dvc_yaml_declares(stage: str) -> None:
    declared = {
        path if isinstance(path, str) else next(iter(path))
        for key in ("deps", "outs", "metrics", "plots")
        for path in DVC[stage].get(key, ())
    }
    data = {records(path.partition("${")[0]) for path in declared if not path.startswith(("src/", "stages/"))}
    tree = ast.parse((ROOT / script_of(stage)).read_text())
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    assert {
        records(text)
        for text in texts
        if re.match(r"(data|models|metrics|plots)/|(predictions|evaluation|report|audit)$", text)
    } == data


def test_package_that_no_stage_depends_on_is_a_docstring() -> None:
    (statement,) = ast.parse((SOURCE / "flatmin/__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)


def test_imports_relative_ones_are_resolved() -> None:
    tree = ast.parse("from . import step\nfrom .methods import METHODS\nfrom ..common import files")
    assert set(imports(tree, "flatmin.sam")) == {
        "flatmin.sam",
        "flatmin.sam.step",
        "flatmin.sam.methods",
        "flatmin.sam.methods.METHODS",
        "flatmin.common",
        "flatmin.common.files",
    }


def test_imports_within_functions_count_and_imports_for_types_do_not(tmp_path: Path) -> None:
    code = """
if TYPE_CHECKING:
    from flatmin.evaluation import evaluate
def function():
    from flatmin import prune
"""
    (tmp_path / "script.py").write_text(code)
    assert imported_rooms(tmp_path / "script.py") == {"src/flatmin/prune.py"} | imported_rooms(
        SOURCE / "flatmin/prune.py"
    )


def test_edited_line_reruns_less_than_60_percent_of_the_stages() -> None:
    lines, reruns = 0, 0
    for path in SOURCE.rglob("*.py"):
        holders = {str(each.relative_to(ROOT)) for each in (path, *path.parents) if each.is_relative_to(SOURCE)}
        count = len(path.read_text().splitlines())
        lines += count
        reruns += count * sum(not holders.isdisjoint(stage["deps"]) for stage in DVC.values())
    assert 0 < reruns / lines / len(DVC) < 0.6


def test_params_every_section_drives_a_stage() -> None:
    from flatmin.common.params import Params

    named = {name for stage in DVC.values() for name in stage["params"] if isinstance(name, str)}
    assert named == set(Params.model_fields) | {"extract.image_size", "finetune.image_size", "select.metric"}


def read(repository: Repository, name: str) -> Any:
    return json.loads((repository.folder / "metrics" / f"{name}.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_repro_runs_every_stage_and_prints_nothing_of_tensorflow(finished_study: Repository) -> None:
    output = (finished_study.folder.parent / "repro.log").read_text()
    assert stages_run(output) == [
        *("prepare", "augment-preview", "extract-train@EfficientNetLite0", "select-best", "audit"),
        *("finetune@7", "sam-finetune@7", "control@7", "finalize", "evaluate", "report"),
    ]
    assert "prepare: train 60, val 54, test 180; 10 classes" in output.splitlines()
    assert "prepare: smallest difference that can be shown: " in output
    assert re.search(r"^report: SAM is .* plain fine-tuning at equal compute.* 1 seed, 180 test images", output, re.M)
    assert f"report: {finished_study.folder}/report/index.html" in output.splitlines()
    assert "oneDNN" not in output, "what TensorFlow writes as it is imported"


@pytest.mark.slow
def test_metrics_hold_the_keys_that_other_programs_rely_on(finished_study: Repository) -> None:
    study = finished_study
    records = json.loads((study.folder / "data/records/dataset.json").read_text())
    assert read(study, "prepare")["digest"] == records["digest"]
    trainings = {"extract/EfficientNetLite0": (2, 1), "finetune/7": (5, 1), "sam/7": (5, 2), "control/7": (10, 1)}
    for name, (epochs, gradients) in trainings.items():
        metrics = read(study, name)
        balanced = {"balanced_accuracy", "balanced_loss"}
        assert set(metrics["val"]) == {"accuracy", "top5_accuracy", "loss"} | balanced
        assert metrics["epochs"] == epochs
        assert metrics["validations"] == (2 if name.startswith("extract") else 5)
        assert 1 <= metrics["best_epoch"] <= epochs
        assert metrics["gradient_evaluations"] == 60 * epochs * gradients
    assert read(study, "select")["backbone"] == "EfficientNetLite0"
    assert read(study, "select")["val"]["accuracy"] == read(study, "extract/EfficientNetLite0")["val"]["accuracy"]
    evaluated = read(study, "evaluate")
    scores = {"accuracy", "balanced_accuracy", "macro_f1", "top5_accuracy", "loss", "ece"}
    for name in ("extract", "finetune", "control", "sam", "final"):
        assert set(evaluated[name]["test"]) == scores | {"calibrated_loss", "calibrated_ece"}
    for name in ("finetune", "control", "sam"):
        eigenvalues = [evaluated[name]["sharpness"].pop(f"eigenvalue_{index}") for index in range(1, 6)]
        assert eigenvalues == sorted(eigenvalues, reverse=True)
        assert set(evaluated[name]["sharpness"]) == {"loss", "gradient_rise", "adaptive_rise", "trace"}
    for other in ("control", "finetune"):
        difference = evaluated[f"sam_minus_{other}"]
        assert {"accuracy", "low", "high", "covers", "seeds"} <= set(difference)
        assert difference["covers"] == "images", "of one seed"
        assert difference["accuracy"] == pytest.approx(
            evaluated["sam"]["test"]["accuracy"] - evaluated[other]["test"]["accuracy"]
        )


@pytest.mark.slow
def test_predictions_name_every_test_image(finished_study: Repository) -> None:
    study = finished_study
    found = rows(study.folder / "predictions/test.csv")
    assert list(found[0]) == ["name", "label", "extract", "finetune@7", "control@7", "sam@7", "final"]
    assert len({row["name"] for row in found}) == len(found)
    right = sum(row["label"] == row["sam@7"] for row in found) / len(found)
    assert right == pytest.approx(read(study, "evaluate")["sam"]["test"]["accuracy"])


@pytest.mark.slow
def test_report_shows_the_digests_of_dvc_lock_and_is_made_again_to_the_byte(study: Repository) -> None:
    path = study.folder / "report/index.html"
    before = path.read_bytes()
    locked = yaml.safe_load((study.folder / "dvc.lock").read_text())["stages"]
    for stage in ("prepare", "finetune@7", "evaluate"):
        assert all(out["md5"] in before.decode() for out in locked[stage]["outs"])
    assert stages_run(study.run("dvc", "repro", "--force", "--single-item", "report")) == ["report"]
    assert path.read_bytes() == before


@pytest.mark.slow
def test_plots_show_a_bar_for_each_method_and_trainings_in_one_chart(study: Repository) -> None:
    lines = study.run("dvc", "plots", "show", "--json", "--out", "drawn").splitlines()  # warnings come first
    shown = json.loads(lines[-1])["data"]
    (bars,) = [each["content"] for each in shown["plots/class_accuracy.csv"]]
    values = bars["data"]["values"]
    assert len({(row["class"], row["method"]) for row in values}) == len(values) == 40
    assert [bars["encoding"][channel]["field"] for channel in ("y", "yOffset", "x")] == ["class", "method", "accuracy"]
    for name in ("val accuracy of the first seed", "val loss of the first seed"):
        (curves,) = [each["content"] for each in shown[name]]
        assert {row["filename"] for row in curves["data"]["values"]} == {"finetune/7.csv", "control/7.csv", "sam/7.csv"}
        assert curves["encoding"]["color"]["field"] == "filename"


@pytest.mark.slow
def test_preview_is_a_picture(finished_study: Repository) -> None:
    with Image.open(finished_study.folder / "plots/augment.png") as picture:
        assert picture.width >= 400
        assert len(picture.convert("L").getcolors(2**16) or []) > 50


@pytest.mark.slow
def test_second_repro_runs_nothing_and_git_tracks_metrics_but_no_models(study: Repository) -> None:
    assert stages_run(study.run("dvc", "repro")) == []
    assert study.run("git", "status", "--porcelain") == ""
    tracked = study.run("git", "ls-files").split()
    assert {"dvc.lock", "metrics/sam/7.json", "plots/sam/7.csv", "plots/augment.png"} <= set(tracked)
    assert not [
        name
        for name in tracked
        if name.startswith(("data/records", "models/", "predictions", "audit/", "evaluation/", "report/"))
    ]
    assert not list(study.cache.rglob("*.npz")), "resume state is left behind"


# What is edited -> the stages whose deps that changes.
TRAINING = {"extract-train@EfficientNetLite0", "finetune@7", "control@7", "sam-finetune@7"}
EDITS = {
    "evaluation/evaluate.py": {"evaluate"},
    "report/page.py": {"report"},
    "selection/release.py": {"select-best", "finalize"},
    "data/sources": {"prepare"},
    "audit": {"audit"},
    "models/build.py": TRAINING | {"audit", "evaluate"},
    "sam": {"sam-finetune@7", "evaluate"},
    "training": TRAINING,
}


def edit(repository: Repository, name: str) -> None:
    """Add a comment to a module of src/flatmin, or to one of a package."""
    path = repository.folder / "src/flatmin" / name
    path = path / "__init__.py" if path.is_dir() else path
    path.write_text(path.read_text() + "# edited\n")


def stages_changed(repository: Repository) -> set[str]:
    """Return the stages of which DVC says that a dep or an output changed."""
    return set(json.loads(repository.run("dvc", "status", "--json")))


@pytest.mark.slow
def test_editing_a_room_changes_the_stages_that_use_it_and_no_others(study: Repository) -> None:
    assert stages_changed(study) == set()
    for name, stages in EDITS.items():
        edit(study, name)
        assert stages_changed(study) == stages, name
        study.run("git", "checkout", "--quiet", ".")


@pytest.mark.slow
def test_editing_the_sources_retrains_nothing_when_the_records_come_out_the_same(study: Repository) -> None:
    edit(study, "data/sources")
    assert stages_run(study.run("dvc", "repro")) == ["prepare"]
    assert stages_changed(study) == set()


@pytest.mark.slow
def test_more_to_predict_and_in_test_retrains_nothing(study: Repository) -> None:
    splits = TINY["data"]["splits"] | {"test": "train[88%:]", "predict": "train[50%:51%]"}
    study.write_params(STUDY | {"data": STUDY["data"] | {"splits": splits}})
    assert stages_run(study.run("dvc", "repro", "prepare")) == ["prepare"]
    assert stages_changed(study) == {"audit", "evaluate", "report"}


@pytest.mark.slow
def test_exp_run_small_number_stays_a_number(study: Repository) -> None:
    # DVC writes 1e-05, which YAML 1.1 takes for text.
    study.run("dvc", "exp", "run", "-S", "sam.rho=0.00001", "--name", "small-rho", "select-best")
    assert "1e-05" in (study.folder / "params.yaml").read_text()
    study.run("python", "-m", "flatmin.check")


def experiment(repository: Repository, change: str, *targets: str) -> list[str]:
    return stages_run(repository.run("dvc", "exp", "run", "-S", change, *targets))


@pytest.mark.slow
def test_exp_run_reruns_what_a_change_concerns(study: Repository) -> None:
    def model(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (study.folder / "models" / name / "7").iterdir()}

    assert experiment(study, "finalize.tolerance=0.02") == ["finalize", "report"]
    before = model("finetune")
    took = {name: read(study, f"{name}/7")["gradient_evaluations"] for name in ("finetune", "control", "sam")}
    assert took["control"] == took["sam"] == 2 * took["finetune"]
    # Without perturbation SAM takes what finetune took: control takes as little, and all give the same bytes.
    assert experiment(study, "sam.rho=0", "finalize") == ["sam-finetune@7", "control@7", "finalize"]
    assert stages_changed(study) == {"evaluate", "report"}
    assert model("sam") == model("control") == model("finetune") == before
    assert read(study, "control/7") == read(study, "finetune/7")
    # A seed more trains that seed, and one that left is pruned and not read.
    assert experiment(study, "seeds=[8]", "finalize") == ["finetune@8", "sam-finetune@8", "control@8", "finalize"]
    assert set(read(study, "final")["finetune"]["seeds"]) == {"8"}
    assert "pruned: finetune@7" in study.run("python", "-m", "flatmin.prune")
    assert not (study.folder / "models/finetune/7").exists()


@pytest.mark.slow
def test_repro_new_backbone_runs_only_itself_and_prune_deletes_one_that_left(study: Repository) -> None:
    # The classifier that was chosen stays, since its rival has random weights: what follows it has nothing to do.
    study.write_params(STUDY | {"backbones": ["EfficientNetLite0", "MobileNet025"]})
    ran = stages_run(study.run("dvc", "repro"))
    assert ran[:3] == ["prepare", "extract-train@MobileNet025", "select-best"]
    assert read(study, "select")["backbone"] == "EfficientNetLite0"
    assert ran[3:] == ["report"]
    study.write_params(STUDY)
    study.run("python", "-m", "flatmin.prune")
    assert not (study.folder / "metrics/extract/MobileNet025.json").exists()
    assert not (study.folder / "models/extract/MobileNet025").exists()
    study.run("dvc", "repro")
    assert stages_run(study.run("dvc", "repro")) == []


# Importing TensorFlow takes most of a stage that fails: here one process imports it for all, which none may end.
ONE_PROCESS = """
import os, runpy, sys
os._exit = sys.exit
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        print(ended.code, flush=True)
"""


def failures(repository: Repository, stages: Iterable[str]) -> list[str]:
    """Run the scripts of stages that fail; return the lines that each prints, each followed by its exit code."""
    commands = [DVC[stage]["cmd"].split("python ")[1] for stage in stages]
    commands = [
        command.replace("${item.backbone}", "EfficientNetLite0").replace("${item.seed}", "7") for command in commands
    ]
    return repository.run("python", "-c", ONE_PROCESS, *commands).splitlines()


@pytest.mark.slow
def test_every_stage_wrong_param_of_another_stage_is_one_line(study: Repository) -> None:
    before = study.results()
    study.write_params(STUDY | {"sam": {"rho": -1}})
    lines = failures(study, DVC)
    message = "error: params.yaml: sam.rho: expected greater than or equal to 0, received -1"
    assert lines == [message, "1"] * len(DVC)
    assert study.results() == before


@pytest.mark.slow
def test_every_stage_missing_input_is_one_line(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    readers = [stage for stage in DVC if stage != "prepare"]
    lines = failures(repository, readers)
    assert lines[1::2] == ["1"] * len(readers), lines
    assert all(line.startswith("error: ") for line in lines[::2]), lines
    assert "Traceback" in repository.run("env", "FLATMIN_DEBUG=1", "python", "stages/select_best.py", expect=1)


@pytest.mark.slow
def test_second_clone_gives_the_same_bytes_though_killed(finished_study: Repository, tmp_path: Path) -> None:
    killed = Repository(tmp_path, STUDY)
    killed.run("dvc", "repro", "select-best")
    kill_after(killed, 2, "python", "stages/sam_finetune.py", "7")
    lines = killed.run("dvc", "repro").splitlines()
    (log,) = [line for line in lines if re.search(r"^sam-finetune@7: .* after epoch \d+$", line)]
    done = int(log.split()[-1])
    assert done >= 2
    assert len([line for line in lines if re.match(r"sam-finetune@7 \d/5: loss", line)]) == 5 - done
    assert killed.results() == finished_study.results()


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
def test_repro_study_of_a_folder_learns_and_knows_the_folder_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for split, per_class in (("train", 9), ("val", 3), ("test", 8), ("predict", 1)):
        picture_folder(folder / split, per_class=per_class)
    params = tiny_params(extract={"epochs": 6})
    params["data"] = {"source": "folder", "name": str(folder)}
    repository = Repository(tmp_path / "study", params)
    repository.run("dvc", "repro", "select-best")
    assert read(repository, "prepare")["roles"]["test"]["count"] == 24
    assert read(repository, "select")["val"]["accuracy"] > 0.6
    for splits, expected in (
        (("test", "predict"), []),
        (("train",), ["extract-train@EfficientNetLite0"]),
    ):
        for split in splits:
            Image.new("RGB", (20, 24), "blue").save(folder / split / "class2/another.png")
        assert stages_run(repository.run("dvc", "repro", "select-best")) == []
        assert stages_run(repository.run("dvc", "repro", "--force", "prepare")) == ["prepare"]
        assert [read(repository, "prepare")["roles"][role]["count"] for role in ("test", "predict")] == [25, 4]
        assert stages_run(repository.run("dvc", "repro", "--dry", "select-best")) == expected
