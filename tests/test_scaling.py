"""bench/scaling.py: the fit of its lines, what they give for larger studies, and how a stage is measured."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from flatmin.common.errors import InputError

sys.path.append(str(ROOT / "bench"))
scaling: Any = importlib.import_module("scaling")
RESULTS: dict[str, Any] = json.loads((ROOT / "bench/scaling.json").read_text())


def test_lines_of_the_results_are_fitted_to_more_points_than_terms() -> None:
    known = {scaling.key(stage, study) for study in scaling.STUDIES for stage in scaling.STAGES}
    known |= {scaling.key("prepare", pictures) for pictures in scaling.PREPARED}
    for stage, terms in scaling.TERMS.items():
        points = [name for name, point in RESULTS["points"].items() if point["stage"] == stage]
        assert len(points) > len(terms) + (stage != "augment")
        assert stage == "augment" or set(points) <= known
    found = scaling.lines(RESULTS["points"])
    assert set(found) == set(RESULTS["lines"])
    for stage, line in found.items():
        assert RESULTS["lines"][stage] == pytest.approx(line, rel=1e-6), stage


def test_lines_find_the_slopes_that_points_were_made_with() -> None:
    points = {}
    for name, point in RESULTS["points"].items():
        terms = scaling.TERMS.get(point["stage"], {})
        seconds = sum(slope * term(point) for slope, term in zip((3e-3, 2e-3, 1e-3), terms.values(), strict=False))
        constant = 0 if point["stage"] == "augment" else 7
        points[name] = point | {"processor_seconds": constant + seconds, "memory": 1e9 + 500 * point.get("images", 0)}
    found = scaling.lines(points)
    for stage, terms in scaling.TERMS.items():
        assert [found[stage][term] for term in terms] == pytest.approx([3e-3, 2e-3, 1e-3][: len(terms)], rel=1e-3)
        assert found[stage].get("constant", 7) == pytest.approx(7)
        assert found[stage]["error"] < 1e-3
    assert found["prepare memory"]["image"] == pytest.approx(500)


@pytest.mark.parametrize("images", [300, 1200])
def test_results_bytes_of_views_are_those_of_the_split(images: int) -> None:
    """At 96 px the boundary has (96 / 160) squared of the values at 160, as both are multiples of 32."""
    views = images * 2 + images // 5
    at_160 = RESULTS["boundaries"][scaling.BACKBONE]["160"]["bytes"]
    kept = RESULTS["points"][scaling.key("finetune", scaling.Study(images))]["disk"]["cache/views"]
    assert 0 < kept - views * at_160 * 96**2 / 160**2 < 3000  # the files' heads and checksums


def test_need_more_images_need_more_of_everything() -> None:
    few, many = (scaling.need(images, RESULTS, RESULTS["lines"]) for images in (10**6, 10**8))
    for stage in ("prepare", *scaling.STAGES):
        assert many[stage]["seconds"] > 50 * few[stage]["seconds"], stage
        assert many[stage]["memory"] > few[stage]["memory"] > 5e8, stage
    assert many["finetune"]["disk"] == pytest.approx(100 * few["finetune"]["disk"])
    assert many["finetune"]["disk"] == 4.2e8 * RESULTS["boundaries"][scaling.BACKBONE]["160"]["bytes"]


def test_duration_and_amount_choose_a_unit() -> None:
    assert [scaling.duration(seconds) for seconds in (99, 600, 7200, 1e6)] == ["99 s", "10 min", "2 h", "11.6 days"]
    assert [scaling.amount(count) for count in (12, 2500, 3e12)] == ["12 B", "2.5 kB", "3 TB"]


@pytest.mark.slow
def test_prepare_measures_time_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    point = scaling.prepare(scaling.Pictures(140, 16))
    assert point["seconds"] > 0.5
    assert point["processor_seconds"] > 0.5
    assert point["memory"] > 1e8  # TensorFlow alone is larger
    assert point["disk"]["data/records"] > point["source_bytes"] > 140 * 300


def test_run_stage_that_fails_is_an_error(tmp_path: Path) -> None:
    scaling.copy_code(tmp_path)
    with pytest.raises(InputError, match=r"prepare: expected it to succeed, received .*params\.yaml"):
        scaling.run(tmp_path, "prepare", ["stages/prepare.py"])


@pytest.mark.slow
def test_measure_measures_missing_points_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "bench/scaling.json", tmp_path / "scaling.json")
    monkeypatch.setattr(scaling, "RESULTS", tmp_path / "scaling.json")
    whole = [study for study in scaling.STUDIES if scaling.key("sam-finetune", study) in RESULTS["points"]]
    monkeypatch.setattr(scaling, "STUDIES", whole)
    lacking = json.loads((tmp_path / "scaling.json").read_text())
    (tmp_path / "scaling.json").write_text(json.dumps(lacking | {"machine": "another"}))
    with pytest.raises(InputError, match=r"machine: expected .* as here, found 'another'; move it away"):
        scaling.measure(again=False)
    lacking |= scaling.ask("machine")  # else this could run on one kind of machine alone
    del lacking["points"]["index images=200000"]
    (tmp_path / "scaling.json").write_text(json.dumps(lacking))
    scaling.measure(again=False)
    after = json.loads((tmp_path / "scaling.json").read_text())
    assert after["points"].keys() == RESULTS["points"].keys()
    assert after["points"]["index images=200000"]["memory"] == pytest.approx(
        RESULTS["points"]["index images=200000"]["memory"], rel=0.3
    )


@pytest.mark.slow
def test_boundaries_follow_from_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 224 px a view has (224 / 160) squared of the values at 160, as both are multiples of 32."""
    monkeypatch.setattr(scaling, "SIZES", (160,))
    boundaries = RESULTS["boundaries"]
    assert scaling.of_boundaries() == {name: {"160": sizes["160"]} for name, sizes in boundaries.items()}
    for sizes in boundaries.values():
        bytes_of_view = sizes["160"]["bytes"] * 224**2 // 160**2
        share = pytest.approx(sizes["160"]["frozen_share"], rel=2e-3)
        assert sizes["224"] == sizes["160"] | {"bytes": bytes_of_view, "frozen_share": share}
