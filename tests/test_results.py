"""A study's page: its tables and picture come from results.json, which keeps every run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from repository import ROOT

from flatmin.reporting import InputError

sys.path.append(str(ROOT / "scripts"))
results: Any = importlib.import_module("results")

PAGES = sorted(path.parent for path in (ROOT / "studies").glob("*/results.json"))


def evaluated(name: str, seed: int, accuracies: tuple[float, float], **values: Any) -> dict[str, Any]:
    """A run with these test accuracies of finetune and sam."""
    run: dict[str, Any] = {"name": name, "seed": seed, "data.name": "visual/cifar", "sam.epochs": 2, "seconds": 60.0}
    run |= values
    for role, accuracy in zip(("finetune", "sam"), accuracies, strict=True):
        keys = {
            "test.accuracy": accuracy,
            "test.ece": 0.05,
            "sharpness.gradient_rise": 0.2,
            "sharpness.eigenvalue_1": 9.5,
        }
        run |= {f"evaluate/{role}.{key}": value for key, value in keys.items()}
    run |= {"evaluate/sam_minus_finetune.accuracy": accuracies[1] - accuracies[0]}
    return run | {"evaluate/sam_minus_finetune.low": -0.02, "evaluate/sam_minus_finetune.high": 0.01}


TRIAL = {"seed": 1, "data.name": "visual/cifar", "select/backbone": "A", "seconds": 90}
PIXELS = {"finetune/image_size": 96}
RUNS = [
    evaluated("a", 1, (0.70, 0.69), **{"finetune.epochs": 4}),
    evaluated("b", 2, (0.72, 0.70), **{"finetune.epochs": 4}),
    evaluated("c", 1, (0.66, 0.67), **{"finetune.epochs": 2, "sam.every": 5}),
    evaluated("d", 2, (0.68, 0.68), **{"finetune.epochs": 2, "sam.every": 5}),
    evaluated("e", 1, (0.50, 0.51), **{"data.train_per_class": 10, "finetune.ema": 0.9}),
    evaluated("h", 1, (0.90, 0.91), **{"data.name": "digits", "data.label_noise": 0.2}),
    {
        **TRIAL,
        "name": "f",
        "targets": "finetune",
        "finetune.epochs": 4,
        "finetune/image_size": 96,
        "finetune/val.accuracy": 0.5,
    },
    {**TRIAL, "name": "g", "targets": "sam-finetune", "sam/image_size": 96, "sam/val.accuracy": 0.75},
    {
        **TRIAL,
        "name": "i",
        "targets": "finetune",
        "finetune.epochs": 8,
        "finetune/image_size": 96,
        "finetune/val.accuracy": 0.6,
    },
    {**TRIAL, "name": "j", "targets": "select-best", "seed": 2, "backbones": ["A"], "select/val.accuracy": 0.4},
]


def test_methods_stand_beside_each_other_seed_by_seed() -> None:
    text = results.section(RUNS)
    assert "### cifar, all training images\n" in text
    assert "### cifar, 10 training images a class, EMA 0.9\n" in text
    assert "### digits, all training images, 20 % of their labels wrong\n" in text
    same = "0.0500 ± 0.0000 | 0.2000 ± 0.0000 | 9.5 ± 0.0 |"
    assert f"| finetune, twice the epochs | 2 | 2 | 0.7100 ± 0.0141 | {same}" in text
    # 3 and 2 points less, whose mean has a standard error of half a point and an interval of 12.706 of these.
    assert f"| sam-finetune | 2 | 2 | 0.6950 ± 0.0071 | {same} +2.50 [-3.85, +8.85] | -1.50 [" in text
    assert "- Seed 2: sam-finetune less finetune of twice the epochs -2.00 points, over images [-2.00, +1.00]." in text


def test_the_recipe_has_a_row_for_each_stage_and_seed() -> None:
    assert "The recipe" not in results.section(RUNS)
    run = evaluated("study", 7, (0.85, 0.86))
    del run["sam.epochs"]
    run |= {f"evaluate/{stage}.test.top5_accuracy": 0.97 for stage in ("extract", "finetune", "sam")}
    run |= {"evaluate/extract.test.accuracy": 0.74, "evaluate/extract.test.ece": 0.03}
    run |= {f"{file}/val.accuracy": 0.88 for file in ("select", "finetune", "sam")}
    run["evaluate/sam_minus_finetune.p_value"] = 0.123
    run["evaluate/sam.mirrored.accuracy"] = 0.865
    run |= {"finetune/backbone": "A", "finetune/image_size": 96, "finetune/epochs": 8}
    text = results.section([*RUNS, run])
    assert "| A, 96 px, 8 epochs | 7 | extract | 0.8800 | 0.7400 | 0.9700 | 0.0300 |  |" in text
    assert "| A, 96 px, 8 epochs | 7 | sam | 0.8800 | 0.8600 | 0.9700 | 0.0500 | 0.8650 |" in text
    assert "- A, 96 px, 8 epochs, seed 7: sam less finetune +1.00 points, over images [-2.00, +1.00], p 0.12." in text


def test_trials_are_ranked_by_val_and_have_no_test_figure() -> None:
    text = results.section(RUNS).split("### Trials")[1]
    head = "| run | seed | val accuracy | minutes |\n|---|---|---|---|\n"
    assert (
        f"""
