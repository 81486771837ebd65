"""`run`: what the user can fix ends in one line and an exit status, what is a bug in a traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from flatmin.common import errors, files
from flatmin.common.errors import InputError


def outcome(stage: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    """Return the exit status and what is written to standard error."""
    with pytest.raises(SystemExit) as caught:
        errors.run(stage, *arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    return caught.value.code, captured.err


def refuse(text: str) -> None:
    raise InputError(text)


def test_run_without_error_passes_arguments_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    received: list[str] = []
    errors.run(lambda *arguments: received.extend(arguments), "a", "b")
    assert received == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_run_on_input_error_prints_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLATMIN_DEBUG", raising=False)
    text = "sam.rho: expected a number,\n  received 'x'"
    assert outcome(refuse, capsys, text) == (1, "error: sam.rho: expected a number, received 'x'\n")


def test_run_on_input_error_with_debug_prints_traceback_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATMIN_DEBUG", "1")
    code, written = outcome(refuse, capsys, "sam.rho: expected a number, received 'x'")
    assert code == 1
    assert written.startswith("Traceback (most recent call last):\n")
    assert "in refuse" in written
    assert written.splitlines()[-1] == "error: sam.rho: expected a number, received 'x'"


def test_run_on_file_system_error_prints_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLATMIN_DEBUG", raising=False)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()

    def without_a_name() -> None:
        raise OSError("no more\nroom")

    for place, stage in [
        (str(tmp_path / "file"), lambda: files.write_json(tmp_path / "file" / "metrics.json", {})),
        (str(tmp_path / "file"), lambda: files.read_json(tmp_path / "file" / "metrics.json")),
        (str(tmp_path / "folder"), lambda: files.read_json(tmp_path / "folder")),
        ("the file system", without_a_name),
    ]:
        code, written = outcome(stage, capsys)
        assert code == 1
        assert written.startswith(f"error: {place}")
        assert "expected a usable file or folder, received: " in written
        assert written.count("\n") == 1


def test_run_on_exhausted_memory_or_disk_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "data/records: No space left on device\nat ...")

    assert outcome(full, capsys) == (
        1,
        "error: expected enough memory and disk space (a smaller batch_size needs less memory), received: "
        "data/records: No space left on device\n",
    )


def test_run_on_error_within_tf_data_prints_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> None:
        def generate() -> Any:
            raise InputError("data.name: expected an image, received none")
            yield 0

        list(tf.data.Dataset.from_generator(generate, output_signature=tf.TensorSpec((), tf.int32)))

    assert outcome(stage, capsys) == (1, "error: data.name: expected an image, received none\n")


def test_run_on_interrupt_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def wait() -> None:
        raise KeyboardInterrupt

    code, written = outcome(wait, capsys)
    assert code == 130
    assert written.startswith("interrupted: ")
    assert written.count("\n") == 1


def test_run_on_bug_raises_it() -> None:
    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        errors.run(bug)


def test_first_line_drops_the_node_name() -> None:
    text = "\n{{function_node __wrapped__IteratorGetNext}} truncated record at 0\n\t [[{{node X}}]] [Op:Y]"
    assert errors.first_line(text) == "truncated record at 0"


@pytest.mark.parametrize(
    ("write", "received"),
    [
        ("with temporary.open('wb') as file: np.savez(file, a=np.zeros(10000))", r"File too large\n"),
        ("shutil.copytree('models', temporary)", r"\[Errno 27\] File too large: 'models/weights' -> .*\n"),
    ],
)
def test_run_full_disk_is_one_line_that_names_the_file(tmp_path: Path, write: str, received: str) -> None:
    """A limit on a file's size stands for the disk. The archive fails again when Python collects it."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/weights").write_bytes(bytes(10000))
    code = f"""
import resource, shutil
import numpy as np
from flatmin.common import errors, files

def save():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with files.atomic_write("state") as temporary:
        {write}

errors.run(save)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(f"error: state: expected a usable file or folder, received: {received}", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
