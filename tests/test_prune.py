"""prune deletes the outputs of items that left their list, by dvc.yaml's matrix, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from repository import ROOT, TINY

from flatmin import prune

DVC = {
    "stages": {
        "prepare": {"cmd": "true", "outs": ["data/records"]},
        "train": {
            "matrix": {"backbone": "${backbones}"},
            "cmd": "train ${item.backbone}",
            "outs": ["models/${item.backbone}"],
            "metrics": [{"metrics/${item.backbone}.json": {"cache": False}}],
            "plots": [{"plots/run-${item.backbone}.csv": {"cache": False, "x": "epoch"}}],
        },
        "tune": {
            "matrix": {"seed": "${seeds}"},
            "cmd": "tune ${item.seed}",
            "outs": ["tuned/${item.seed}"],
        },
    }
}
LISTS = {"backbones": ["ResNet50", "MobileNet025"], "seeds": [42]}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder where `train` has run for three backbones, and `tune` for two seeds."""
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(DVC))
    for name in ("ResNet50", "MobileNet", "MobileNet025"):
        write(tmp_path, f"models/{name}/model.json", f"metrics/{name}.json", f"plots/run-{name}.csv")
    write(tmp_path, "tuned/42/model.json", "tuned/7/model.json", "data/records/train.bin")
    return tmp_path


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_prune_items_that_left_their_lists_lose_every_output(trained: Path) -> None:
    before = files(trained)
    # `MobileNet` is the beginning of `MobileNet025`, which stays; 42 is a number in params.yaml.
    assert prune.prune(LISTS, trained) == ["train@MobileNet", "tune@7"]
    gone = {"models/MobileNet/model.json", "metrics/MobileNet.json", "plots/run-MobileNet.csv", "tuned/7/model.json"}
    assert files(trained) == before - gone
    assert not (trained / "tuned/7").exists()
    assert prune.prune(LISTS, trained) == []


def test_prune_files_that_no_template_matches_stay(trained: Path) -> None:
    others = ("metrics/notes.txt", "plots/MobileNet.csv", "models/.MobileNet.1.part/half", "other/MobileNet.json")
    write(trained, *others)
    prune.prune(LISTS, trained)
    assert set(others) <= files(trained)


def test_prune_item_with_one_output_left_is_deleted(trained: Path) -> None:
    (trained / "metrics/MobileNet.json").unlink()
    (trained / "plots/run-MobileNet.csv").unlink()
    assert "train@MobileNet" in prune.prune(LISTS, trained)
    assert not (trained / "models/MobileNet").exists()


def test_prune_before_anything_ran_deletes_nothing(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(DVC))
    assert prune.prune(LISTS, tmp_path) == []


KINDS = {"metrics": "json", "plots": "csv"}
TUNED = ("finetune", "control", "sam")
TUNED_FILES = ("classifier.weights.h5", "model.json", "val_logits.npy")


def outputs_of_seed(seed: int) -> set[str]:
    """What the stages of dvc.yaml write for a seed."""
    models = {f"models/{name}/{seed}/{file}" for name in TUNED for file in TUNED_FILES}
    others = {f"{folder}/{name}/{seed}.{kind}" for name in TUNED for folder, kind in KINDS.items()}
    return models | others | {f"models/budget/{seed}.json"}


# Of stages without a matrix, or a folder's own.
KEPT = {
    "data/records/train.csv",
    "models/select/model.json",
    "models/final/model.json",
    "models/finetune/.gitignore",
    "models/budget/.gitignore",
    "metrics/prepare.json",
    "metrics/select.json",
    "metrics/final.json",
    "metrics/evaluate.json",
    "plots/confusion.csv",
    "predictions/test.npz",
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder in which the stages of the real dvc.yaml have run for the seeds 4, 42 and 43."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(TINY | {"seeds": [4, 43]}))
    backbone = TINY["backbones"][0]
    write(tmp_path, *KEPT, f"models/extract/{backbone}/model.json", f"metrics/extract/{backbone}.json")
    for seed in (4, 42, 43):
        write(tmp_path, *outputs_of_seed(seed))
    return tmp_path


def pruned(study: Path) -> list[str]:
    """The items that the command says it pruned."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "flatmin.prune"]
    lines = subprocess.run(command, cwd=study, env=environment, check=True, capture_output=True, text=True).stdout
    ends = "pruned: ", ", which params.yaml no longer lists"
    assert all(line.startswith(ends[0]) and line.endswith(ends[1]) for line in lines.splitlines())
    return [line.removeprefix(ends[0]).removesuffix(ends[1]) for line in lines.splitlines()]


def test_prune_seeds_that_left_the_list_lose_models_metrics_plots_and_budgets(study: Path) -> None:
    before = files(study)
    assert outputs_of_seed(42) < before
    assert pruned(study) == ["control@42", "finetune@42", "sam-finetune@42"]
    assert files(study) == before - outputs_of_seed(42)
    assert not [path for path in study.rglob("*") if path.stem == "42"], "no empty folder is left"
    assert pruned(study) == []


def test_prune_of_a_training_without_a_seed_deletes_it(study: Path) -> None:
    """Before there were seeds each of these folders was a classifier's: finalize would depend on its files."""
    before = files(study) - outputs_of_seed(42)
    former = [f"models/{name}/{file}" for name in ("finetune", "sam") for file in TUNED_FILES[:2]]
    write(study, *former)
    found = pruned(study)
    assert {"finetune@classifier.weights.h5", "finetune@model.json", "sam-finetune@model.json"} < set(found)
    assert files(study) == before
