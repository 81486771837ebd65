"""An entry is made once, complete and verified, and pruned when room is needed and nobody uses it."""

from __future__ import annotations

import ast
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flatmin.common import identity
from flatmin.common.errors import InputError
from flatmin.features import cache
from flatmin.features.cache import open_entry


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FLATMIN_CACHE_LIMIT", raising=False)
    return tmp_path / "cache" / "kind"


def writing(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "file").write_bytes(content)

    return write


def refuse(_: Path) -> None:
    raise AssertionError("made again")


def make(name: str, content: bytes = b"content") -> bytes:
    entry = open_entry("kind", name, writing(content))
    found = (entry.folder / "file").read_bytes()
    entry.close()
    return found


def test_entry_that_exists_is_not_made_again() -> None:
    assert make("a", b"first") == b"first"
    assert make("a", b"second") == b"first"
    assert cache.exists("kind", "a")
    assert not cache.exists("kind", "b")


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "no checksums", "broken checksums"])
def test_entry_that_is_broken_is_made_again(folder: Path, harm: str) -> None:
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


def test_entry_whose_making_fails_leaves_nothing(folder: Path) -> None:
    def failing(temporary: Path) -> None:
        (temporary / "file").write_bytes(b"half")
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        open_entry("kind", "a", failing)
    assert [path.name for path in folder.iterdir()] == ["a.lock"]
    assert make("a") == b"content"


def slowly(folder: Path) -> None:
    (folder / "file").write_bytes(b"half")
    time.sleep(60)


def test_entry_half_written_by_a_killed_process_is_removed(folder: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=open_entry, args=("kind", "a", slowly))
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


