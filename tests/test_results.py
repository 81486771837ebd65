"""A study's pages: their tables and picture come from results.json, which keeps every run."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flatmin.reporting import InputError
from PIL import Image
from repository import ROOT

sys.path.append(str(ROOT / "scripts"))
results: Any = importlib.import_module("results")

PAGES = sorted(path.parent for path in (ROOT / "studies").glob("*/results.json"))
CIFAR = ROOT / "studies/cifar100"
# Grid, and whether controls -> how many runs have test figures: what the page tells, and nothing beside it.
EVALUATED = {
    ("params", False): 1,
    ("halfhour", False): 3,
    ("frozen", False): 1,
    ("sweep", True): 32,
    ("digits", True): 10,
    (None, False): 1,
    (None, True): 44,
}
PAIR = {"evaluate/sam_minus_finetune.low": -0.02, "evaluate/sam_minus_finetune.high": 0.01}


def evaluated(name: str, seed: int, accuracies: tuple[float, float], **values: Any) -> dict[str, Any]:
    """A run with these test accuracies of finetune and sam."""
    run: dict[str, Any] = {"name": name, "seed": seed, "data.name": "visual/cifar", "grid": "sweep", "seconds": 60.0}
    run |= {"finetune/backbone": "A", "finetune/image_size": 96, "finetune/epochs": 4} | PAIR | values
    for role, accuracy in zip(("finetune", "sam"), accuracies, strict=True):
        keys = {"test.accuracy": accuracy, "test.ece": 0.05, "sharpness.gradient_rise": 0.2}
        keys |= {"sharpness.adaptive_rise": 0.3, "sharpness.eigenvalue_1": 9.5}
        run |= {f"evaluate/{role}.{key}": value for key, value in keys.items()}
    return run | {"evaluate/sam_minus_finetune.accuracy": accuracies[1] - accuracies[0]}


def twice(name: str, seed: int, accuracies: tuple[float, float], **values: Any) -> dict[str, Any]:
    """SAM for two epochs beside finetune for four."""
    settings = {"finetune.epochs": 4, "sam.epochs": 2, "sam.every": 1, "sam.rho": 0.1}
    counts = {"finetune/gradient_evaluations": 400, "sam/gradient_evaluations": 400}
    return evaluated(name, seed, accuracies, **settings, **counts) | values


def every(name: str, seed: int, accuracies: tuple[float, float]) -> dict[str, Any]:
    """SAM every fifth step beside finetune, two epochs each."""
    settings = {"finetune.epochs": 2, "sam.epochs": 2, "sam.every": 5, "sam.rho": 0.1, "finetune/epochs": 2}
    counts = {"finetune/gradient_evaluations": 200, "sam/gradient_evaluations": 240}
    return evaluated(name, seed, accuracies, **settings, **counts)


def trial(name: str, targets: str, val: float, **values: Any) -> dict[str, Any]:
    file = {"finetune": "finetune", "sam-finetune": "sam", "select-best": "select"}[targets]
    run = {"name": name, "targets": targets, "seed": 1, "data.name": "visual/cifar", "grid": None, "seconds": 90}
    return run | {"select/backbone": "A", f"{file}/val.accuracy": val} | values


RUNS = [
    twice("a", 1, (0.70, 0.69)),
    twice("b", 2, (0.72, 0.70)),
    every("c", 1, (0.66, 0.67)),
    every("d", 2, (0.68, 0.68)),
    twice("e", 1, (0.50, 0.51), **{"data.train_per_class": 10, "finetune.ema": 0.9}),
    twice("h", 1, (0.90, 0.91), **{"data.name": "digits", "data.label_noise": 0.2, "grid": None}),
    trial("f", "finetune", 0.5, **{"finetune.epochs": 4, "finetune/image_size": 96, "sam.rho": 0.1}),
    trial("g", "sam-finetune", 0.75, **{"finetune.epochs": 8, "sam.rho": 0.2, "sam/image_size": 96}),
    trial("i", "finetune", 0.6, **{"finetune.epochs": 8, "finetune/image_size": 96}),
    trial("j", "select-best", 0.4, **{"backbones": ["A"]}),
]


def test_methods_stand_beside_each_other_seed_by_seed() -> None:
    text = results.tables(RUNS)
    assert "### cifar, all training images\n\nA, 96 px, 2 epochs of SAM, rho 0.1.\n" in text
    assert "### cifar, 10 training images a class\n\nA, 96 px, 2 epochs of SAM, weight EMA 0.9, rho 0.1.\n" in text
    assert "### digits, all training images, 20 % of their labels wrong\n" in text.split("earlier code")[1]
    same = "0.0500 ± 0.0000 | 0.200 ± 0.000 | 0.300 ± 0.000 | 9.5 ± 0.0 |"
    assert f"| finetune, 2x epochs | 2 | 2 | 0.7100 ± 0.0141 | {same}" in text
    assert f"| SAM, every 5th step | 1.2 | 2 | 0.6750 ± 0.0071 | {same}" in text
    # 3 and 2 points less, whose mean has a standard error of half a point and an interval of 12.706 of these.
    assert f"| SAM | 2 | 2 | 0.6950 ± 0.0071 | {same} +2.50 [-3.85, +8.85] | -1.50 [" in text
    assert "| 2 | -2.00 [-2.00, +1.00] | +0.00 [-2.00, +1.00] |" in text
    short = results.section(RUNS)
    assert "| cifar, all training images | 2 | 0.1 | 2 | 0.6700 ± 0.0141 | 0.7100 ± 0.0141 | 0.6950 ± 0.0071 |" in short
    assert "| cifar, 10 training images a class | 2 | 0.1 | 1 |  | 0.5000 | 0.5100 |  | +1.00 |  |  |" in short
    assert "digits" not in short, "no grid has it now"


def test_the_order_of_runs_is_of_no_account() -> None:
    assert results.section(RUNS[::-1]) == results.section(RUNS)
    assert results.difference({1: {"test accuracy": 0.5}}, {2: {"test accuracy": 0.25}}) == ""


def test_two_runs_of_one_seed_are_refused_where_they_differ() -> None:
    again = twice("z", 2, (0.72, 0.71))
    with pytest.raises(InputError, match=r"z: expected one run of seed 2, found two of A, 96 px, 2 epochs of SAM, rho"):
        results.controls([*RUNS, again])
    assert results.controls([*RUNS, RUNS[1]]) == results.controls(RUNS)


def test_a_control_of_other_methods_is_refused() -> None:
    odd = twice("z", 3, (0.72, 0.71), **{"sam.every": 5})
    with pytest.raises(InputError, match=r"z: expected SAM beside finetune of twice its epochs.*sam.every 5"):
        results.controls([odd])


def test_controls_whose_other_params_differ_are_no_seeds_of_one_setting() -> None:
    first, second = (
        twice(str(seed), seed, (0.7, 0.7), grid=None, **{"finetune.learning_rate": rate})
        for seed, rate in ((1, 1e-3), (2, 1e-4))
    )
    assert len(results.controls([first, second])) == 2


def test_runs_of_any_grid_have_a_page() -> None:
    odd = twice("z", 3, (0.72, 0.71))
    del odd["sam.every"]
    with pytest.raises(InputError, match=r"z: sam.every: expected the grid to set it, as it sets sam.epochs"):
        results.controls([odd])
    prepared = {"name": "p", "targets": "prepare", "seed": 1, "data.name": "visual/cifar", "grid": "sweep"}
    unclocked = trial("u", "finetune", 0.55)
    del unclocked["seconds"]
    assert "| finetune | 1 | 0.5500 | 0 |" in results.tables([prepared, unclocked])


def test_other_code_gives_a_study_another_name(tmp_path: Path) -> None:
    names = set()
    for md5, seed in (("a", 1), ("b", 1), ("a", 2), ("a", 1)):
        stage = {"params": {"params.yaml": {"seed": seed}}, "deps": [{"path": "stages/x.py", "md5": md5}]}
        (tmp_path / "dvc.lock").write_text(json.dumps({"stages": {"x": stage}}))
        name, given = results.study(tmp_path / "dvc.lock")
        names.add(name)
        assert given == {"seed": seed}
    assert len(names) == 3


def test_the_recipe_has_a_row_for_each_stage_and_seed() -> None:
    assert "recipe" not in results.section(RUNS)
    run = evaluated("study", 7, (0.85, 0.86), grid="params", **{"finetune/epochs": 8})
    run |= {f"evaluate/{stage}.test.top5_accuracy": 0.97 for stage in ("extract", "finetune", "sam")}
    run |= {"evaluate/extract.test.accuracy": 0.74, "evaluate/extract.test.ece": 0.03}
    run |= {f"{file}/val.accuracy": 0.88 for file in ("select", "finetune", "sam")}
    run["evaluate/sam_minus_finetune.p_value"] = 0.123
    run["evaluate/sam.mirrored.accuracy"] = 0.865
    run |= {"finetune/gradient_evaluations": 500, "sam/gradient_evaluations": 600}
    text = results.section([*RUNS, run])
    assert "| A, 96 px, 8 epochs | 7 | extract | 0.8800 | 0.7400 | 0.9700 | 0.0300 |  |" in text
    assert "| A, 96 px, 8 epochs | 7 | sam, 1.2x gradients | 0.8800 | 0.8600 | 0.9700 | 0.0500 | 0.8650 |" in text
    assert "| A, 96 px, 8 epochs | 7 | sam - finetune, points | | +1.00 [-2.00, +1.00], p 0.12 |" in text
    other = {**run, "name": "other", "seed": 8, "evaluate/sam.test.accuracy": 0.88}
    both = results.section([*RUNS, run, other])
    assert "| A, 96 px, 8 epochs | all 2 | sam, 1.2x gradients | 0.8800 ± 0.0000 | 0.8700 ± 0.0141 |" in both
    assert "| A, 96 px, 8 epochs | all 2 | sam - finetune, points | | +2.00 [-10.71, +14.71] |" in both, "over seeds"
    assert "all 2" not in text
    assert "all 2" not in results.section([*RUNS, run, {**other, "finetune/image_size": 160}]), "another recipe"
    alone = results.section([*RUNS, {**run, "grid": "frozen", "select/backbone": "B"}])
    assert "| B, frozen | 7 | extract | 0.8800 | 0.7400 | 0.9700 | 0.0300 |  |" in alone
    assert "0.8600" not in alone, "its fine-tuning stands for nothing"
    earlier = {**run, "grid": None}
    assert "A, 96 px, 8 epochs" not in results.section([*RUNS, earlier])
    assert "A, 96 px, 8 epochs" in results.tables([*RUNS, earlier])


def test_trials_are_ranked_by_val_and_have_no_test_figure() -> None:
    text = results.tables(RUNS).split("## Trials")[1]
    head = "| run | seed | val accuracy | minutes |\n|---|---|---|---|\n"
    assert (
        f"""
