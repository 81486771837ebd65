"""What val tells of a sweep's settings, from the logits that its experiments kept in DVC's cache."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from repository import ROOT, TINY, Repository

from flatmin.common import files

sys.path.insert(0, str(ROOT / "scripts"))
import grids
import on_val

RIGHT = {0.02: 60, 0.05: 90, 0.1: 88}  # rho -> how many of the 100 val images are classified correctly, by every seed


def read_runs(**keys: list[Any]) -> list[grids.Run]:
    targets = keys.pop("targets", ["sam-finetune"])
    values = {"targets": targets, "runs": [{"seeds": [[7, 8]], "sam.rho": [*RIGHT], **keys}]}
    Path("grid.yaml").write_text(yaml.safe_dump(values))
    return grids.read_grid(Path("grid.yaml"))[0]


def keep(repository: Repository, run: grids.Run, first_image: int = 0) -> None:
    """Make the experiment that a run would have left: labels and logits of val. first_image: the number of one."""
    names = [f"image{first_image + number}" for number in range(100)]
    files.write_csv("data/records/val/index.csv", ("name", "label"), ((name, 1) for name in names))
    for seed in run.settings["seeds"]:
        right = np.roll(np.arange(100) < RIGHT[run.values["sam.rho"]], seed)
        Path(f"models/sam/{seed}").mkdir(parents=True, exist_ok=True)
        np.save(f"models/sam/{seed}/val_logits.npy", np.stack([~right, right], axis=1).astype(np.float32))
    repository.run("dvc", "add", "--quiet", "data", "models")
    repository.commit(run.name)
    repository.run("git", "update-ref", f"refs/exps/ab/cdef/{run.name}", "HEAD")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A repository, in the current folder, whose data and models are no stage's, so that a test can write them."""
    made = Repository.existing(tmp_path)
    made.folder.mkdir()
    monkeypatch.chdir(made.folder)
    made.run("git", "init", "--quiet")
    made.run("dvc", "init", "--quiet")
    made.write_params(TINY)
    made.commit("start")
    shutil.copy(ROOT / "dvc.yaml", made.folder)  # for the names of runs; not committed
    Path(".git/info/exclude").write_text("dvc.yaml\ngrid.yaml\n")
    return made


@pytest.mark.slow
def test_write_names_the_best_and_what_val_cannot_tell_from_it(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, page = read_runs(), Path("grid.val.md")
    pipeline = Path("dvc.yaml")
    for run in runs:
        content = pipeline.read_text()
        pipeline.unlink()  # DVC would find two owners of models/
        keep(repository, run)
        pipeline.write_text(content)
    assert on_val.write(runs, page)
    told = capsys.readouterr().out
    assert told == (
        "val: 3 settings of sam-finetune were tried. Best on val: `sam.rho: 0.05`, 0.9000. "
        "Val cannot tell from it: `sam.rho: 0.1`.\n"
    )
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert [line.split(" | ")[0].strip("| `") for line in rows] == ["sam.rho: 0.05", "sam.rho: 0.1", "sam.rho: 0.02"]
    assert "| +2.00 [" in rows[1]
    assert rows[1].endswith("| no |")
    assert rows[2].endswith("| yes |")
    assert "97.50 % each), over seeds and images" in page.read_text()
    shutil.rmtree(".dvc/cache")
    before = page.read_bytes()
    assert not on_val.write(runs, page)
    said = capsys.readouterr().out
    assert said.startswith("note: grid.val.md: not written, since logits are gone: ")
    assert len(said.splitlines()) == 1
    assert page.read_bytes() == before


SCORES = on_val.Scores(("a", "b"), np.array([True, False]))


def test_compare_takes_seeds_in_common_on_the_same_images() -> None:
    found = on_val.compare({(7, 1, 1): SCORES, (8, 1, 1): SCORES}, {(7, 1, 1): SCORES}, 0.95)
    assert found
    assert (found["accuracy"], found["covers"]) == (0, "images")
    other = on_val.Scores(("a", "c"), SCORES.correct)
    assert on_val.compare({(7, 1, 1): SCORES}, {(7, 1, 1): other}, 0.95) is None
    settings: dict[str, dict[on_val.Seeds, on_val.Scores]] = {"a": {(7, 1, 1): SCORES}, "b": {(8, 1, 1): SCORES}}
    page = on_val.describe({"a": "`sam.rho: 1`", "b": "`sam.rho: 2`"}, settings, "sam-finetune")
    assert "| `sam.rho: 2` | 1 | 0.5000 |  | not compared" in page


@pytest.mark.usefixtures("repository")
def test_group_settings_of_a_stage_on_the_same_data_whatever_their_seeds() -> None:
    runs = read_runs(**{"data.seed": [1, 2], "data.train_per_class": [5, 6]})
    groups = on_val.group(runs, grids.read_pipeline())
    assert [[len(some) for some in settings.values()] for settings in groups] == [[2, 2, 2], [2, 2, 2]]
    for settings in groups:
        assert sorted(on_val.labels(settings).values()) == [f"`sam.rho: {rho}`" for rho in RIGHT]


@pytest.mark.usefixtures("repository")
def test_judged_is_the_last_target_that_trains() -> None:
    expected = {"prepare": "", "select-best": "select-best", "finetune": "finetune", "sam-finetune control": "control"}
    for targets, stage in (expected | {"evaluate": "sam-finetune", "": "sam-finetune"}).items():
        assert {on_val.judged(run) for run in read_runs(targets=targets.split())} == {stage}, targets
