"""prune deletes the outputs of items that left their list, by dvc.yaml's matrix, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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
