"""The frame of every stage: it is given what dvc.yaml declares for it, and fails if that changed while it ran.

DVC records params and dependencies as they are when a stage ends. Without this check, a value edited for the next
experiment while a stage trains would be recorded as the one that the stage trained with.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from flatmin.common import errors, files, identity, params
from flatmin.common.errors import InputError
from flatmin.common.params import Params
from flatmin.common.params_errors import read_yaml

CODE = ("src/", "stages/")  # dependencies of dvc.yaml that are source


def run(name: str, main: Callable[..., Any], *items: str) -> NoReturn:
    """Run a stage: check all of params.yaml, call `main(declared, *items)`, and check that nothing changed meanwhile.

    It ends the process, on wrong input with one line and status 1.

    Args:
        name: as dvc.yaml has it.
        main: does the stage's work. It may return a resume state, which is removed once nothing was found changed.
        items: the stage's value of each key of its matrix.
    """

    def checked() -> None:
        declared = declare(name, *items)
        state = main(declared, *items)
        declared.check_unchanged()
        if state is not None:
            state.remove()

    try:
        errors.run(checked)
    except SystemExit as error:
        _end(error.code)  # within the block, whose end would collect what the failure left open
    _end(0)


def _end(status: Any) -> NoReturn:
    """End the process at once, unless it is one of several workers, which take leave of each other as Python ends.

    Python takes TensorFlow apart for seconds, in which an edit would be recorded as this stage's. If the disk is full,
    HDF5 prints a traceback and crashes on the way.
    """
    if "TF_CONFIG" in os.environ:
        sys.exit(status)
    sys.stdout.flush()
    os._exit(status)


@dataclass(frozen=True)
class Declared:
    """The declarations of dvc.yaml for a stage.

    Attributes:
        stage: the stage's name.
        params: the sections and keys of params.yaml that it declares; reading another raises AttributeError.
    """

    stage: str
    params: Params
    _sections: Sequence[str]
    _deps: Sequence[str]
    _at_start: Mapping[str, Mapping[str, Any]]

    def check_unchanged(self) -> None:
        """Check that the declared params, code and data are what they were when the stage started.

        Params are compared by value, source by content, data by the size and time of modification of each file.

        Raises:
            InputError: one of them changed, or params.yaml can't be read any more.
        """
        result = f"while {self.stage} ran; nothing is recorded, run `dvc repro` again"
        now = _files_state(self._deps)
        try:  # last, since params are what is edited soonest after a training's last line
            now["params.yaml"] = _values(params.load(), self._sections)
        except InputError as error:
            raise InputError(f"params.yaml: changed {result} ({error})") from None
        for where, before in self._at_start.items():
            after = now[where]
            for key in sorted({*before, *after}):
                if before.get(key) == after.get(key):
                    continue
                if where == "params.yaml":
                    change = f"changed from {_short(before.get(key))} to {_short(after.get(key))}"
                    raise InputError(f"params.yaml: {key}: {change} {result}")
                change = "removed" if key not in after else "added" if key not in before else "changed"
                raise InputError(f"{key}: {change} {result}")


def declare(name: str, *items: str) -> Declared:
    """Read what dvc.yaml declares for a stage, and everything's present state.

    Raises:
        InputError: params.yaml is wrong, dvc.yaml has no such stage, or `items` are none of its matrix.
    """
    settings = params.load()
    stage = _read_stage(name)
    matrix = _choose(name, stage.get("matrix", {}), items, settings)
    # What is no text names keys of other files, such as RESULTS_VERSION, which are code.
    sections = [section for section in stage.get("params", []) if isinstance(section, str)]
    deps = [re.sub(r"\$\{item\.(\w+)\}", lambda found: matrix[found[1]], dep) for dep in stage.get("deps", [])]
    for dep in deps:
        if Path(dep).resolve().parent == identity.PACKAGE:
            identity.source_digest(Path(dep).name)  # taken now, before `main` imports it
    return Declared(
        name,
        cast(Params, _select(name, settings, sections)),
        sections,
        deps,
        {"params.yaml": _values(settings, sections), **_files_state(deps)},
    )


class _Declared:
    """The params that dvc.yaml declares for a stage, as attributes."""

    def __init__(self, stage: str, values: Mapping[str, Any]) -> None:
        self._stage = stage
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"dvc.yaml does not declare `{name}` for {self._stage}")


def _select(stage: str, settings: Any, names: Iterable[str]) -> _Declared:
    """Sections of `settings` by name, such as `data`, and single keys of others, such as `extract.image_size`."""
    keys: dict[str, list[str]] = {}
    for name in names:
        section, _, key = name.partition(".")
        keys.setdefault(section, []).extend([key] if key else [])
    values = {}
    for section, chosen in keys.items():
        value = getattr(settings, section)
        values[section] = _select(stage, value, chosen) if chosen else value
    return _Declared(stage, values)


def _read_stage(name: str) -> dict[str, Any]:
    try:
        stage: dict[str, Any] = read_yaml("dvc.yaml")["stages"][name]
    except (KeyError, TypeError):
        raise InputError(f"dvc.yaml: stages.{name}: expected a stage, found none") from None
    return stage


def _choose(name: str, matrix: Mapping[str, Any], items: Sequence[str], settings: Params) -> dict[str, str]:
    """The item of each key of a stage's matrix, checked against its values, which may be a section: `${backbones}`."""
    if len(items) != len(matrix):
        expected = " ".join(matrix) or "no argument"
        raise InputError(f"{name}: expected {expected}, received {' '.join(items) or 'no argument'}")
    for (key, values), item in zip(matrix.items(), items, strict=True):
        if isinstance(values, str):
            key = values.removeprefix("${").removesuffix("}")
            values = getattr(settings, key)
        if item not in map(str, values):
            raise InputError(f"{key}: expected one of {', '.join(map(str, values))}, received {item}")
    return dict(zip(matrix, items, strict=True))


def _values(settings: Params, sections: Sequence[str]) -> dict[str, Any]:
    """The values of sections by key."""
    prefixes = tuple(f"{section}." for section in sections)
    return {key: value for key, value in files.leaves(settings.model_dump()) if f"{key}.".startswith(prefixes)}


def _files_state(deps: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The present digests of source and signatures of data, each by file."""
    code = (path for dep in deps if dep.startswith(CODE) for path in identity.source_files(Path(dep)))
    data = (path for dep in deps if not dep.startswith(CODE) for path in _files(Path(dep)))
    return {
        "code": {path.as_posix(): files.sha256(path) for path in code},
        "data": {path.as_posix(): (status.st_size, status.st_mtime_ns) for path, status in data},
    }


def _files(dep: Path) -> list[tuple[Path, os.stat_result]]:
    paths = [path for path in dep.rglob("*") if not path.is_dir()] if dep.is_dir() else [dep]
    return [(path, path.stat()) for path in paths if path.exists()]


def _short(value: Any) -> str:
    text = "nothing" if value is None else " ".join(str(value).split())
    return text if len(text) <= 40 else text[:37] + "..."
