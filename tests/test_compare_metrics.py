"""Metrics of a checkout from before keys and files moved are compared with today's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from flatmin.common import files

sys.path.insert(0, str(ROOT / "scripts"))
import compare_metrics

SCORES = {"test": {"accuracy": 0.5}, "sharpness": {"trace": 3.0}}
OLD: dict[str, Any] = {
    "finetune": {"trunk": "litert", "val": {"accuracy": 0.25}},
    "evaluate": {"extract": SCORES, "sam": SCORES, "sam_minus_finetune": {"low": -0.1}},
}
NEW: dict[str, Any] = {
    "finetune/42": {"engine": "litert", "val": {"accuracy": 0.25}},
    "evaluate": {
        "extract": SCORES,
        "sam": {"test": {"accuracy": 0.6}, "seeds": {"42": SCORES, "43": SCORES}},
        "sam_minus_finetune": {"low": -0.2, "seeds": {"42": {"low": -0.1}}},
    },
}


def write(folder: Path, metrics: dict[str, Any]) -> str:
    for name, values in metrics.items():
        files.write_json(folder / f"metrics/{name}.json", values)
    return str(folder)


def compare(first: str, second: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) as caught:
        compare_metrics.main(first, second)
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == (1 if len(lines) > 1 else 0)
    return lines[:-1]


def test_compare_version_1_with_today_differs_in_what_was_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(write(tmp_path / "old", OLD), write(tmp_path / "new", NEW), capsys)
    assert found == [
        "metrics/evaluate.json: sam.seeds.43.sharpness.trace: missing and 3.0",
        "metrics/evaluate.json: sam.seeds.43.test.accuracy: missing and 0.5",
        "metrics/evaluate.json: sam.test.accuracy: missing and 0.6",
        "metrics/evaluate.json: sam_minus_finetune.low: missing and -0.2",
    ]


def test_compare_same_layout_differs_in_changed_values_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    today = write(tmp_path / "new", NEW)
    assert compare(today, today, capsys) == []
    changed = write(tmp_path / "changed", NEW | {"finetune/42": NEW["finetune/42"] | {"engine": "tensorflow"}})
    assert compare(today, changed, capsys) == ["metrics/finetune/42.json: engine: litert and tensorflow"]
