"""A stage gets what dvc.yaml declares for it, and what it read is what DVC records."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
import yaml
from repository import ROOT, TINY, stages_run

from flatmin.common import stage
from flatmin.common.errors import InputError

DVC: dict[str, dict[str, Any]] = {
    "stages": {
        "train": {
            "cmd": "python stages/train.py",
            "deps": ["data/records", "src/toy", "stages/train.py"],
            "params": ["seeds", "sam", {"src/toy/step.py": ["VERSION"]}],
        },
        "extract": {
            "matrix": {"backbone": "${backbones}", "fold": [1, 2]},
            "cmd": "python stages/train.py ${item.backbone}",
            "deps": ["models/${item.backbone}"],
        },
        "tune": {
            "matrix": {"seed": "${seeds}"},
            "cmd": "python stages/train.py ${item.seed}",
            "deps": ["models/budget/${item.seed}.json"],
        },
    }
}
END = r"while train ran; nothing is recorded, run `dvc repro` again"


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("data/records/train.bin", "src/toy/loss.py", "src/toy/step.py", "stages/train.py"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("content")
    write("dvc.yaml", DVC)
    write("params.yaml", TINY)
    return tmp_path


def write(name: str, values: Any) -> None:
    Path(name).write_text(yaml.safe_dump(values))


def params_with(section: str, **values: Any) -> dict[str, Any]:
    return TINY | {section: TINY[section] | values}


def test_declared_params_are_the_declared_sections_and_no_other() -> None:
    declared = stage.declare("train")
    assert declared.params.seeds == [7]
    assert declared.params.sam.rho == 0.05
    with pytest.raises(AttributeError, match=r"^dvc.yaml does not declare `finetune` for train$"):
        _ = declared.params.finetune
    with pytest.raises(AttributeError, match="does not declare `model_copy`"):
        declared.params.model_copy()


def declare_single_key() -> stage.Declared:
    write("dvc.yaml", {"stages": {"train": DVC["stages"]["train"] | {"params": ["seeds", "finetune.image_size"]}}})
    return stage.declare("train")


def test_declared_params_of_a_single_key_are_that_key_and_no_other() -> None:
    declared = declare_single_key()
    assert declared.params.finetune.image_size == TINY["finetune"]["image_size"]
    with pytest.raises(AttributeError, match=r"^dvc.yaml does not declare `epochs` for train$"):
        _ = declared.params.finetune.epochs


@pytest.mark.parametrize("size", [64, None, {"MobileNet025": 64}])
def test_check_unchanged_after_edit_of_a_single_key_fails(size: Any) -> None:
    declared = declare_single_key()
    write("params.yaml", params_with("finetune", epochs=77))
    declared.check_unchanged()
    write("params.yaml", params_with("finetune", image_size=size))
    with pytest.raises(InputError, match=r"^params\.yaml: finetune\.image_size"):
        declared.check_unchanged()


def test_declared_params_are_checked_as_a_whole() -> None:
    write("params.yaml", params_with("evaluate", ece_bins=0))
    with pytest.raises(InputError, match=r"params\.yaml: evaluate\.ece_bins: expected"):
        stage.declare("train")


def edit_nothing() -> None:
    pass


def touch_no_value() -> None:
    values = params_with("sam", every=1, num_batch_splits=1)  # num_batch_splits is the schema's default
    Path("params.yaml").write_text("# A comment\n" + yaml.safe_dump(values, default_flow_style=True, sort_keys=False))


def edit_other_sections() -> None:
    write("params.yaml", params_with("evaluate", ece_bins=5) | {"backbones": ["MobileNet025"]})


def edit_other_files() -> None:
    Path("src/other").mkdir()
    Path("src/other/code.py").write_text("")
    Path("src/toy/__pycache__").mkdir()
    Path("src/toy/__pycache__/loss.cpython-311.pyc").write_bytes(b"compiled")
    Path("data/other").write_text("")


def rewrite_same_source() -> None:
    os.utime("src/toy/loss.py", (1, 1))


@pytest.mark.parametrize(
    "edit", [edit_nothing, touch_no_value, edit_other_sections, edit_other_files, rewrite_same_source]
)
def test_check_unchanged_passes_where_nothing_declared_changed(edit: Callable[[], None]) -> None:
    declared = stage.declare("train")
    edit()
    declared.check_unchanged()


def edit_rho() -> None:
    write("params.yaml", params_with("sam", rho=0.4))


def add_alpha() -> None:
    write("params.yaml", params_with("sam", method="gsam", alpha=0.2))


def edit_seed() -> None:
    write("params.yaml", TINY | {"seeds": [7, 8]})


def break_params() -> None:
    write("params.yaml", params_with("sam", rho=-1))


def remove_params() -> None:
    Path("params.yaml").unlink()


def edit_source() -> None:
    Path("src/toy/loss.py").write_text("CONTENT")


def add_source() -> None:
    Path("src/toy/new.py").write_text("")


def rename_source() -> None:
    Path("src/toy/loss.py").rename("src/toy/losses.py")


def remove_script() -> None:
    Path("stages/train.py").unlink()


def edit_data() -> None:
    Path("data/records/train.bin").write_text("CONTENT")
    os.utime("data/records/train.bin", (1, 1))


def add_data() -> None:
    Path("data/records/more.bin").write_text("")


def remove_data() -> None:
    Path("data/records/train.bin").unlink()
    Path("data/records").rmdir()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_rho, rf"^params\.yaml: sam\.rho: changed from 0\.05 to 0\.4 {END}$"),
        (add_alpha, rf"^params\.yaml: sam\.alpha: changed from nothing to 0\.2 {END}$"),
        (edit_seed, rf"^params\.yaml: seeds: changed from \[7\] to \[7, 8\] {END}$"),
        (break_params, rf"^params\.yaml: changed {END} \(params\.yaml: sam\.rho: expected .*, received -1\)$"),
        (remove_params, rf"^params\.yaml: changed {END} \(params\.yaml: expected a file, found none\)$"),
        (edit_source, rf"^src/toy/loss\.py: changed {END}$"),
        (add_source, rf"^src/toy/new\.py: added {END}$"),
        (rename_source, rf"^src/toy/loss\.py: removed {END}$"),
        (remove_script, rf"^stages/train\.py: removed {END}$"),
        (edit_data, rf"^data/records/train\.bin: changed {END}$"),
        (add_data, rf"^data/records/more\.bin: added {END}$"),
        (remove_data, rf"^data/records/train\.bin: removed {END}$"),
    ],
)
def test_check_unchanged_names_what_changed(edit: Callable[[], None], message: str) -> None:
    declared = stage.declare("train")
    edit()
    with pytest.raises(InputError, match=message):
        declared.check_unchanged()


def test_check_unchanged_shortens_long_values() -> None:
    values = copy.deepcopy(TINY)
    values["data"]["name"] = "x" * 500
    dvc = copy.deepcopy(DVC)
    dvc["stages"]["train"]["params"] = ["data"]
    write("dvc.yaml", dvc)
    declared = stage.declare("train")
    write("params.yaml", values)
    with pytest.raises(InputError) as raised:
        declared.check_unchanged()
    assert len(str(raised.value)) < 200


RUN = """
import atexit, sys
from pathlib import Path
from flatmin.common import stage


