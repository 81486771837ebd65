"""The package as one installs it: its wheel and sdist in an environment of Keras alone, and what the extras list."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import Distribution, distribution, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BACKEND = ("keras", "tensorflow", "setuptools")  # what a user has who installs the base; setuptools builds the sdist


def listed(name: str) -> list[Requirement]:
    """The requirements of a file in requirements/, and of those that it includes."""
    found = []
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        text = line.partition("#")[0].strip()
        if text.startswith("-r "):
            found += listed(text.removeprefix("-r "))
        elif text and not text.startswith("-"):
            found.append(Requirement(text))
    return found


@pytest.mark.parametrize(("extra", "file"), [("pipeline", "cpu.in"), ("export", "export.in")])
def test_extra_lists_what_its_lock_is_compiled_from(extra: str, file: str) -> None:
    requirements = [Requirement(text) for text in PROJECT["optional-dependencies"][extra]]
    base = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    of_keras = {"ml-dtypes"}  # pinned for the lock alone: Keras asks for it
    in_file = {canonicalize_name(each.name) for each in listed(file)} - base - of_keras
    assert {canonicalize_name(each.name) for each in requirements} == in_file


def test_locked_versions_are_in_the_ranges_of_the_package() -> None:
    lock = (ROOT / "requirements/cpu.txt").read_text() + (ROOT / "requirements/export.txt").read_text()
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras["pipeline"], *extras["export"]):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        locked = re.search(rf"^{re.escape(name)}(?:\[[^\]]*\])?==(\S+)", lock, re.MULTILINE)
        assert locked, text
        assert requirement.specifier.contains(locked[1], prereleases=True), f"{text}: {locked[1]}"


def closure(names: tuple[str, ...]) -> set[str]:
    """The distributions that these need, themselves included, as they are installed here."""
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = canonicalize_name(pending.pop())
        if name not in found:
            found.add(name)
            for text in distribution(name).requires or ():
                requirement = Requirement(text)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    pending.append(requirement.name)
    return found


def link(found: Distribution, into: Path) -> None:
    """Link the top-level files and folders of an installed distribution into another site-packages."""
    for name in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
        source = Path(str(found.locate_file(name)))
        if source.exists() and not (into / name).exists():
            (into / name).symlink_to(source)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(command, cwd=cwd, env=outside, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of what git tracks."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("src", "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        copy = folder / "checkout" / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copytree(source, copy, ignore=ignored) if source.is_dir() else shutil.copy(source, copy)
    program = "from setuptools import build_meta as build; build.build_sdist('../dist'); build.build_wheel('../dist')"
    (folder / "dist").mkdir()
    done = run(sys.executable, "-W", "ignore", "-c", program, cwd=folder / "checkout")
    assert done.returncode == 0, done.stderr
    return folder / "dist"


@pytest.mark.slow  # and not in the image, which has nothing to build with
def test_wheel_holds_every_file_of_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("flatmin/")}
    tracked = {
        path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/flatmin").rglob("*") if path.is_file()
    }
    assert held == {name for name in tracked if "__pycache__" not in name and not name.endswith(".pyc")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment of Keras, TensorFlow and what these need."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, with_pip=True, symlinks=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    for old in packages.glob("*setuptools*"):  # Python 3.11 brings one that is older than pyproject.toml asks for
        shutil.rmtree(old)
    for name in closure(BACKEND):
        link(distribution(name), packages)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("source", ["wheel", "sdist", "checkout", "git", "make setup"])
def test_package_installs_beside_keras_alone_and_names_its_extra(built: Path, environment: Path, source: str) -> None:
    checkout, python = built.parent / "checkout", environment / "bin/python"
    if source == "git":
        for step in ("init --quiet", "add .", "-c user.name=a -c user.email=a@example.com commit --quiet -m a"):
            assert run("git", *step.split(), cwd=checkout).returncode == 0
    names: dict[str, Any] = {
        "wheel": next(built.glob("*.whl")),
        "sdist": next(built.glob("*.tar.gz")),
        "checkout": checkout,
        "git": f"git+{checkout.as_uri()}",
    }
    # Without an index: pip itself finds that Keras is all that the package asks for.
    if source == "make setup":  # its last step, in an environment that counts as made
        (environment / "cpu.done").touch()
        done = run("make", f"VENV={environment}", environment / "bin/flatmin", cwd=checkout)
    else:
        command = [python, "-m", "pip", "install", "--no-index", "--no-build-isolation", names[source]]
        done = run(*command, cwd=environment)
    assert done.returncode == 0, done.stderr
    if source in ("wheel", "sdist"):  # the others hold the same files
        uses = (
            "import flatmin.sharpness, flatmin.sam as sam; print(sam.Step.__name__, flatmin.sharpness.measure.__name__)"
        )
        assert run(python, "-c", uses, cwd=environment).stdout == "Step measure\n"
    done = run(environment / "bin/flatmin", "--help", cwd=environment)
    expected = "error: flatmin needs typer, of its extra `pipeline`, as by: pip install '.[pipeline]' in a checkout\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    installed = run(python, "-m", "pip", "list", "--format", "freeze", cwd=environment).stdout
    assert f"keras=={version('keras')}" in installed
    assert not {"scipy", "typer", "pydantic", "dvc"} & set(re.findall(r"^([a-z-]+)==", installed, re.MULTILINE))
    assert run(python, "-m", "pip", "uninstall", "--yes", "flatmin", cwd=environment).returncode == 0