### A, 96 px; cifar, all training images

Unless told: `finetune.epochs: 8`.

{head}| sam-finetune: `sam.rho: 0.2` | 1 | 0.7500 | 2 |
| finetune | 1 | 0.6000 | 2 |
| finetune: `finetune.epochs: 4` | 1 | 0.5000 | 2 |

### A; cifar, all training images

{head}| select-best | 1 | 0.4000 | 2 |
"""
        in text
    )


def test_runs_are_kept_and_new_ones_added(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    with pytest.raises(InputError, match=r"sweep.csv: expected the table of `make study-sweep`, found none"):
        results.write(folder)
    rows = "h,succeeded,finetune,3,visual/cifar,A,0.25,[1],true,98e4555,12.5\n"
    rows += "i,failed,finetune,4,visual/cifar,,,,,98e4555,1.5\n"
    columns = "name,status,targets,seed,data.name,select/backbone,finetune/val.accuracy,extract.views,augment.flip,"
    columns += "commit,seconds"
    (folder / "sweep.csv").write_text(f"{columns}\n{rows}")
    with pytest.raises(InputError, match=r"README.md: expected the lines <!-- from results.json"):
        results.write(folder)
    (folder / "README.md").write_text(f"before\n{results.BEGIN}old{results.END}after\n")
    (folder / "results.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"results.json: expected runs, a list of mappings with name, seed, data.name"):
        results.write(folder)
    before = json.dumps({"runs": [RUNS[0], {**RUNS[4], "grid": None}, {**RUNS[0], "name": "z", "sam.every": 3}]})
    (folder / "results.json").write_text(before)
    with pytest.raises(InputError, match=r"z: expected SAM beside finetune of twice its epochs"):
        results.write(folder)
    assert (folder / "results.json").read_text() == before, "a run that is refused is not kept"
    (folder / "sweep.csv").write_text(f"{columns}\n{rows.rpartition(',')[0]}\n")
    with pytest.raises(InputError, match=r"sweep.csv: i: expected a cell for each column"):
        results.write(folder)
    (folder / "sweep.csv").write_text(f"{columns}\n{rows}")
    (folder / "results.json").write_text(json.dumps({"runs": [RUNS[0], {**RUNS[4], "grid": None}]}))
    results.write(folder)
    runs = json.loads((folder / "results.json").read_text())["runs"]
    assert [(run["name"], run["grid"]) for run in runs] == [("a", None), ("e", None), ("h", "sweep")]
    assert runs[2]["commit"] == "98e4555"
    assert (runs[2]["extract.views"], runs[2]["augment.flip"], runs[2]["data.name"]) == ([1], True, "visual/cifar")
    text = (folder / "README.md").read_text()
    assert text.startswith(f"before\n{results.BEGIN}")
    assert text.endswith(f"{results.END}after\n")
    assert "0.2500" in (folder / "tables.md").read_text()
    assert not (folder / "accuracy.png").exists(), "no grid has controls"


def test_the_picture_has_a_panel_for_each_setting(tmp_path: Path) -> None:
    for name, runs in (("one", RUNS[:4]), ("two", RUNS)):
        results.draw(results.controls(runs), tmp_path / f"{name}.png")
    sizes = []
    for name in ("one", "two"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes.append(picture.size)
    assert sizes[1] == (2 * sizes[0][0], sizes[0][1])


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_runs_are_those_of_the_grids_tables_and_of_the_metrics(folder: Path) -> None:
    given, collected = (
        {run["name"]: run for run in runs} for runs in (results.read(folder / "results.json"), results.collect(folder))
    )
    assert given == collected


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_a_page_shows_what_its_runs_give(folder: Path, tmp_path: Path) -> None:
    runs = results.read(folder / "results.json")
    results.draw(results.controls(runs), tmp_path / "accuracy.png")
    with Image.open(tmp_path / "accuracy.png") as drawn, Image.open(folder / "accuracy.png") as shown:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(shown))
    assert f"{results.BEGIN}\n{results.section(runs)}\n{results.END}" in (folder / "README.md").read_text()
    assert results.tables(runs) == (folder / "tables.md").read_text()


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_test_images_are_read_for_recipes_and_controls_of_several_seeds_alone(folder: Path) -> None:
    runs = results.read(folder / "results.json")
    read = Counter((run["grid"], "sam.epochs" in run) for run in runs if results.is_evaluated(run))
    assert read == EVALUATED
    for run in runs:
        if not results.is_evaluated(run):
            assert not [key for key in run if key.startswith("evaluate/")], run["name"]
    for path in folder.glob("*.csv"):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                figures = [key for key, cell in row.items() if key.startswith("evaluate/") and cell]
                assert not figures or row["targets"] == "evaluate", row["name"]
    for setting, methods in results.controls(runs).items():
        if setting.grid is None:
            continue
        assert set(methods) == set(results.METHODS)
        few = setting.per_class or setting.data == "digits"
        assert {len(seeds) for seeds in methods.values()} == {5 if few else 3}
        assert setting.rho == best_rho(runs, setting), setting


def best_rho(runs: list[dict[str, Any]], setting: Any) -> float:
    """Of the trials of a control's setting, by val."""
    found = {
        run["sam.rho"]: run["sam/val.accuracy"]
        for run in runs
        if (run["grid"], run["targets"], run.get("sam.method", "sam")) == (setting.grid, "sam-finetune", "sam")
        and (run["sam.epochs"], run["sam.every"], run.get("finetune.ema")) == (setting.epochs, 1, setting.ema)
        and tuple(run.get(key) for key in results.DATA[:3]) == setting[1:4]
    }
    assert sorted(found) == [0.02, 0.05, 0.1, 0.2]
    return max(found, key=lambda rho: found[rho])


