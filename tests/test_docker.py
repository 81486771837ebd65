"""What holds of the image without a container engine: `make image-test` shows the rest.

The Dockerfile, .dockerignore and the locks are read line by line: what they name is there, and nothing else gets in.
The scripts run with an engine that prints its arguments.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from repository import ROOT

APT_PACKAGES = [["ca-certificates", "dumb-init", "git", "python3"], ["python3-pip"]]
LOCKS = ("cpu", "gpu")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = (line.strip().partition(" ") for line in joined.splitlines())
    return [(name.upper(), arguments.strip()) for name, _, arguments in pairs]


def expand(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], found[0]), text)


def ignored(path: str, rules: str) -> bool:
    """Whether a .dockerignore leaves a file out: the last rule that matches it or a folder above it decides."""
    above = [path, *(str(parent) for parent in Path(path).parents)][:-1]
    out = False
    for rule in rules.splitlines():
        if rule.strip() and not rule.startswith("#"):
            pattern = rule.strip().removeprefix("!").strip("/")
            depth = pattern.count("/")
            if any(fnmatchcase(name, pattern) for name in above if name.count("/") == depth):
                out = not rule.startswith("!")
    return out


TEXT = (ROOT / "Dockerfile").read_text()
LINES = instructions(TEXT)
IGNORE = (ROOT / ".dockerignore").read_text()
COMMANDS = [shlex.split(part) for name, text in LINES if name == "RUN" for part in text.split("&&")]


def arguments(instruction: str) -> list[str]:
    return [text for name, text in LINES if name == instruction]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for text in arguments("ENV") for word in shlex.split(text))


def read_lock(text: str) -> dict[str, tuple[str, list[str]]]:
    """Package -> (version, hashes); anything else in the text is an error."""
    packages = {}
    body = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", body).splitlines():
        found = re.fullmatch(r"([a-z0-9.-]+)(?:\[[a-z0-9,-]+\])?==(\S+)((?: ?--hash=sha256:[0-9a-f]{64})+)", line)
        assert found, line
        assert found[1] not in packages, line
        packages[found[1]] = found[2], found[3].split()
    return packages


def lock(name: str) -> dict[str, tuple[str, list[str]]]:
    return read_lock((ROOT / f"requirements/{name}.txt").read_text())


def test_the_parser_reads_what_docker_reads() -> None:
    text = '# a note\nFROM a\nRUN one \\\n    # between\n    && two\n\ncmd ["x", "y"]\n'
    assert instructions(text) == [("FROM", "a"), ("RUN", "one  && two"), ("CMD", '["x", "y"]')]
    assert expand("a/${LOCK}.txt $LOCK $other", {"LOCK": "gpu"}) == "a/gpu.txt gpu $other"
    assert not ignored("a/b.txt", "# all\n*\n!a\n")
    assert ignored("a/b.txt", "!a\n*\n")
    assert ignored("c/b.txt", "*\n!a\n")
    assert ignored("a/b.txt", "*\n!a\na/*.txt\n")
    assert not ignored("a/b.txt", "*.txt\n")


@pytest.mark.parametrize("line", ["a>=1 --hash=sha256:" + "0" * 64, "a==1", "--index-url x", "a @ https://b/c.whl"])
def test_the_parser_of_locks_refuses(line: str) -> None:
    with pytest.raises(AssertionError):
        read_lock(line + "\n")


def test_every_instruction_is_one_that_old_builders_know() -> None:
    known = {"ARG", "FROM", "RUN", "COPY", "ENV", "VOLUME", "WORKDIR", "USER", "ENTRYPOINT", "CMD", "LABEL"}
    assert {name for name, _ in LINES} <= known
    assert not re.search(r"^#\s*(syntax|escape|check)\s*=", TEXT, re.MULTILINE | re.IGNORECASE)
    assert "<<" not in TEXT
    assert not any(text.startswith("--") for text in arguments("RUN") + arguments("COPY"))


def test_the_base_is_debian_of_a_day() -> None:
    assert LINES[0][0] == "ARG"
    name, _, base = LINES[0][1].partition("=")
    assert name == "BASE"
    assert re.fullmatch(r"debian:bookworm-20\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])-slim", base)
    assert [expand(text, {"BASE": base}) for text in arguments("FROM")] == [base]


@pytest.mark.parametrize("name", LOCKS)
def test_what_is_copied_is_in_the_checkout_and_in_the_context(name: str) -> None:
    copied = [source for text in arguments("COPY") for source in expand(text, {"LOCK": name}).split()[:-1]]
    assert copied == [f"requirements/{name}.txt"]
    for source in copied:
        assert (ROOT / source).is_file()
        assert not ignored(source, IGNORE)


def test_the_default_lock_is_the_one_for_gpus() -> None:
    assert arguments("ARG")[1:] == ["LOCK=gpu", "BASE", "REVISION=unknown"]
    # What is after it in the file is made anew when it changes: nothing but names.
    assert [name for name, _ in LINES[LINES.index(("ARG", "BASE")) :]] == ["ARG", "ARG", "LABEL"]


@pytest.mark.parametrize(
    "path", [".git/config", ".dvc/config.local", ".venv/bin/python", "data/records/dataset.json", "params.yaml"]
)
def test_the_context_holds_locks_alone(path: str) -> None:
    assert ignored(path, IGNORE)


def test_debian_packages_are_the_known_ones_and_leave_nothing_behind() -> None:
    installs = [command for command in COMMANDS if command[:2] == ["apt-get", "install"]]
    assert all("--no-install-recommends" in command for command in installs)
    assert [[word for word in command[2:] if not word.startswith("-")] for command in installs] == APT_PACKAGES
    (purge,) = [command for command in COMMANDS if command[:2] == ["apt-get", "purge"]]
    assert {"--auto-remove", "python3-pip"} <= set(purge)
    layers = [text for text in arguments("RUN") if "apt-get" in text]
    assert all("rm -rf /var/lib/apt/lists/* /var/cache/apt/*" in text for text in layers)
    others = {command[0] for command in COMMANDS} - {"apt-get"}
    assert others == {"rm", "git", "mkdir", "printf", "python3", "find", "ldconfig"}


def test_pip_installs_the_lock_and_nothing_more() -> None:
    target = arguments("COPY")[0].split()[-1]
    (command,) = [command for command in COMMANDS if command[:3] == ["python3", "-m", "pip"]]
    (venv,) = [command[-1] for command in COMMANDS if command[:3] == ["python3", "-m", "venv"]]
    assert command[3:6] == ["--python", f"{venv}/bin/python", "install"]
    assert {"--no-deps", "--require-hashes", "--no-cache-dir"} <= set(command)
    assert command[-2:] == ["-r", target]
    assert all(word.startswith("--") for word in command[6:-2])
    assert environment()["PATH"].split(":")[0] == f"{venv}/bin"
    (compiled,) = [command for command in COMMANDS if command[:3] == ["python3", "-m", "compileall"]]
    assert compiled[-3:] == ["--invalidation-mode", "unchecked-hash", f"{venv}/lib"]


def test_any_user_can_run_it_on_a_mounted_checkout() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", arguments("USER")[-1])
    assert not [name for name, _ in LINES[LINES.index(("USER", arguments("USER")[-1])) :] if name == "RUN"]
    variables = environment()
    assert variables["HOME"] == "/tmp"  # noqa: S108 - of the container, which everybody can write
    assert variables["USER"]
    assert ["git", "config", "--system", "--add", "safe.directory", "*"] in COMMANDS
    volumes = arguments("VOLUME")[-1].split()
    assert ["mkdir", "--mode=1777", "/cache", *volumes] in COMMANDS
    assert volumes == ["/cache/dvc", variables["FLATMIN_CACHE"]]
    assert all(variables[name].startswith(f"{volumes[1]}/") for name in ("KERAS_HOME", "TFDS_DATA_DIR"))
    (settings,) = [command[1] for command in COMMANDS if command[0] == "printf"]
    assert settings.endswith(f"dir = {volumes[0]}\\n")


def test_it_asks_for_gpus_and_runs_the_pipeline() -> None:
    assert environment()["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert environment()["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert json.loads(arguments("ENTRYPOINT")[-1]) == ["dumb-init", "--rewrite", "15:2", "--"]
    assert json.loads(arguments("CMD")[-1]) == ["dvc", "repro"]


def test_it_says_what_it_is() -> None:
    (text,) = arguments("LABEL")
    labels = dict(word.split("=", 1) for word in shlex.split(text))
    prefix = "org.opencontainers.image."
    assert {name.removeprefix(prefix) for name in labels} == {
        "title",
        "description",
        "licenses",
        "base.name",
        "revision",
    }
    assert labels[f"{prefix}licenses"] in (ROOT / "pyproject.toml").read_text()


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A container engine that prints its arguments, one a line, and exits with 7."""
    path = tmp_path / "engine"
    path.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 7\n")
    path.chmod(0o755)
    return path


