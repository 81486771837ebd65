"""Choosing a backbone by its metrics, and deleting the files of unlisted ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repository import ROOT

from flatmin import prune
from flatmin.common.errors import InputError
from flatmin.common.params import Select
from flatmin.selection import backbone


def candidate(accuracy: float, multiply_adds: int) -> dict[str, Any]:
    return {"val": {"accuracy": accuracy, "loss": 1.0}, "multiply_adds": multiply_adds, "gradient_evaluations": 7}


@pytest.mark.parametrize(
    ("candidates", "tolerance", "expected"),
    [
        pytest.param({"a": (0.8, 10), "b": (0.9, 20)}, 0.0, "b", id="the best without a tolerance"),
        pytest.param({"a": (0.8, 10), "b": (0.9, 20)}, 0.2, "a", id="the cheapest within it"),
        pytest.param({"a": (0.7, 10), "b": (0.9, 20), "c": (0.89, 15)}, 0.05, "c", id="none beyond it"),
        pytest.param({"a": (0.9, 20), "b": (0.9, 10)}, 0.0, "b", id="equals: the cheapest"),
        pytest.param({"a": (0.85, 10), "b": (0.9, 10)}, 0.1, "b", id="equal costs: the best"),
        pytest.param({"b": (0.9, 10), "a": (0.9, 10)}, 0.0, "b", id="equal in both: the first"),
        pytest.param({"a": (0.89, 10), "b": (0.9, 20)}, 0.01, "a", id="exactly the tolerance: 0.9 - 0.01 > 0.89"),
        pytest.param({"a": (0.3, 10), "b": (0.1 + 0.2 + 0.1, 20)}, 0.1, "a", id="exactly the tolerance, rounded up"),
        pytest.param({"a": (0.8899, 10), "b": (0.9, 20)}, 0.01, "b", id="one image in 10,000 beyond the tolerance"),
        pytest.param({"a": (0.0, 10), "b": (1.0, 20)}, 1.0, "a", id="any"),
        pytest.param({"a": (0.0, 10)}, 0.0, "a", id="one"),
    ],
)
def test_choose_takes_the_cheapest_near_the_best(
    candidates: dict[str, tuple[float, int]], tolerance: float, expected: str
) -> None:
    assert backbone.choose({name: candidate(*pair) for name, pair in candidates.items()}, tolerance) == expected


@given(st.integers(1, 500), st.data())
def test_choose_difference_of_exactly_the_tolerance_is_within_it(count: int, data: st.DataObject) -> None:
    best = data.draw(st.integers(0, count))
    worse = data.draw(st.integers(0, best))
    candidates = {"a": candidate(worse / count, 1), "b": candidate(best / count, 2)}
    assert backbone.choose(candidates, (best - worse) / count) == "a"
    if worse < best:
        assert backbone.choose(candidates, (best - worse - 0.5) / count) == "b"


def select(backbones: list[str], tolerance: float) -> dict[str, Any]:
    """Select in the working directory."""
    folders = {"models": "models/extract", "metrics": "metrics/extract", "selected": "models/select"}
    return backbone.select(backbones, Select(metric="accuracy", tolerance=tolerance), **folders)


def test_choose_by_balanced_accuracy_takes_no_other_into_account() -> None:
    candidates = {"a": candidate(0.9, 10), "b": candidate(0.8, 10)}
    candidates["a"]["val"]["balanced_accuracy"], candidates["b"]["val"]["balanced_accuracy"] = 0.5, 0.7
    assert backbone.choose(candidates, 0.1) == "a"
    assert backbone.choose(candidates, 0.1, "balanced_accuracy") == "b"


def prune_but(backbones: list[str], folder: Path) -> list[str]:
    """Prune a working directory for a study of these backbones and one seed."""
    return prune.prune({"backbones": backbones, "seeds": [7]}, folder)


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory where extract-train has run for three backbones."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for name, accuracy, cost in (("ResNet50", 0.9, 30), ("MobileNet", 0.8, 10), ("MobileNet025", 0.95, 1)):
        for folder in (f"models/extract/{name}", "metrics/extract", "plots/extract"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"models/extract/{name}/model.json").write_text(name)
        (tmp_path / f"metrics/extract/{name}.json").write_text(json.dumps(candidate(accuracy, cost)))
        (tmp_path / f"plots/extract/{name}.csv").write_text("epoch\n")
    return tmp_path


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_select_copies_the_chosen_model_and_returns_its_metrics(trained: Path) -> None:
    metrics = select(["ResNet50", "MobileNet"], 0.0)
    assert metrics == {
        "backbone": "ResNet50",
        "best_val_accuracy": 0.9,
        "gradient_evaluations": 7,
        "multiply_adds": 30,
        "val": {"accuracy": 0.9, "loss": 1.0},
    }
    assert (trained / "models/select/model.json").read_text() == "ResNet50"
    metrics = select(["ResNet50", "MobileNet"], 0.1)
    assert (metrics["backbone"], metrics["val"]["accuracy"], metrics["best_val_accuracy"]) == ("MobileNet", 0.8, 0.9)
    assert (trained / "models/select/model.json").read_text() == "MobileNet"
    assert files(trained / "models/select") == {"model.json"}


@pytest.mark.parametrize("stopped_early", [True, False])
def test_select_passes_on_whether_the_training_stopped_early(stopped_early: bool, trained: Path) -> None:
    assert "stopped_early" not in select(["ResNet50"], 0.0)
    path = trained / "metrics/extract/ResNet50.json"
    path.write_text(json.dumps(candidate(0.9, 30) | {"stopped_early": stopped_early}))
    assert select(["ResNet50"], 0.0)["stopped_early"] == stopped_early


def test_select_replaces_the_whole_folder(trained: Path) -> None:
    (trained / "models/select").mkdir()
    (trained / "models/select/of-before").touch()
    select(["MobileNet"], 0.0)
    assert files(trained / "models/select") == {"model.json"}


def test_select_reads_no_unlisted_backbone(trained: Path) -> None:
    # It would win if it were read, and is broken besides.
    (trained / "metrics/extract/MobileNet025.json").write_text("{")
    assert select(["MobileNet", "ResNet50"], 0.0)["backbone"] == "ResNet50"


def test_select_missing_file_of_extract_train_is_named(trained: Path) -> None:
    (trained / "models/select").mkdir()
    with pytest.raises(InputError, match=r"^metrics/extract/ResNet101.json: expected a file that an earlier stage"):
        select(["ResNet50", "ResNet101"], 0.0)
    (trained / "models/extract/ResNet50/model.json").unlink()
    (trained / "models/extract/ResNet50").rmdir()
    with pytest.raises(InputError, match=r"^models/extract/ResNet50: .*extract-train@ResNet50 wrote"):
        select(["ResNet50"], 0.0)
    assert (trained / "models/select").is_dir()


def test_prune_deletes_unlisted_backbones(trained: Path) -> None:
    (trained / "models/extract/.MobileNet.1.part").mkdir()
    (trained / "metrics/select.json").touch()
    (trained / "models/finetune/7").mkdir(parents=True)
    (trained / "models/finetune/7/model.json").touch()
    before = files(trained)
    # `MobileNet` is the beginning of `MobileNet025`, which stays.
    assert prune_but(["ResNet50", "MobileNet025"], trained) == ["extract-train@MobileNet"]
    gone = {"models/extract/MobileNet/model.json", "metrics/extract/MobileNet.json", "plots/extract/MobileNet.csv"}
    assert files(trained) == before - gone
    assert (trained / "models/extract/.MobileNet.1.part").is_dir()
    assert prune_but(["ResNet50", "MobileNet025"], trained) == []


def test_prune_incomplete_backbone_is_deleted(trained: Path) -> None:
    (trained / "metrics/extract/MobileNet.json").unlink()
    assert prune_but(["ResNet50", "MobileNet025"], trained) == ["extract-train@MobileNet"]
    assert not (trained / "models/extract/MobileNet").exists()


def test_prune_before_anything_ran_deletes_nothing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    assert prune_but(["ResNet50"], tmp_path) == []
