"""An entry is made once, whole, checked, and pruned when room is needed and nobody uses it."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flatmin.common.errors import InputError
from flatmin.features import cache
from flatmin.features.cache import Entry


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLATMIN_CACHE_LIMIT", raising=False)
    return tmp_path / "cache" / "kind"


def writing(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "file").write_bytes(content)

    return write


def refusing(_: Path) -> None:
    raise AssertionError("made again")


def make(name: str, content: bytes = b"content") -> bytes:
    entry = Entry("kind", name, writing(content))
    found = (entry.folder / "file").read_bytes()
    entry.close()
    return found


def test_an_entry_is_made_once() -> None:
    assert make("a", b"first") == b"first"
    assert make("a", b"second") == b"first"
    assert cache.exists("kind", "a")
    assert not cache.exists("kind", "b")


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "no checksums", "broken checksums"])
def test_a_broken_entry_is_made_again(folder: Path, harm: str) -> None:
    make("a", b"first")
    file, checksums = folder / "a" / "file", folder / "a" / cache.CHECKSUMS
    match harm:
        case "truncate":
            file.write_bytes(b"fir")
        case "flip":
            file.write_bytes(b"firsT")
        case "remove":
            file.unlink()
        case "no checksums":
            checksums.unlink()
        case "broken checksums":
            checksums.write_text("{")
    assert make("a", b"again") == b"again"


def test_what_fails_leaves_nothing(folder: Path) -> None:
    def failing(aside: Path) -> None:
        (aside / "file").write_bytes(b"half")
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        Entry("kind", "a", failing)
    assert [path.name for path in folder.iterdir()] == ["a.lock"]
    assert make("a") == b"content"


def slowly(folder: Path) -> None:
    (folder / "file").write_bytes(b"half")
    time.sleep(60)


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=Entry, args=("kind", "a", slowly))
    process.start()
    deadline = time.monotonic() + 60
    while not list(folder.glob(".a.*.part/file")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(folder.glob(".a.*.part/file"))
    assert make("a") == b"content"
    assert not list(folder.glob(".a.*"))


def counted(folder: Path) -> None:
    with (folder.parent.parent / "made").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    (folder / "file").write_bytes(b"content")


def test_two_processes_make_it_once(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=Entry, args=("kind", "a", counted)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (folder.parent / "made").read_text() == "x"


def test_who_made_it_may_go_on_using_it(folder: Path) -> None:
    """Two find none at the same time; one makes it and holds it for a training that waits for the other."""
    make("a")
    folder.joinpath("a").rename(folder.parent / "made")
    with open(folder / "a.lock", "rb") as maker:
        fcntl.flock(maker, fcntl.LOCK_SH)
        other = threading.Thread(target=Entry, args=("kind", "a", refusing), daemon=True)
        other.start()
        other.join(timeout=0.5)
        assert other.is_alive()
        (folder.parent / "made").rename(folder / "a")
        other.join(timeout=10)
        assert not other.is_alive()


def test_the_longest_unused_goes_first_and_nothing_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(("new", "older", "oldest")):
        make(name, b"x" * 1000)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    make("oldest")  # used again
    used = sum(path.stat().st_size for path in folder.glob("*/*"))
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", str(used))
    cache.make_room("kind", 500)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["new", "oldest"]
    held = Entry("kind", "new", refusing)
    cache.make_room("kind", used - 1500)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["new"]
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE_LIMIT: expected at least \d+ bytes \(\d+ for this, \d+ in"):
        cache.make_room("kind", used)
    held.close()
    cache.make_room("kind", used)
    assert not [path for path in folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize(("needed", "limit"), [(10**20, 10**30), (2001, 2000)])
def test_what_cannot_fit_removes_nothing(
    needed: int, limit: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("kept")
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", str(limit))
    expected = f"LIMIT: expected at least {needed} bytes" if needed > limit else f"CACHE: expected {needed} bytes free"
    with pytest.raises(InputError, match=expected):
        cache.make_room("kind", needed)
    assert (folder / "kept").is_dir()


def test_a_full_disk_is_an_error_with_the_bytes_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", str(10**30))
    with pytest.raises(InputError, match=rf"\$FLATMIN_CACHE: expected {10**20} bytes free in .*, received \d+$"):
        cache.make_room("kind", 10**20)


@pytest.mark.parametrize("limit", ["", "-1", "1e9", "10 GB"])
def test_a_limit_is_a_number_of_bytes(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", limit)
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE_LIMIT: expected a number of bytes, received"):
        cache.make_room("kind", 1)


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE: expected a folder to write to, received .*kind: Not a dir"):
        Entry("kind", "a", refusing)


def test_keys_differ_by_each_thing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("1")
    keys = [cache.key({"a": 1}), cache.key({"a": 2}), cache.key({"a": 1}, [file]), cache.key({"a": 1}, [], ["cache"])]
    file.write_text("2")
    keys.append(cache.key({"a": 1}, [file]))
    assert len(set(keys)) == len(keys)
    assert cache.key({"a": 1}) == keys[0]


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATMIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.folder() == Path("/somewhere/flatmin")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache/flatmin"