def container(engine: Path, *command: str, **variables: str) -> list[str]:
    done = subprocess.run(
        [ROOT / "scripts/container.sh", *command],
        env={**os.environ, "ENGINE": str(engine), **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr  # the engine's own
    return done.stdout.splitlines()


def values(words: list[str], option: str) -> list[str]:
    return [value for name, value in itertools.pairwise(words) if name == option]


def test_commands_run_on_this_checkout_as_the_caller(engine: Path) -> None:
    words = container(engine, "sh", "-c", "echo 'a  b'", IMAGE="some-image")
    assert words[-4:] == ["some-image", "sh", "-c", "echo 'a  b'"]
    assert words[:2] == ["run", "--rm"]
    assert values(words, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert "--tty" not in words
    assert values(words, "--volume") == [
        f"{ROOT}:{arguments('WORKDIR')[-1]}",
        "flatmin-dvc:/cache/dvc",
        f"flatmin-cache:{environment()['FLATMIN_CACHE']}",
    ]


def test_names_and_options_come_from_the_environment(engine: Path) -> None:
    words = container(engine, "true", VOLUMES="other", OPTIONS="--user 5:6 --read-only")
    assert values(words, "--volume")[1:] == ["other-dvc:/cache/dvc", "other-cache:/cache/flatmin"]
    assert values(words, "--user")[-1] == "5:6"  # the last one holds
    assert "--read-only" in words
    assert words[-2:] == ["flatmin", "true"]


def test_credentials_of_the_environment_are_passed_by_name_alone(engine: Path) -> None:
    secret = "a-secret-that-nobody-else-says"  # noqa: S105
    words = container(engine, "true", AWS_SECRET_ACCESS_KEY=secret)
    assert "AWS_SECRET_ACCESS_KEY" in values(words, "--env")
    assert not [word for word in words if secret in word]


def test_compose_runs_what_the_script_runs(engine: Path) -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    words = container(engine, "true")
    assert set(compose["services"]) == set(LOCKS)
    for name, service in compose["services"].items():
        assert service["profiles"] == [name]
        assert service["build"] == {"context": ".", "args": {"LOCK": name}}
        assert service["user"].startswith("${FLATMIN_USER:?")
        for volume in service["volumes"]:
            source, target = volume.split(":")
            source = str(ROOT) if source == "." else compose["volumes"][source]["name"]
            assert f"{source}:{target}" in words
        assert sorted(service["environment"]) == sorted(name for name in values(words, "--env") if "=" not in name)
    (device,) = compose["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert "deploy" not in compose["services"]["cpu"]


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.parametrize("target", ["image", "docker-repro", "docker-shell"])
def test_make_builds_and_runs_the_image_that_compose_names(target: str, name: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    done = subprocess.run(
        ["make", "--dry-run", target, f"LOCK={name}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    image = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"][name]["image"]
    assert f"build --tag {image} --build-arg LOCK={name} " in done.stdout
    assert (f"IMAGE={image} scripts/container.sh " in done.stdout) == (target != "image")


def tools(folder: Path, *names: str, **scripts: str) -> dict[str, str]:
    """An environment where nothing is on PATH but the tools named and the scripts given."""
    folder.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder), "HOME": str(folder)}


def test_no_engine_is_said_in_one_line_and_is_no_failure_of_ci(tmp_path: Path) -> None:
    environment = tools(
        tmp_path / "bin", "sh", "dirname", "date", "mkdir", "cat", "tail", id="echo 1000", make='echo "made $*"'
    )
    done = subprocess.run([ROOT / ".ci/run"], env=environment, capture_output=True, text=True, check=True)
    made, left_out = done.stdout.splitlines()
    assert made == "made test"
    assert left_out.startswith("make image-test left out: no container engine here: podman, runc and debootstrap")
    assert not done.stderr


def test_ci_fails_with_the_image_test(tmp_path: Path) -> None:
    everything = dict.fromkeys(("podman", "runc", "debootstrap"), "exit 0")
    failing = 'echo "made $*"; test "$*" = test'
    environment = tools(tmp_path / "bin", "sh", "dirname", "date", "mkdir", "cat", "tail", make=failing, **everything)
    done = subprocess.run([ROOT / ".ci/run"], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["made test", "made image-test"]
    assert done.returncode != 0


def test_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("there is no shellcheck")
    scripts = [*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci/run"]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_check_cuda_asks_tensorflow_for_the_libraries() -> None:
    """In an environment of the cpu lock they are missing, which it says; in one of the gpu lock none is."""
    done = subprocess.run([sys.executable, ROOT / "scripts/check_cuda.py"], capture_output=True, text=True, check=False)
    *rows, summary = done.stdout.splitlines()
    for name in ("libcudart.so.12", "libcudnn.so.9", "libcublas.so.12", "libcufft.so.11", "libcusolver.so.11"):
        assert any(row.startswith(f"{name} ") and row.endswith("by TensorFlow") for row in rows), done.stdout
    missing = [row.split()[0] for row in rows if " MISSING " in row]
    assert done.returncode == (1 if missing else 0)
    assert summary.endswith(f" {len(rows)} files, {len(missing)} missing")
    assert "libcuda.so.1" not in missing


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_pins_every_package_by_hash(name: str) -> None:
    packages = lock(name)
    assert packages["tensorflow"][0] == "2.21.0"
    assert "opencv-python-headless" in packages
    assert "opencv-python" not in packages
    text = (ROOT / f"requirements/{name}.txt").read_text()
    assert not re.search(r"https?:|://|^\s*-", re.sub(r"^\s*--hash=", "", text, flags=re.MULTILINE), re.MULTILINE)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_what_is_asked_for_by_name(name: str) -> None:
    wanted = (ROOT / f"requirements/{name}.in").read_text() + (ROOT / "requirements/common.in").read_text()
    packages = lock(name)
    for line in wanted.splitlines():
        found = re.match(r"([A-Za-z0-9.-]+)(?:\[[a-z-]+\])?(?:==(\S+))?", line)
        if found and not line.startswith(("#", "-")):
            package = found[1].lower()
            assert package in packages, line
            assert found[2] in (None, packages[package][0]), line


def test_the_locks_differ_in_the_cuda_wheels_alone() -> None:
    cpu, gpu = lock("cpu"), lock("gpu")
    assert {name: cpu[name] for name in cpu} == {name: gpu[name] for name in cpu if name in gpu}
    extra = set(gpu) - set(cpu)
    assert extra
    assert all(name.startswith("nvidia-") for name in extra)
    assert {"nvidia-cudnn-cu12", "nvidia-cuda-runtime-cu12", "nvidia-nccl-cu12"} <= extra
