"""The bench: its arithmetic, its resuming, its runs in small, and that docs/speed.md tells what it found."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

sys.path.append(str(ROOT / "bench"))
speed: Any = importlib.import_module("speed")
page: Any = importlib.import_module("page")

PLAN = replace(speed.QUICK, compared=100, seeds=(0, 1))


def run(epoch_seconds: list[float], val_accuracy: list[float]) -> dict[str, Any]:
    return {"epoch_seconds": epoch_seconds, "val_accuracy": val_accuracy, "import_seconds": 3.0}


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    """Extract: the baseline takes 12 + 19 * 10 seconds, Flatmin 6 + 19 * 1; two seeds."""
    found = speed.Bench(tmp_path / "results.json", PLAN)
    found.runs[f"original extract {speed.TIMED}"] = run([12.0, 22.0, 32.0], [0.5])
    found.runs[f"flatmin extract {speed.TIMED}"] = run([6.0, 7.0], [0.5])
    for seed in range(2):
        found.runs[f"original extract {seed}"] = run([], [0.5, 0.625, 0.5])
        found.runs[f"flatmin extract {seed}"] = run([], [0.5, 0.625 + 0.01 * seed])
    return found


def test_later_epochs_count_at_the_mean_of_those_measured() -> None:
    assert speed.seconds(run([12.0, 22.0, 34.0], []), 20) == 12 + 19 * 11
    assert speed.seconds(run([12.0, 22.0, 34.0], []), 3) == 34


def test_a_speedup_is_one_time_over_the_other(bench: Any) -> None:
    assert speed.speedup(bench.runs, "extract", "original") == round(202 / 25, 2)


def test_speedups_in_the_same_arithmetic(bench: Any) -> None:
    runs = whole_results(bench)["runs"]
    runs[f"original-half extract {speed.TIMED}"] = run([6.0, 11.0], [0.5])
    found = speed.same_math(runs)
    assert found["float32"]["extract"] == speed.speedup(runs, "extract", "original")
    assert found["half"]["extract"] == round(101 / 25, 2)


def test_accuracies_are_compared_at_their_best_in_points(bench: Any) -> None:
    found = speed.difference(bench, PLAN, "extract")
    assert found == {"mean": 0.5, "standard_error": 0.5, "seeds": 2}
    assert speed.difference(bench, PLAN, "extract", "flatmin")["mean"] == 0
    assert speed.difference(bench, replace(PLAN, compared=0), "extract") is None


def test_a_killed_bench_goes_on_and_a_whole_one_starts_anew(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text('{"sam_step_ratio": 2.0}')
    assert speed.Bench(file, PLAN).once("first", lambda: 1) == 1
    with pytest.raises(KeyboardInterrupt):
        speed.Bench(file, PLAN).once("second", interrupted)
    resumed = speed.Bench(file, PLAN)
    assert resumed.once("first", lambda: 2) == 1
    assert json.loads(file.read_text())["sam_step_ratio"] == 2.0
    assert speed.Bench(file, replace(PLAN, train=7)).runs == {}
    resumed.about["is_complete"] = True
    resumed.write({"extract_speedup": 9.0})
    assert json.loads(file.read_text())["extract_speedup"] == 9.0
    assert speed.Bench(file, PLAN).runs == {}


def interrupted() -> None:
    raise KeyboardInterrupt


def test_a_failing_run_tells_what_it_printed(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    with pytest.raises(RuntimeError, match=r"exited 1:\nready\nerror: params.yaml: .*"):
        speed.Folder(tmp_path).run(speed.HERE / "stage.py", "finetune")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch_its_pipeline_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exited 1:\nerror: torch: expected PyTorch installed, found none"):
        speed.Folder(tmp_path).run(speed.HERE / "torch_baseline.py", 2)


@pytest.mark.slow
def test_both_sides_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    folder = speed.Folder(tmp_path / "stages")
    params = speed.settings(100, 40, 0, {"extract": 2, "finetune": 2}, views=1)
    for recipe in ("extract", "finetune"):
        params[recipe] |= {"image_size": 32, "batch_size": 25}
    folder.prepare(params)
    runs = {"flatmin": folder.run(speed.HERE / "stage.py", "extract", speed.BACKBONE)}
    shutil.copytree(folder.path / "models/extract" / speed.BACKBONE, folder.path / "models/select")
    for pipeline, stage in (("keras", "extract"), ("original", "finetune")):
        runs[f"{pipeline} {stage}"] = folder.run(speed.HERE / "baselines.py", pipeline, stage, 2)
    for name, found in runs.items():
        first, second = found["epoch_seconds"]
        assert 0 < first < second < found["process_seconds"] - found["import_seconds"] + 0.02, name
        assert found["import_seconds"] > 0, name
        assert max(found["val_accuracy"]) > 0.05, name
        assert found["peak_bytes"] > 10**8, name
    assert len(runs["flatmin"]["views_seconds"]) == 2
    assert any((folder.cache / "views").iterdir())
    folder.forget()
    assert not folder.cache.exists()


def whole_results(bench: Any) -> dict[str, Any]:
    """Made up: what a bench of one baseline and Flatmin gives, and the same for the others."""
    runs = dict(bench.runs)
    for name in list(runs):
        side, _, title = name.split()
        runs[f"{side} finetune {title}"] = runs[name]
    runs[f"keras extract {speed.TIMED}"] = runs[f"original extract {speed.TIMED}"]
    for stage in speed.EPOCHS:
        runs[f"flatmin-float32 {stage} {speed.TIMED}"] = runs[f"flatmin {stage} {speed.TIMED}"]
        runs[f"original-half {stage} {speed.TIMED}"] = runs[f"original {stage} {speed.TIMED}"]
    rest = dict.fromkeys(["trunk_litert_speedup", "trunk_litert_half_speedup"], 5.0)
    rest |= dict.fromkeys(["peak_memory_growth", "repro_noop_seconds", "sam_step_ratio", "sam_every_5_step_ratio"], 1.0)
    difference = {"mean": -0.25, "standard_error": 0.125, "seeds": 2}
    return {
        **bench.about,
        **rest,
        "runs": runs,
        "augment_images_per_second": {"1": 1500.0},
        "profile": {"finetune": {"importing": 3.0, "views": 0.0, "epochs": 30.0, "rest": 4.5}, "whole": {"rest": 40.0}},
        "tail": {"images_per_second": {"late": {"plain": 200.0}, "whole": {"plain": 50.0, "fold": 75.0}}},
        "extract_accuracy_difference": difference,
        "finetune_accuracy_difference": None,
        "half_accuracy_differences": {"extract": None, "finetune": difference | {"mean": 0.5}},
    }


def test_the_table_tells_what_was_measured(bench: Any) -> None:
    text = page.section(whole_results(bench))
    assert "| extract, 20 epochs | Keras' guide | 202 | `matmul: half` | 25 | 8.1 | 3 of 20 | 3.0, 3.0 s |" in text
    assert "| original, `matmul: half` | 102 | `matmul: half` | 15 | 6.8 |" in text
    assert "| the tail, forward and backward | whole | late |\n|---|---|---|\n| plain | 50 (1.00) |" in text
    assert "| fold | 75 (1.50) |  |" in text
    assert "| finetune | 3.0 |  | 30.0 | 4.5 | 37.5 |\n| whole |  |  |  | 40.0 | 40.0 |\n" in text
    assert "-0.25 points, standard error 0.12, 2 seeds" in text
    assert "| finetune's val accuracy, `matmul: half`, less the original pipeline's in float32 | not measured |" in text
    assert "| finetune's val accuracy, `matmul: half`, less the same in float32 | +0.50 points" in text


def test_the_chart_is_small(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "CHART", tmp_path / "chart.png")
    page.draw(whole_results(bench))
    drawn = (tmp_path / "chart.png").read_bytes()
    width, height = struct.unpack(">II", drawn[16:24])
    assert drawn.startswith(b"\x89PNG")
    assert width > 2 * height > 400
    assert len(drawn) < 200_000


def test_the_figures_on_the_page_are_the_measured_ones() -> None:
    results = json.loads((ROOT / "bench/results.json").read_text())
    shown = page.PAGE.read_text().split(page.BEGIN)[1].split(page.END)[0].strip()
    assert shown == (page.section(results).strip() if results.get("is_complete") else "")
    assert page.CHART.exists() == bool(results.get("is_complete"))
