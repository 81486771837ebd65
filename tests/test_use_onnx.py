"""The ONNX export, which needs requirements/export.txt: `make export-test`."""

from __future__ import annotations

from pathlib import Path

import pytest
from exports import check_round_trip, write_study

from flatmin.use import formats

pytestmark = pytest.mark.skipif(bool(formats.missing("onnx")), reason="requirements/export.txt is not installed")


def test_exported_file_and_its_card_answer_as_the_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_study("pad")
    found = check_round_trip("onnx", tmp_path / "out")
    assert found["differ"] == 0
    assert found["log_probability_difference"] < 1e-3
    assert found["trained"]["accuracy"] > 0.9