#### A at 96 px; cifar, all training images

{head}| sam-finetune | 1 | 0.7500 | 2 |
| finetune: `finetune.epochs: 8` | 1 | 0.6000 | 2 |
| finetune: `finetune.epochs: 4` | 1 | 0.5000 | 2 |

#### A; cifar, all training images

{head}| select-best: `backbones: [A]` | 2 | 0.4000 | 2 |
"""
        in text
    )


def test_runs_are_kept_and_new_ones_added(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    with pytest.raises(InputError, match=r"sweep.csv: expected the table of `make study-sweep`, found none"):
        results.write(folder)
    (folder / "results.json").write_text(json.dumps({"runs": RUNS[:2]}))
    rows = "h,succeeded,finetune,3,visual/cifar,A,0.25,[1],12.5\ni,failed,finetune,4,visual/cifar,,,,1.5\n"
    columns = "name,status,targets,seed,data.name,select/backbone,finetune/val.accuracy,extract.views,seconds"
    (folder / "sweep.yaml").touch()
    (folder / "sweep.csv").write_text(f"{columns}\n{rows}")
    with pytest.raises(InputError, match=r"README.md: expected the lines <!-- from results.json"):
        results.write(folder)
    (folder / "README.md").write_text(f"before\n{results.BEGIN}old{results.END}after\n")
    results.write(folder)
    runs = json.loads((folder / "results.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["a", "b", "h"]
    assert runs[2]["extract.views"] == [1]
    assert runs[2]["data.name"] == "visual/cifar"
    text = (folder / "README.md").read_text()
    assert text.startswith(f"before\n{results.BEGIN}")
    assert text.endswith(f"{results.END}after\n")
    assert "0.2500" in text
    with Image.open(folder / "accuracy.png") as picture:
        assert picture.height > 200


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_a_page_shows_what_its_runs_give(folder: Path) -> None:
    runs = json.loads((folder / "results.json").read_text())["runs"]
    assert results.section(runs) in (folder / "README.md").read_text()
    for run in runs:
        evaluated = any(key.startswith("evaluate/") for key in run)
        assert evaluated == (run.get("targets", "evaluate") == "evaluate"), "a trial has no test figure"


def test_the_readme_tells_of_the_study_what_its_runs_give() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    metrics = json.loads((ROOT / "studies/cifar100/metrics/evaluate.json").read_text())
    extract, finetune, sam = (f"{metrics[stage]['test']['accuracy']:.4f}" for stage in ("extract", "finetune", "sam"))
    assert f"frozen has a test accuracy of {extract}, fine-tuned {finetune}, with SAM {sam} (seed 42)" in text
    found = results.methods(json.loads((ROOT / "studies/cifar100/results.json").read_text())["runs"])
    gains = {}
    for per_class, ema in ((10, 0.97), (50, 0.99)):
        group = found["visual_domain_decathlon/cifar100", per_class, None, ema]
        gains[per_class] = results.paired(group["sam"], group["twice"]).split()[0].lstrip("+")
    assert f"SAM gains {gains[10]} points with ten training images a class and {gains[50]} with fifty" in text
