"""Output on the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatmin.common import console

SOURCE = Path(__file__).parents[1] / "src"


def test_progress_without_terminal_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(console.progress(range(3), "train", unit="image")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_log_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.log("epoch 1")
    assert capsys.readouterr() == ("epoch 1\n", "")


QUIET = """
import os
from flatmin.common import console
try:
    with console.quiet():
        os.write(2, b"a page of warnings\\n")
        {end}
except ValueError:
    os.write(2, b"failed\\n")
os.write(2, b"after\\n")
"""


@pytest.mark.parametrize(
    ("end", "written"),
    [("pass", "after\n"), ("raise ValueError", "a page of warnings\nfailed\nafter\n")],
    ids=["success", "error"],
)
def test_quiet_shows_what_libraries_wrote_on_error_only(end: str, written: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUIET.format(end=end)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", written)


def test_set_tensorflow_defaults_keeps_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    console.set_tensorflow_defaults()
    assert (os.environ["TF_CPP_MIN_LOG_LEVEL"], os.environ["TF_ENABLE_ONEDNN_OPTS"]) == ("0", "0")


def test_importing_tensorflow_sets_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    with console.importing_tensorflow():
        assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
