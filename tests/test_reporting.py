"""What the stages tell: one line for an error, files that are whole, equal bytes for equal values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flatmin.common import console, errors, files
from flatmin.common.errors import InputError

SOURCE = Path(__file__).parents[1] / "src"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put_file(path: Path, text: str) -> None:
    path.write_text(text)


def put_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / text).write_text(text)


def put_link_to_folder(path: Path, text: str) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


@pytest.mark.parametrize("old", [None, put_file, put_folder, put_link_to_folder])
@pytest.mark.parametrize("new", [put_file, put_folder])
def test_whole_replaces_files_and_folders(tmp_path: Path, old: Any, new: Any) -> None:
    path = tmp_path / "out" / "thing"
    if old:
        path.parent.mkdir()
        old(path, "old")
    with files.atomic_write(path) as aside:
        assert not aside.exists()
        assert aside.parent == path.parent
        new(aside, "new")
    assert not path.is_symlink()
    assert path.read_text() == "new" if new is put_file else names(path) == ["new"]
    assert names(path.parent) == ["thing"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("put", [put_file, put_folder])
def test_whole_leaves_nothing_half_written(tmp_path: Path, put: Any, error: type[BaseException]) -> None:
    def fail(path: Path) -> None:
        with files.atomic_write(path) as aside:
            put(aside, "new")
            raise error

    with pytest.raises(error):
        fail(tmp_path / "fresh")
    assert names(tmp_path) == []
    put(tmp_path / "thing", "old")
    with pytest.raises(error):
        fail(tmp_path / "thing")
    assert names(tmp_path) == ["thing"]
    old = tmp_path / "thing"
    assert old.read_text() == "old" if put is put_file else names(old) == ["old"]


def test_whole_clears_away_what_an_earlier_run_left(tmp_path: Path) -> None:
    with files.atomic_write(tmp_path / "thing") as aside:
        put_folder(aside, "stale")
        with files.atomic_write(tmp_path / "thing") as again:
            assert not again.exists()
            put_file(again, "new")
        put_file(aside, "newer")
    assert names(tmp_path) == ["thing"]


def test_whole_clears_away_what_a_killed_process_left(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    put_folder(tmp_path / f".thing.{ended.pid}.part", "stale")
    put_file(tmp_path / f".other.{ended.pid}.part", "stale")
    put_file(tmp_path / f".thing.{os.getppid()}.part", "being written")
    with files.atomic_write(tmp_path / "thing") as aside:
        put_file(aside, "new")
    assert names(tmp_path) == sorted([f".other.{ended.pid}.part", f".thing.{os.getppid()}.part", "thing"])


def test_json_is_the_same_for_equal_values(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "one.json"
    files.write_json(path, {"b": {"d": 1, "c": 0.1}, "a": "Größe"})
    text = '{\n  "a": "Größe",\n  "b": {\n    "c": 0.1,\n    "d": 1\n  }\n}\n'
    assert path.read_bytes() == text.encode()
    files.write_json(path, {"a": "Größe", "b": {"c": 0.1, "d": 1}})
    assert path.read_bytes() == text.encode()
    assert files.read_json(path) == {"a": "Größe", "b": {"c": 0.1, "d": 1}}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda number: {"test": {"accuracy": number}}, "test: accuracy"),
        (lambda number: {"classes": [1.0, {"ece": number}]}, "classes: 1: ece"),
    ],
)
def test_json_holds_finite_numbers_only(tmp_path: Path, number: float, wrap: Any, key: str) -> None:
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(InputError) as caught:
        files.write_json(path, wrap(number))
    assert str(caught.value) == f"{path}: {key}: expected a finite number, received {number}"
    assert files.read_json(path) == {"a": 1}
    assert names(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a file that an earlier stage wrote, found none"),
        (b"", "expected JSON, received "),
        (b'{"a": ', "expected JSON, received "),
        (b"\xff", "expected JSON, received "),
        (b"[1]", "expected a JSON object, received list"),
    ],
)
def test_json_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_csv_has_a_header_and_plain_line_ends(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "plots" / "one.csv", ("epoch", "name"), [(1, "a,b"), (2, 'say "x"')])
    assert (tmp_path / "plots" / "one.csv").read_bytes() == b'epoch,name\n1,"a,b"\n2,"say ""x"""\n'
    assert names(tmp_path / "plots") == ["one.csv"]


