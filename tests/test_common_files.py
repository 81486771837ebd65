"""Files that are complete or absent, JSON and CSV that are equal for equal values, and digests."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatmin.common import files
from flatmin.common.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_file(path: Path, text: str) -> None:
    path.write_text(text)


def make_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / text).write_text(text)


def make_link_to_folder(path: Path, text: str) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


@pytest.mark.parametrize("make_old", [None, make_file, make_folder, make_link_to_folder])
@pytest.mark.parametrize("make_new", [make_file, make_folder])
def test_atomic_write_replaces_files_and_folders(tmp_path: Path, make_old: Any, make_new: Any) -> None:
    path = tmp_path / "out" / "thing"
    if make_old:
        path.parent.mkdir()
        make_old(path, "old")
    with files.atomic_write(path) as temporary:
        assert not temporary.exists()
        assert temporary.parent == path.parent
        make_new(temporary, "new")
    assert not path.is_symlink()
    assert path.read_text() == "new" if make_new is make_file else names(path) == ["new"]
    assert names(path.parent) == ["thing"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("make", [make_file, make_folder])
def test_atomic_write_on_error_leaves_the_old_file(tmp_path: Path, make: Any, error: type[BaseException]) -> None:
    def fail(path: Path) -> None:
        with files.atomic_write(path) as temporary:
            make(temporary, "new")
            raise error

    with pytest.raises(error):
        fail(tmp_path / "fresh")
    assert names(tmp_path) == []
    old = tmp_path / "thing"
    make(old, "old")
    with pytest.raises(error):
        fail(old)
    assert names(tmp_path) == ["thing"]
    assert old.read_text() == "old" if make is make_file else names(old) == ["old"]


def test_atomic_write_in_the_same_process_removes_its_temporary_file(tmp_path: Path) -> None:
    with files.atomic_write(tmp_path / "thing") as temporary:
        make_folder(temporary, "first")
        with files.atomic_write(tmp_path / "thing") as again:
            assert not again.exists()
            make_file(again, "second")
        make_file(temporary, "third")
    assert names(tmp_path) == ["thing"]


def test_atomic_write_removes_temporary_files_of_killed_processes_only(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    make_folder(tmp_path / f".thing.{ended.pid}.part", "old")
    make_file(tmp_path / f".other.{ended.pid}.part", "old")
    make_file(tmp_path / f".thing.{os.getppid()}.part", "being written")
    with files.atomic_write(tmp_path / "thing") as temporary:
        make_file(temporary, "new")
    assert names(tmp_path) == sorted([f".other.{ended.pid}.part", f".thing.{os.getppid()}.part", "thing"])


def test_write_json_of_equal_values_gives_equal_bytes(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "one.json"
    files.write_json(path, {"b": {"d": 1, "c": 0.1}, "a": "Größe"})
    written = path.read_bytes()
    assert "Größe" in written.decode()
    files.write_json(path, {"a": "Größe", "b": {"c": 0.1, "d": 1}})
    assert path.read_bytes() == written
    assert files.read_json(path) == {"a": "Größe", "b": {"c": 0.1, "d": 1}}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda number: {"test": {"accuracy": number}}, "test: accuracy"),
        (lambda number: {"classes": [1.0, {"ece": number}]}, "classes: 1: ece"),
    ],
)
def test_write_json_of_non_finite_number_is_refused(tmp_path: Path, number: float, wrap: Any, key: str) -> None:
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
    ids=["missing", "empty", "cut off", "not UTF-8", "list"],
)
def test_read_json_of_anything_else_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_write_csv_quotes_values_and_ends_lines_with_newline(tmp_path: Path) -> None:
    files.write_csv(tmp_path / "plots" / "one.csv", ("epoch", "name"), [(1, "a,b"), (2, 'say "x"')])
    assert (tmp_path / "plots" / "one.csv").read_bytes() == b'epoch,name\n1,"a,b"\n2,"say ""x"""\n'
    assert names(tmp_path / "plots") == ["one.csv"]


def test_digest_of_arrays_is_sha256_of_their_bytes() -> None:
    arrays: list[np.ndarray] = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7], np.int64)]
    assert files.digest(arrays) == hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_sha256_of_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert files.sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
