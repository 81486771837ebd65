"""The container's scripts with an engine that prints its arguments, the locks, and what the image may hold.

`make image-test` builds the image and runs the study in it.
"""

from __future__ import annotations

import itertools
import os
import pty
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from repository import ROOT

from flatmin.use import formats

LOCKS = ("cpu", "gpu")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def lock(name: str) -> dict[str, tuple[str, list[str]]]:
    """Return package -> (version, hashes). AssertionError: the file has anything else, such as an index's address."""
    packages = {}
    body = re.sub(r"^\s*#.*\n", "", (ROOT / f"requirements/{name}.txt").read_text(), flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", body).splitlines():
        found = re.fullmatch(r"([a-z0-9.-]+)(?:\[[a-z0-9,-]+\])?==(\S+)((?: ?--hash=sha256:[0-9a-f]{64})+)", line)
        assert found, line
        assert found[1] not in packages, line
        packages[found[1]] = found[2], found[3].split()
    return packages


def test_build_context_holds_locks_only() -> None:
    assert (ROOT / ".dockerignore").read_text().split("\n", 1)[1].split() == ["*", "!requirements"]
    tracked = subprocess.run(["git", "ls-files", "requirements"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert {Path(name).suffix for name in tracked.stdout.splitlines()} == {".in", ".txt"}


def test_image_runs_as_a_user_without_root() -> None:
    users = re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert users
    assert "0" not in users[-1]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A container engine that prints its arguments, one a line, and exits with 7."""
    path = tmp_path / "engine"
    path.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 7\n")
    path.chmod(0o755)
    (tmp_path / "checkout/scripts").mkdir(parents=True)
    shutil.copy2(ROOT / "scripts/container.sh", tmp_path / "checkout/scripts")
    return path


def container(engine: Path, *command: str, keys: int = subprocess.DEVNULL, **variables: str) -> list[str]:
    """Return the engine's arguments for the checkout alongside, with `keys` as the script's input."""
    done = subprocess.run(
        ["scripts/container.sh", *command],
        env={**os.environ, "ENGINE": str(engine), **variables},
        cwd=engine.parent / "checkout",
        stdin=keys,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr  # the engine's own
    return done.stdout.splitlines()


def values(words: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(words) if name == option]


def test_container_mounts_this_checkout_as_the_caller(engine: Path) -> None:
    words = container(engine, "sh", "-c", "echo 'a  b'", IMAGE="some-image")
    assert words[-4:] == ["some-image", "sh", "-c", "echo 'a  b'"]
    assert words[:2] == ["run", "--rm"]
    assert values(words, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert "--tty" not in words
    assert values(words, "--volume") == [
        f"{engine.parent}/checkout:/workspace",
        "flatmin-dvc:/cache/dvc",
        "flatmin-cache:/cache/flatmin",
    ]


def test_container_takes_names_and_options_from_the_environment(engine: Path) -> None:
    words = container(engine, "true", VOLUMES="other", OPTIONS="--user 5:6 --read-only")
    assert values(words, "--volume")[1:] == ["other-dvc:/cache/dvc", "other-cache:/cache/flatmin"]
    assert values(words, "--user")[-1] == "5:6"  # the last one holds
    assert "--read-only" in words
    assert words[-2:] == ["flatmin", "true"]


def test_container_cdpath_mounts_no_other_folder(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    words = container(engine, "true", CDPATH=str(tmp_path))
    assert values(words, "--volume")[0].startswith(f"{tmp_path}/checkout:")


def test_container_forwards_stdin_but_not_a_terminal_without_its_output(engine: Path) -> None:
    assert "--interactive" in container(engine, "cat")
    ours, theirs = pty.openpty()
    try:
        assert "--interactive" not in container(engine, "cat", keys=theirs)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(("name", "user", "kept"), [("podman", 1000, True), ("podman", 0, False), ("docker", 5, False)])
def test_container_podman_without_root_keeps_the_callers_id(engine: Path, name: str, user: int, kept: bool) -> None:
    engine.rename(engine.with_name(name))
    (engine.parent / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (engine.parent / "id").chmod(0o755)
    words = container(engine.with_name(name), "true", PATH=f"{engine.parent}{os.pathsep}{os.environ['PATH']}")
    assert values(words, "--user") == [f"{user}:{user}"]
    assert ("--userns=keep-id" in words) == kept


@pytest.mark.parametrize(("folder", "message"), [("a:b", "a path without ':'"), ("tree", "a clone's folder")])
def test_container_checkout_that_cannot_be_mounted_is_one_line(tmp_path: Path, folder: str, message: str) -> None:
    (tmp_path / folder / "scripts").mkdir(parents=True)
    (tmp_path / folder / ".git").write_text("gitdir: elsewhere\n")
    script = shutil.copy2(ROOT / "scripts/container.sh", tmp_path / folder / "scripts")
    done = subprocess.run(
        [script, "true"], env={**os.environ, "ENGINE": "echo"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / folder}")
    assert f"expected {message}" in line


def test_container_passes_credentials_by_name_only(engine: Path) -> None:
    secret = "a-secret-that-nobody-else-says"  # noqa: S105
    words = container(engine, "true", AWS_SECRET_ACCESS_KEY=secret)
    assert "AWS_SECRET_ACCESS_KEY" in values(words, "--env")
    assert not [word for word in words if secret in word]


def test_compose_has_the_volumes_and_variables_of_the_script(engine: Path) -> None:
    words = container(engine, "true", VOLUMES="other")
    assert set(COMPOSE["services"]) == set(LOCKS)
    for name, service in COMPOSE["services"].items():
        assert service["profiles"] == [name]
        assert service["build"] == {"context": ".", "args": {"LOCK": name}}
        assert service["user"].startswith("${FLATMIN_USER:?")
        for volume in service["volumes"]:
            source, target = volume.split(":")
            host = f"{engine.parent}/checkout" if source == "." else COMPOSE["volumes"][source]["name"]
            assert f"{host.replace('${VOLUMES:-flatmin}', 'other')}:{target}" in words
        assert sorted(service["environment"]) == sorted(name for name in values(words, "--env") if "=" not in name)
    (device,) = COMPOSE["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in COMPOSE["services"]["cpu"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.parametrize("target", ["image", "docker-repro", "docker-shell"])
def test_make_image_is_the_one_that_compose_names(target: str, name: str) -> None:
    command = ["make", "--dry-run", target, f"LOCK={name}", "ENGINE=podman"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    image = COMPOSE["services"][name]["image"]
    assert f"podman build --tag {image} --build-arg LOCK={name} " in done.stdout
    assert (f"ENGINE=podman IMAGE={image} scripts/container.sh " in done.stdout) == (target != "image")


def test_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("there is no shellcheck")
    scripts = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("deploy/base/*.sh"), ROOT / ".ci/run"]
    command = [shellcheck, "--shell=sh", "--exclude=SC1091", *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LOCKS)
def test_lock_pins_every_package_by_hash_and_names_no_index(name: str) -> None:
    packages = lock(name)
    assert {"tensorflow", "opencv-python-headless"} <= set(packages)
    assert "opencv-python" not in packages
    assert "://" not in (ROOT / f"requirements/{name}.txt").read_text()


def test_locks_differ_in_the_cuda_wheels_only() -> None:
    cpu, gpu = lock("cpu"), lock("gpu")
    assert {name: cpu[name] for name in cpu} == {name: gpu[name] for name in cpu if name in gpu}
    extra = set(gpu) - set(cpu)
    assert extra
    assert all(name.startswith("nvidia-") for name in extra)
    assert {"nvidia-cudnn-cu12", "nvidia-cuda-runtime-cu12", "nvidia-nccl-cu12"} <= extra


def test_export_lock_has_what_the_extra_names_in_the_versions_of_the_pipeline() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["export"]
    export, cpu = lock("export"), lock("cpu")
    assert {requirement.partition(">=")[0] for requirement in extra} == set(formats.FORMATS["onnx"].packages)
    assert set(formats.FORMATS["onnx"].packages) <= set(export)
    assert {name: export[name][0] for name in export if name in cpu} == {
        name: cpu[name][0] for name in cpu if name in export
    }
