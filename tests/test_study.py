"""scripts/study.sh around a pipeline of arithmetic; the notebook's test runs a real study by it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import toy
import yaml
from repository import TINY, stages_run

# A plot, and what evaluate writes where a role holds images whose labels nobody knows.
WRITTEN = """
    Path("plots").mkdir(exist_ok=True)
    Path("plots/train.csv").write_text("epoch,loss\\n1,2\\n")
    Path("predictions").mkdir(exist_ok=True)
    Path("predictions/predict.csv").write_text("name,label,final\\na,-1,3\\nb,-1,0\\n")
"""


@pytest.mark.slow
def test_study_runs_in_a_clone_and_its_results_alone_come_back(tmp_path: Path) -> None:
    checkout = toy.repository(tmp_path)
    script = checkout.folder / "stages/train.py"
    before, ends, after = script.read_text().partition("\n\nif __name__")
    script.write_text(before + WRITTEN + ends + after)
    dvc = copy.deepcopy(toy.DVC)
    dvc["stages"]["train"]["outs"].append("predictions")
    dvc["stages"]["train"]["plots"] = [{"plots/train.csv": {"cache": False}}]
    (checkout.folder / "dvc.yaml").write_text(yaml.safe_dump(dvc))
    study = checkout.folder / "studies/other"
    study.mkdir()
    (study / "params.yaml").write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"seed": 8}}))
    checkout.commit("another study")
    root = toy.lock(checkout)

    output = checkout.run("sh", "scripts/study.sh", "other")
    assert stages_run(output) == ["count", "train"]
    assert output.endswith("study other: results in studies/other\n")
    changed = checkout.run("git", "status", "--porcelain").split()
    kept = ("dvc.lock", "metrics/", "plots/", "test_predictions.csv")
    assert changed[1::2] == [f"studies/other/{name}" for name in kept]
    assert (study / "metrics/count.json").read_text().split() == ["{", '"count":', "11", "}"]
    assert (study / "test_predictions.csv").read_text().split() == ["name,final", "a,3", "b,0"]
    assert toy.lock(checkout) == root

    assert stages_run(checkout.run("sh", "scripts/study.sh", "other")) == []
    for wrong in ("", "nothing", "../other"):
        output = checkout.run("sh", "scripts/study.sh", wrong, expect=1)
        assert output.startswith("error: NAME: expected")