class State:
    def remove(self):
        print("state removed")

    def __del__(self):  # as an HDF5 file on a full disk, which then crashes
        print("state collected")


def main(declared, backbone, fold):
    print("trains", backbone, fold)
    if fold == "2":
        Path("models").mkdir()
        Path(f"models/{backbone}").write_text("another wrote it meanwhile")
    return State()


atexit.register(print, "Python ends")
stage.run("extract", main, *sys.argv[1:])
"""
ADDED = "error: models/EfficientNetLite0: added while extract ran; nothing is recorded, run `dvc repro` again\n"


@pytest.mark.parametrize(
    ("fold", "variables", "expected"),
    [
        ("1", {}, (0, "trains EfficientNetLite0 1\nstate removed\nstate collected\n", "")),
        ("2", {}, (1, "trains EfficientNetLite0 2\n", ADDED)),
        ("2", {"TF_CONFIG": "{}"}, (1, "trains EfficientNetLite0 2\nstate collected\nPython ends\n", ADDED)),
    ],
)
def test_run_checks_a_matrix_items_dependencies_and_ends_before_python_does_unless_there_are_workers(
    fold: str, variables: dict[str, str], expected: tuple[int, str, str]
) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), **variables}
    command = [sys.executable, "-c", RUN, "EfficientNetLite0", fold]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_declare_for_a_seed_checks_that_seeds_dependencies(checkout: Path) -> None:
    write("params.yaml", TINY | {"seeds": [7, 42]})
    Path("models/budget").mkdir(parents=True)
    for seed in (7, 42):
        Path(f"models/budget/{seed}.json").write_text("{}")
    of_7, of_42 = (stage.declare("tune", seed) for seed in ("7", "42"))
    Path("models/budget/42.json").unlink()
    write("params.yaml", TINY)  # `tune` declares no section: the list of seeds is in no seed's results
    of_7.check_unchanged()
    with pytest.raises(InputError, match=r"^models/budget/42\.json: removed while tune ran"):
        of_42.check_unchanged()
    with pytest.raises(InputError, match=r"^seeds: expected one of 7, received 42$"):
        stage.declare("tune", "42")


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((), "extract: expected backbone fold, received no argument"),
        (("EfficientNetLite0",), "extract: expected backbone fold, received EfficientNetLite0"),
        (("MobileNet025", "1"), "backbones: expected one of EfficientNetLite0, received MobileNet025"),
        (("EfficientNetLite0", "3"), "fold: expected one of 1, 2, received 3"),
    ],
)
def test_declare_with_items_that_the_matrix_lacks_is_an_error(items: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        stage.declare("extract", *items)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "dvc.yaml: expected a file, found none"),
        ("stages: {", "dvc.yaml: expected YAML, received"),
        ("", "dvc.yaml: stages.train: expected a stage, found none"),
        ("stages: {finetune: {}}", "dvc.yaml: stages.train: expected a stage, found none"),
    ],
)
def test_declare_without_a_stage_in_dvc_yaml_is_an_error(text: str | None, message: str) -> None:
    Path("dvc.yaml").unlink()
    if text is not None:
        Path("dvc.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        stage.declare("train")


@pytest.mark.slow
def test_params_edited_by_a_refused_experiment_are_not_recorded_as_the_running_stages(tmp_path: Path) -> None:
    checkout = toy.repository(tmp_path / "toy")
    before = toy.lock(checkout)
    process = toy.start_training(checkout, rho=0.03)
    assert "Queued experiment" in checkout.run("dvc", "exp", "run", "--queue", "-S", "sam.rho=0.4")
    assert "rho: 0.03" in (checkout.folder / "params.yaml").read_text(), "a queued one leaves the checkout alone"
    assert "ERROR" in checkout.run("dvc", "exp", "run", "-S", "sam.rho=0.4", expect=None)
    assert "rho: 0.4" in (checkout.folder / "params.yaml").read_text(), "DVC writes it before it refuses"
    output = toy.finish(checkout, process)
    assert process.returncode != 0
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(rf"error: params\.yaml: sam\.rho: changed from 0\.03 to 0\.4 {END}", error)
    assert toy.lock(checkout) == before, "nothing is recorded"
    # The next run is the edited one's own, and the one after that the first value's.
    for rho, loss in ((0.4, "4.0"), (0.03, "0.3")):
        toy.edit_params(checkout, rho=rho)
        assert stages_run(checkout.run("dvc", "repro")) == ["train"]
        assert (checkout.folder / "models/train").read_text() == loss
        recorded = yaml.safe_load(toy.lock(checkout))["stages"]["train"]["params"]["params.yaml"]
        assert recorded["sam"]["rho"] == rho