def test_entry_that_two_processes_want_is_made_once(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=open_entry, args=("kind", "a", counted)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (folder.parent / "made").read_text() == "x"


def test_entry_in_use_by_its_maker_opens_without_waiting(folder: Path) -> None:
    """Two processes find no entry; one makes it and holds it for a training that waits for the other process."""
    make("a")
    folder.joinpath("a").rename(folder.parent / "made")
    with open(folder / "a.lock", "rb") as maker:
        fcntl.flock(maker, fcntl.LOCK_SH)
        other = threading.Thread(target=open_entry, args=("kind", "a", refuse), daemon=True)
        other.start()
        other.join(timeout=0.5)
        assert other.is_alive()
        (folder.parent / "made").rename(folder / "a")
        other.join(timeout=10)
        assert not other.is_alive()


def test_make_room_removes_least_recently_used_but_none_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(("new", "older", "oldest")):
        make(name, b"x" * 1000)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    make("oldest")  # used again
    used = sum(path.stat().st_size for path in folder.glob("*/*"))
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", str(used))
    cache.make_room("kind", 500)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["new", "oldest"]
    held = open_entry("kind", "new", refuse)
    cache.make_room("kind", used - 1500)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["new"]
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE_LIMIT: expected at least \d+ bytes \(\d+ for this, \d+ in"):
        cache.make_room("kind", used)
    held.close()
    cache.make_room("kind", used)
    assert not [path for path in folder.iterdir() if path.is_dir()]


@pytest.mark.parametrize(("needed", "limit"), [(10**20, 10**30), (2001, 2000)])
def test_make_room_for_what_cannot_fit_removes_nothing(
    needed: int, limit: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("kept")
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", str(limit))
    expected = f"LIMIT: expected at least {needed} bytes" if needed > limit else f"CACHE: expected {needed} bytes free"
    with pytest.raises(InputError, match=expected):
        cache.make_room("kind", needed)
    assert (folder / "kept").is_dir()


def test_make_room_on_a_full_disk_is_an_error_with_the_bytes_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", str(10**30))
    with pytest.raises(InputError, match=rf"\$FLATMIN_CACHE: expected {10**20} bytes free in .*, received \d+$"):
        cache.make_room("kind", 10**20)


@pytest.mark.parametrize("limit", ["", "-1", "1e9", "10 GB"])
def test_limit_that_is_no_number_of_bytes_is_an_error(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", limit)
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE_LIMIT: expected a number of bytes, received"):
        cache.make_room("kind", 1)


def test_entry_in_a_read_only_place_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE: expected a folder to write to, received .*kind: Not a dir"):
        open_entry("kind", "a", refuse)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two rooms, both accepted; returns a file in the room `inputs`."""
    package = tmp_path / "src/flatmin"
    for room in ("inputs", "models"):
        (package / room).mkdir(parents=True)
        (package / room / "code.py").write_text("")
    monkeypatch.setattr(identity, "PACKAGE", package)
    monkeypatch.setattr(identity, "ACCEPTED", tmp_path / "accepted.json")
    monkeypatch.setattr(identity, "_first_read", {})
    identity.write_accepted()
    return package / "inputs/code.py"


def test_key_differs_by_values_files_versions_and_unaccepted_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rooms = tmp_path / "file", ["inputs"]
    file.write_text("1")
    first = cache.key({"a": 1}, rooms=rooms)
    keys = [first, cache.key({"a": 2}, rooms=rooms), cache.key({"a": 1}, files=[file], rooms=rooms)]
    file.write_text("2")
    keys.append(cache.key({"a": 1}, files=[file], rooms=rooms))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_versions", lambda: {"tensorflow": "0"})
        keys.append(cache.key({"a": 1}, rooms=rooms))
    with monkeypatch.context() as patch:
        patch.setattr(identity, "RESULTS_VERSION", identity.RESULTS_VERSION + 1)
        identity.write_accepted()
        keys.append(cache.key({"a": 1}, rooms=rooms))
        identity.ACCEPTED.unlink()
    identity.write_accepted()
    assert cache.key({"a": 1}, rooms=["models"]) == first, "the names of accepted rooms"
    monkeypatch.setattr(identity, "_first_read", {})  # as in another process
    source.write_text("edited = True")
    keys.append(cache.key({"a": 1}, rooms=rooms))
    assert len(set(keys)) == len(keys)
    assert cache.key({"a": 1}, rooms=["models"]) == first, "an edit of a room that the entry does not depend on"
    identity.write_accepted()
    assert cache.key({"a": 1}, rooms=rooms) == first


def test_key_over_a_room_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="trunk: expected a folder or module with Python source, found none"):
        cache.key({}, rooms=["common", "trunk"])


def test_entry_made_while_its_source_was_edited_is_not_cached(source: Path, folder: Path) -> None:
    key = cache.key({}, rooms=["inputs"])

    def make_while_editing(temporary: Path) -> None:
        writing(b"by which of the two?")(temporary)
        source.write_text("edited = True")

    with pytest.raises(InputError, match="inputs: edited while its code ran; run it again"):
        open_entry("kind", key, make_while_editing)
    assert not cache.exists("kind", key)


def imported_rooms(module: Path) -> set[str]:
    """The rooms of the package that a module imports, directly or not, its own included.

    What the schema imports is left out: it can refuse params, and cannot change what is computed with them.
    """
    modules, pending = set(), [module]
    while pending:
        path = pending.pop()
        modules.add(path)
        if path == identity.PACKAGE / "common/params.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            candidates = (identity.PACKAGE.parent.joinpath(*name.split(".")) for name in names)
            pending += {path.with_suffix(".py") for path in candidates if path.with_suffix(".py").is_file()} - modules
    return {path.relative_to(identity.PACKAGE).parts[0] for path in modules}


def test_rooms_of_entries_are_those_that_the_code_imports() -> None:
    engine = imported_rooms(identity.PACKAGE / "features/engine.py")
    # The frozen layers, which models builds, are handed to the engine.
    assert set(cache.ENGINE_ROOMS) == engine | {"models"}
    assert set(cache.ACTIVATION_ROOMS) == imported_rooms(identity.PACKAGE / "features/store.py")
    assert set(cache.TRAINING_ROOMS) == imported_rooms(identity.PACKAGE / "training/stages.py")


def test_folder_by_default_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATMIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.folder() == Path("/somewhere/flatmin")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache/flatmin"