def test_the_predictions_are_of_every_unlabelled_image_and_the_page_has_their_digest() -> None:
    path = CIFAR / "test_predictions.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "finetune", "sam"]
    assert len({row["name"] for row in rows}) == len(rows) == 10000
    assert {int(row[role]) for row in rows for role in ("finetune", "sam")} == set(range(100))
    assert hashlib.sha256(path.read_bytes()).hexdigest() in (CIFAR / "README.md").read_text()
    roles = json.loads((CIFAR / "metrics/prepare.json").read_text())["roles"]
    assert {role: found["count"] for role, found in roles.items()} == {
        "train": 36000,
        "val": 4000,
        "test": 10000,
        "predict": 10000,
    }


def words(page: Path) -> str:
    return " ".join(page.read_text().split())


def test_both_pages_tell_what_the_recipe_gives() -> None:
    readme, page = words(ROOT / "README.md"), words(CIFAR / "README.md")
    metrics = json.loads((CIFAR / "metrics/evaluate.json").read_text())
    extract, finetune, sam = (f"{metrics[stage]['test']['accuracy']:.4f}" for stage in ("extract", "finetune", "sam"))
    assert f"frozen has a test accuracy of {extract}, fine-tuned {finetune}, with SAM in every fifth step " in readme
    assert f"with SAM in every fifth step {sam} (seed 42)." in readme
    assert f"test accuracy of **{finetune}** fine-tuned and {sam} with SAM in every fifth step: no gain" in page
    assert f"that network has {extract}, and **" in page