def outcome(stage: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as caught:
        errors.run(stage, *arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    return caught.value.code, captured.err


def refuse(text: str) -> None:
    raise InputError(text)


def test_run_gives_the_arguments_and_is_silent_when_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    received: list[str] = []
    errors.run(lambda *arguments: received.extend(arguments), "a", "b")
    assert received == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATMIN_DEBUG", raising=False)
    text = "sam.rho: expected a number,\n  received 'x'"
    assert outcome(refuse, capsys, text) == (1, "error: sam.rho: expected a number, received 'x'\n")
    monkeypatch.setenv("FLATMIN_DEBUG", "1")
    code, written = outcome(refuse, capsys, text)
    assert code == 1
    assert written.startswith("Traceback (most recent call last):\n")
    assert "in refuse" in written
    assert written.splitlines()[-1] == "error: sam.rho: expected a number, received 'x'"


def test_what_the_file_system_refuses_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLATMIN_DEBUG", raising=False)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()

    def full() -> None:
        raise OSError("no more\nroom")

    stages: dict[str, list[Any]] = {
        str(tmp_path / "file"): [
            lambda: files.write_json(tmp_path / "file" / "metrics.json", {}),
            lambda: files.read_json(tmp_path / "file" / "metrics.json"),
        ],
        str(tmp_path / "folder"): [lambda: files.read_json(tmp_path / "folder")],
        "the file system": [full],
    }
    for where, of_place in stages.items():
        for stage in of_place:
            code, written = outcome(stage, capsys)
            assert code == 1
            assert written.startswith(f"error: {where}")
            assert "expected a file or folder that can be used, received: " in written
            assert written.count("\n") == 1


def test_too_little_memory_or_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import tensorflow as tf

    def full() -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "data/records: No space left on device\nat ...")

    assert outcome(full, capsys) == (
        1,
        "error: expected room in memory and on the disk (a smaller batch_size takes less memory), received: "
        "data/records: No space left on device\n",
    )


def test_an_interrupt_ends_as_shells_expect(capsys: pytest.CaptureFixture[str]) -> None:
    def wait() -> None:
        raise KeyboardInterrupt

    code, written = outcome(wait, capsys)
    assert code == 130
    assert written.startswith("interrupted: ")
    assert written.count("\n") == 1


def test_a_bug_is_not_passed_off_as_wrong_input() -> None:
    def bug() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        errors.run(bug)


def test_progress_is_silent_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(console.progress(range(3), "train", unit="image")) == [0, 1, 2]
    assert capfd.readouterr() == ("", "")


def test_a_log_line_is_out_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    console.log("epoch 1")
    assert capsys.readouterr() == ("epoch 1\n", "")


QUIET = """
import os
from flatmin.common import console
from flatmin.common import errors
from flatmin.common import files
try:
    with console.quiet():
        os.write(2, b"a page of warnings\\n")
        {end}
except ValueError:
    os.write(2, b"failed\\n")
os.write(2, b"after\\n")
"""


@pytest.mark.parametrize(
    ("end", "written"), [("pass", "after\n"), ("raise ValueError", "a page of warnings\nfailed\nafter\n")]
)
def test_what_libraries_write_is_shown_only_on_failure(end: str, written: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUIET.format(end=end)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", written)


def test_json_in_the_repository_is_as_it_is_written() -> None:
    for path in sorted((SOURCE.parent / "metrics").rglob("*.json")):
        text = path.read_text(encoding="utf-8")
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
