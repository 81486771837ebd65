"""The bench: its arithmetic, its resuming, and a small run of each pipeline."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from repository import ROOT

from flatmin.common.errors import InputError

sys.path.append(str(ROOT / "bench"))
page: Any = importlib.import_module("page")
sizes: Any = importlib.import_module("sizes")
speed: Any = importlib.import_module("speed")

PLAN = replace(speed.QUICK, compared=100, seeds=(0, 1))


def run(epoch_seconds: list[float], val_accuracy: list[float]) -> dict[str, Any]:
    return {"epoch_seconds": epoch_seconds, "val_accuracy": val_accuracy, "import_seconds": 3.0}


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    """A bench of two seeds; 20 epochs of extract take 12 + 19 * 10 seconds in the baseline, 6 + 19 * 1 in Flatmin."""
    found = speed.Bench(tmp_path / "results.json", PLAN)
    found.runs[f"original extract {speed.TIMED}"] = run([12.0, 22.0, 32.0], [0.5])
    found.runs[f"flatmin extract {speed.TIMED}"] = run([6.0, 7.0], [0.5])
    for seed in range(2):
        found.runs[f"original extract {seed}"] = run([], [0.5, 0.625, 0.5])
        found.runs[f"flatmin extract {seed}"] = run([], [0.5, 0.625 + 0.01 * seed])
    return found


def test_seconds_later_epochs_count_at_the_mean_of_those_measured() -> None:
    assert speed.seconds(run([12.0, 22.0, 34.0], []), 20) == 12 + 19 * 11
    assert speed.seconds(run([12.0, 22.0, 34.0], []), 3) == 34


def test_speedup_is_one_time_over_the_other(bench: Any) -> None:
    assert speed.speedup(bench.runs, "extract", "original") == round(202 / 25, 2)


def test_same_math_divides_times_of_one_precision() -> None:
    runs = {
        f"{side} {stage} {speed.TIMED}": run(seconds, [0.5])
        for stage in speed.EPOCHS
        for side, seconds in (
            ("original", [12.0, 22.0]),
            ("flatmin-float32", [8.0, 10.0]),
            ("original-half", [6.0, 11.0]),
            ("flatmin", [6.0, 7.0]),
        )
    }
    speedups = speed.same_math(runs)
    assert speedups["float32"] == {"extract": round(202 / 46, 2), "finetune": round(102 / 26, 2)}
    assert speedups["half"] == {"extract": round(101 / 25, 2), "finetune": round(51 / 15, 2)}


def test_difference_compares_best_accuracies_in_points(bench: Any) -> None:
    found = speed.difference(bench, PLAN, "extract")
    assert found == {"mean": 0.5, "standard_error": 0.5, "seeds": 2}
    assert speed.difference(bench, PLAN, "extract", "flatmin")["mean"] == 0
    assert speed.difference(bench, replace(PLAN, compared=0), "extract") is None


def test_bench_killed_resumes_and_complete_starts_again(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_folder_run_that_fails_prints_its_output(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seeds: [1]\n")
    with pytest.raises(RuntimeError, match=r"exited 1:\n(ready\n)?error: params.yaml: .*"):
        speed.Folder(tmp_path).run(speed.HERE / "stage.py", "finetune")


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_torch_baseline_without_pytorch_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exited 1:\nerror: torch: expected PyTorch installed, found none"):
        speed.Folder(tmp_path).run(speed.HERE / "torch_baseline.py", 2)


@pytest.mark.slow
def test_stage_and_baselines_small_run_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    folder = speed.Folder(tmp_path / "stages")
    params = speed.settings(100, 40, 0, {"extract": 2, "finetune": 2}, views=1)
    for recipe in ("extract", "finetune"):
        params[recipe] |= {"image_size": 32, "batch_size": 25}
    folder.prepare(params)
    runs = {"flatmin": folder.run(speed.HERE / "stage.py", "extract", speed.BACKBONE)}
    shutil.copytree(folder.path / "models/extract" / speed.BACKBONE, folder.path / "models/select")
    runs["flatmin finetune"] = folder.run(speed.HERE / "stage.py", "finetune")
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


def test_sizes_pictures_are_of_two_classes_and_half_are_turned(tmp_path: Path) -> None:
    sizes.draw(tmp_path, 8, (30, 40))
    found = sorted(tmp_path.glob("*/*.jpg"))
    assert [path.parent.name for path in found] == ["cat"] * 4 + ["dog"] * 4
    shapes = [ImageOps.exif_transpose(Image.open(path)).size for path in found]
    assert (shapes.count((40, 30)), shapes.count((30, 40))) == (4, 4)
    assert len({path.read_bytes() for path in found}) == 8


def test_sizes_measure_adds_the_memory_of_children(tmp_path: Path) -> None:
    child = "held = bytearray(200_000_000); import time; time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = sizes.measure([sys.executable, "-c", code], tmp_path, dict(os.environ))
    assert found["seconds"] >= 1
    assert 2e8 < found["memory"] < 4e8
    with pytest.raises(InputError, match=r"-c exit\(3\): expected it to succeed, received exit status 3$"):
        sizes.measure([sys.executable, "-c", "exit(3)"], tmp_path, dict(os.environ))


@pytest.mark.slow
def test_sizes_views_follow_from_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 224 px a view has (224 / 160) squared of the values at 160, as both are multiples of 32."""
    monkeypatch.setattr(sizes, "BACKBONES", ("EfficientNetLite0", "MobileNetV2"))
    committed = json.loads((ROOT / "bench/sizes.json").read_text())["views"]
    found = sizes.views()
    assert found == {name: committed[name] for name in found}
    for sides in found.values():
        assert sides["224"]["bytes"] == sides["160"]["bytes"] * 224**2 // 160**2
