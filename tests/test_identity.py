"""Source is identified by the version of its results while it is accepted, and by its digest while it is not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from repository import ROOT

from flatmin.common import identity
from flatmin.common.errors import InputError

VERSION = identity.RESULTS_VERSION


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's package of a folder and a module, none of it accepted."""
    folder = tmp_path / "src/flatmin"
    (folder / "inputs").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "inputs/augment.py").write_text("magnitude = 3\n")
    (folder / "inputs/records.py").write_text("")
    (folder / "runtime.py").write_text("seed = 1\n")
    monkeypatch.setattr(identity, "PACKAGE", folder)
    monkeypatch.setattr(identity, "ACCEPTED", tmp_path / "accepted.json")
    monkeypatch.setattr(identity, "_first_read", {})
    return folder


def next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_first_read", {})


def test_rooms_are_folders_and_modules_with_source(package: Path) -> None:
    (package / "left_behind/__pycache__").mkdir(parents=True)
    (package / "left_behind/__pycache__/module.pyc").write_bytes(b"")
    (package / "__pycache__").mkdir()
    assert identity.rooms() == ["inputs", "runtime.py"]


@pytest.mark.parametrize("change", ["edit", "rename", "add", "remove", "swap"])
def test_source_digest_of_changed_source_differs(package: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity.source_digest("inputs")
    augment, records = package / "inputs/augment.py", package / "inputs/records.py"
    match change:
        case "edit":
            augment.write_text("magnitude = 4\n")
        case "rename":
            augment.rename(augment.with_name("augmentation.py"))
        case "add":
            (package / "inputs/deeper").mkdir()
            (package / "inputs/deeper/new.py").write_text("")
        case "remove":
            records.unlink()
        case "swap":
            records.write_text(augment.read_text())
            augment.write_text("")
    next_process(monkeypatch)
    assert identity.source_digest("inputs") != before


def test_source_digest_ignores_what_is_not_source(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity.source_digest("inputs")
    (package / "inputs/__pycache__").mkdir()
    (package / "inputs/__pycache__/augment.cpython-311.pyc").write_bytes(b"compiled")
    (package / "inputs/.#augment.py").symlink_to("user@host.1234")  # an editor's lock
    (package / "runtime.py").write_text("seed = 2\n")
    next_process(monkeypatch)
    assert identity.source_digest("inputs") == before


@pytest.mark.parametrize("room", ["tail", "runtime", "empty"])
def test_source_digest_of_unknown_room_is_an_error_that_names_it(package: Path, room: str) -> None:
    (package / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{room}: expected a folder or module with Python source, found none"):
        identity.source_digest(room)


def test_source_identity_holds_digests_of_unaccepted_rooms_only(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = ("inputs", "runtime.py")
    digests = {room: identity.source_digest(room) for room in rooms}
    assert identity.source_identity(rooms) == {"results_version": VERSION, "unaccepted": digests}
    identity.write_accepted()
    accepted = identity.source_identity(rooms)
    assert accepted == {"results_version": VERSION, "unaccepted": {}}

    (package / "inputs/augment.py").write_text("magnitude = 4\n")
    next_process(monkeypatch)
    edited = identity.source_identity(rooms)
    assert edited == {"results_version": VERSION, "unaccepted": {"inputs": identity.source_digest("inputs")}}
    assert edited["unaccepted"]["inputs"] != digests["inputs"]
    assert identity.source_identity(("runtime.py",)) == accepted, "another room's edit"
    identity.write_accepted()
    assert identity.source_identity(rooms) == accepted


def test_source_identity_of_a_raised_version_accepts_nothing_of_the_former(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity.write_accepted()
    monkeypatch.setattr(identity, "RESULTS_VERSION", VERSION + 1)
    digest = identity.source_digest("inputs")
    assert identity.source_identity(("inputs",)) == {"results_version": VERSION + 1, "unaccepted": {"inputs": digest}}
    identity.write_accepted()
    assert identity.source_identity(("inputs",)) == {"results_version": VERSION + 1, "unaccepted": {}}


@pytest.mark.parametrize("damaged", ["<<<<<<< HEAD\n", "[]", "{}", '{"results_version": "1", "source": {}}'])
def test_source_identity_with_damaged_accepted_json_is_an_error(package: Path, damaged: str) -> None:
    identity.ACCEPTED.write_text(damaged)
    with pytest.raises(InputError, match=r"accepted\.json: expected"):
        identity.source_identity(("inputs",))


def test_check_source_unchanged_notices_an_edit_of_a_room_in_use(package: Path) -> None:
    before = identity.source_digest("inputs")
    (package / "runtime.py").write_text("seed = 2\n")  # not in use
    identity.check_source_unchanged()
    (package / "inputs/augment.py").write_text("magnitude = 4\n")
    assert identity.source_digest("inputs") == before, "what this process runs"
    with pytest.raises(InputError, match="inputs: edited while its code ran"):
        identity.check_source_unchanged()
    for path in package.glob("inputs/*.py"):
        path.unlink()
    with pytest.raises(InputError, match="inputs: edited while its code ran"):
        identity.check_source_unchanged()


@pytest.mark.slow  # an edit is not accepted yet while it is tested
def test_every_source_file_is_in_a_room_that_is_accepted() -> None:
    """The committed source is the accepted one. If this fails: `make accept`, or `make golden` if numbers changed."""
    assert identity.ACCEPTED == ROOT / "accepted.json"
    version, accepted = identity.read_accepted()
    assert version == identity.RESULTS_VERSION
    assert accepted == {room: identity.source_digest(room) for room in identity.rooms()}
    top = ast.parse((identity.PACKAGE / "__init__.py").read_text()).body
    assert [type(node) for node in top] == [ast.Expr], "__init__.py is in no room: a docstring is all that it may hold"