def test_both_pages_tell_what_sam_gains_with_and_without_the_seed_that_chose_rho() -> None:
    readme, page = words(ROOT / "README.md"), words(CIFAR / "README.md")
    gains, others = {}, {}
    for setting, methods in results.controls(results.read(CIFAR / "results.json")).items():
        if setting.grid is None:
            continue
        key = (setting.grid, setting.per_class, setting.label_noise)
        sam, twice = methods[results.SAM], methods[results.TWICE]
        not_42 = {seed: run for seed, run in sam.items() if seed != 42}
        gains[key], others[key] = (
            re.findall(r"[+-]\d+\.\d+", results.difference(seeds, twice)) for seeds in (sam, not_42)
        )
    every, noise, digits = gains["sweep", None, None], gains["sweep", None, 0.2], gains["digits", None, None]
    assert f"loses on all 36,000 training images of CIFAR-100 ({every[0]} points, {every[1]} to {every[2]})**" in page
    assert f"a fifth of their labels wrong ({noise[0]})." in page
    assert f"50 training images a class too, it loses ({digits[0]})." in page
    ten, fifty, *without = (found["sweep", count, None] for found in (gains, others) for count in (10, 50))
    assert all(end.startswith("+") for end in (*ten, *fifty)), "above zero, as are their intervals"
    of_ten, of_fifty, ten_without, fifty_without = (
        f"{point} ({low} to {high})" for point, low, high in (ten, fifty, *without)
    )
    few = of_ten.replace(" (", " with 10 a class ("), of_fifty.replace(" (", " with 50 (")
    assert f"{', '.join(few)}. Both lean on choices: without seed 42, which chose rho, they are {ten_without}" in page
    assert f"{ten_without} and {fifty_without}, and beside the rival" in page
    told = (
        f"SAM gains {of_ten.replace(' (', ' points (95 % interval ')} with ten training images a class and "
        f"{of_fifty} with fifty; without the seed that chose rho {ten_without} and {fifty_without}."
    )
    assert told.replace("+", "") in readme


def test_the_page_tells_what_half_an_hour_and_the_better_head_give() -> None:
    page = words(CIFAR / "README.md")
    runs = results.read(CIFAR / "results.json")
    (head,) = (run for run in runs if run["grid"] == "frozen")
    assert f"**{head['evaluate/extract.test.accuracy']:.4f}** with a better head" in page
    short = sorted((run for run in runs if run["grid"] == "halfhour"), key=lambda run: run["seed"])
    plain, sam = ([run[f"evaluate/{stage}.test.accuracy"] for run in short] for stage in ("finetune", "sam"))
    each = ", ".join(f"{accuracy:.4f}" for accuracy in plain)
    assert f"**{results.spread(plain, 4)}** over three seeds ({each};" in page
    assert f"and SAM in every fifth step {results.spread(sam, 4)}." in page
    evaluated_runs = sum(map(results.is_evaluated, runs))
    assert f"{evaluated_runs} of the {len(runs)} runs have test figures" in page
