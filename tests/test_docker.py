"""What holds of the image without a container engine: `make image-test` shows the rest.

The Dockerfile, .dockerignore and the locks are read line by line: what they name is there, and nothing else gets in.
The scripts run with an engine that prints its arguments.
"""

from __future__ import annotations

import itertools
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from fnmatch import fnmatchcase
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import yaml
from repository import ROOT, Repository

sys.path.insert(0, str(ROOT / "scripts"))
import check_cuda

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


def test_an_image_test_that_is_stopped_leaves_nothing_running(tmp_path: Path) -> None:
    repository = Repository(tmp_path)
    for name in ("metrics/a", "plots/a", "dvc.lock"):
        (repository.folder / name).parent.mkdir(exist_ok=True)
        (repository.folder / name).touch()
    stage = tmp_path / "stage"
    scripts = {
        ".venv/bin/dvc": f"sleep 60 & echo $! >{stage}; wait",
        "scripts/podman.sh": f'if [ "$1" = build ]; then until [ -s {stage} ]; do sleep 0.1; done; exit 1; fi',
    }
    for name, text in scripts.items():
        (repository.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (repository.folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (repository.folder / name).chmod(0o755)
    repository.commit("an engine that fails when a stage is there")
    output = repository.run("scripts/image_test.sh", expect=1)
    assert "FAILED: the build" in output
    until = time.monotonic() + 10
    while Path(f"/proc/{stage.read_text().strip()}").exists():
        assert time.monotonic() < until, "the stage goes on"
        time.sleep(0.1)


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
    (tmp_path / "checkout/scripts").mkdir(parents=True)
    shutil.copy2(ROOT / "scripts/container.sh", tmp_path / "checkout/scripts")
    return path


def container(engine: Path, *command: str, keys: int = subprocess.DEVNULL, **variables: str) -> list[str]:
    """What the engine is given for a checkout beside it, with `keys` as the script's input."""
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


def test_commands_run_on_this_checkout_as_the_caller(engine: Path) -> None:
    words = container(engine, "sh", "-c", "echo 'a  b'", IMAGE="some-image")
    assert words[-4:] == ["some-image", "sh", "-c", "echo 'a  b'"]
    assert words[:2] == ["run", "--rm"]
    assert values(words, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert "--tty" not in words
    assert values(words, "--volume") == [
        f"{engine.parent}/checkout:{arguments('WORKDIR')[-1]}",
        "flatmin-dvc:/cache/dvc",
        f"flatmin-cache:{environment()['FLATMIN_CACHE']}",
    ]


def test_names_and_options_come_from_the_environment(engine: Path) -> None:
    words = container(engine, "true", VOLUMES="other", OPTIONS="--user 5:6 --read-only")
    assert values(words, "--volume")[1:] == ["other-dvc:/cache/dvc", "other-cache:/cache/flatmin"]
    assert values(words, "--user")[-1] == "5:6"  # the last one holds
    assert "--read-only" in words
    assert words[-2:] == ["flatmin", "true"]


def test_another_folder_on_cdpath_is_not_mounted(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    words = container(engine, "true", CDPATH=str(tmp_path))
    assert values(words, "--volume")[0].startswith(f"{tmp_path}/checkout:")


def test_what_is_piped_in_is_passed_on_and_a_terminal_whose_output_goes_elsewhere_is_not(engine: Path) -> None:
    assert "--interactive" in container(engine, "cat")
    ours, theirs = pty.openpty()
    try:
        assert "--interactive" not in container(engine, "cat", keys=theirs)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(("name", "user", "kept"), [("podman", 1000, True), ("podman", 0, False), ("docker", 5, False)])
def test_podman_without_root_keeps_the_callers_number(engine: Path, name: str, user: int, kept: bool) -> None:
    engine.rename(engine.with_name(name))
    fake = tools(engine.parent / "bin", id=f"echo {user}")["PATH"]
    words = container(engine.with_name(name), "true", PATH=f"{fake}{os.pathsep}{os.environ['PATH']}")
    assert values(words, "--user") == [f"{user}:{user}"]
    assert ("--userns=keep-id" in words) == kept


@pytest.mark.parametrize(("folder", "message"), [("a:b", "a path without ':'"), ("tree", "a clone's folder")])
def test_a_checkout_that_cannot_be_mounted_is_refused_in_one_line(tmp_path: Path, folder: str, message: str) -> None:
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


def test_credentials_of_the_environment_are_passed_by_name_alone(engine: Path) -> None:
    secret = "a-secret-that-nobody-else-says"  # noqa: S105
    words = container(engine, "true", AWS_SECRET_ACCESS_KEY=secret)
    assert "AWS_SECRET_ACCESS_KEY" in values(words, "--env")
    assert not [word for word in words if secret in word]


def test_compose_runs_what_the_script_runs(engine: Path) -> None:
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    words = container(engine, "true", VOLUMES="other")
    assert set(compose["services"]) == set(LOCKS)
    for name, service in compose["services"].items():
        assert service["profiles"] == [name]
        assert service["build"] == {"context": ".", "args": {"LOCK": name}}
        assert service["user"].startswith("${FLATMIN_USER:?")
        for volume in service["volumes"]:
            source, target = volume.split(":")
            host = f"{engine.parent}/checkout" if source == "." else compose["volumes"][source]["name"]
            assert f"{host.replace('${VOLUMES:-flatmin}', 'other')}:{target}" in words
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
    chosen = {**os.environ, "LOCK": name, "ENGINE": "podman"}
    again = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, env=chosen, capture_output=True, text=True, check=True
    )
    assert again.stdout == done.stdout.replace("docker build", "podman build").replace("ENGINE=docker", "ENGINE=podman")


def tools(folder: Path, *names: str, **scripts: str) -> dict[str, str]:
    """An environment where nothing is on PATH but the tools named and the scripts given."""
    folder.mkdir()
    for name in set(names) - set(scripts):  # a script written to a link would replace the tool
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


APT = 'Acquire::https::Proxy "http://user:secret@proxy/";\nAcquire::Retries "3";\nDpkg::Lock "1";'
TREE = 'for folder in etc/apt etc/dpkg/dpkg.cfg.d usr/share/doc; do mkdir -p "$3/$folder"; done'


def podman(folder: Path, command: str, failing: str = "none", **scripts: str) -> tuple[int, list[str], str]:
    """podman.sh where the machine's tools are scripts: exit code, podman's commands, standard error."""
    calls = folder / "calls"
    calls.touch()
    fakes = {
        "podman": f"""echo "$*" >>{calls}; case "$1 $2" in "image exists" | "{failing} "*) exit 1 ;; esac
        if [ "$1" = import ]; then cp "$2" {folder}/base.tar; fi""",
        "runc": "",
        "debootstrap": TREE,
        "apt-get": "echo 'deb http://archive bookworm main'",
        "apt-config": f"echo '{APT}'",
        "python3": "",
        **scripts,
    }
    names = ("sh", "mkdir", "cat", "tail", "rm", "grep", "sort", "tar", "sed", "head", "cp")
    environment = tools(folder / "bin", *names, **fakes)
    done = subprocess.run(
        [ROOT / "scripts/podman.sh", command], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, calls.read_text().splitlines(), done.stderr


def test_a_base_image_is_made_where_there_is_none_and_has_no_setting_of_this_machines_apt(tmp_path: Path) -> None:
    assert podman(tmp_path, "ready")[0] == 0
    with tarfile.open(tmp_path / "base.tar") as tree:
        members = {Path(member.name).name: tree.extractfile(member) for member in tree if member.isfile()}
        files = {name: file.read().decode() for name, file in members.items() if file}
    assert files["sources.list"] == "deb http://archive bookworm main\n"
    assert not [name for name, text in files.items() if "secret" in text]


def test_a_build_gets_apts_settings_by_a_mount(tmp_path: Path) -> None:
    code, (build,), _ = podman(tmp_path, "build")
    (kept,) = re.findall(r"--volume (\S+):/etc/apt/apt.conf.d/90machine:ro ", build)
    assert Path(kept).read_text().splitlines() == APT.splitlines()[:2]
    assert (code, "secret" in build) == (0, False)


@pytest.mark.parametrize("tool", ["debootstrap", "tar"])
def test_a_base_image_that_could_not_be_made_is_not_kept(tmp_path: Path, tool: str) -> None:
    code, calls, told = podman(tmp_path, "ready", **{tool: f"echo no {tool}; exit 3"})
    assert (code, told) == (1, f"no container engine here: no {tool}\n")
    assert [call.split()[:2] for call in calls] == [["image", "exists"]]


def test_a_base_image_that_does_not_start_is_removed(tmp_path: Path) -> None:
    code, calls, _ = podman(tmp_path, "ready", failing="run")
    assert code == 1
    assert calls[-1].startswith("image rm ")
    assert calls[-1].split()[-1] == calls[0].split()[-1]


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
    assert done.returncode == (1 if missing or " 0 libraries" in summary else 0)
    assert summary.endswith(f" {len(rows)} files, {len(missing)} missing")
    assert "libcuda.so.1" not in missing


@pytest.mark.parametrize(("openers", "wheel"), [([], True), (["open"], False), (["open"], True)])
def test_check_cuda_does_not_pass_on_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, openers: list[str], wheel: bool
) -> None:
    files = ["cuda_nvcc/bin/ptxas", "cuda_nvcc/nvvm/libdevice/libdevice.10.bc", *["a/lib/liba.so"] * wheel]
    for name in files:
        (tmp_path / "nvidia" / name).parent.mkdir(parents=True)
        (tmp_path / "nvidia" / name).touch()
    spec = ModuleSpec("tensorflow", None, origin=str(tmp_path / "tensorflow/__init__.py"))
    fakes = {"find_spec": spec, "tensorflow_openers": openers, "opened": {}, "needed": {}}
    for name, value in fakes.items():
        monkeypatch.setattr(check_cuda, name, lambda *_, value=value: value)
    if openers and wheel:
        assert check_cuda.main() == 0
    else:
        with pytest.raises(SystemExit, match=r"^error: expected functions of TensorFlow's and libraries"):
            check_cuda.main()


def test_check_cuda_says_which_function_could_not_be_called() -> None:
    with pytest.raises(SystemExit, match=r"^error: nothing: expected exit code 0, received 1$"):
        check_cuda.opened(Path("no library"), "nothing")


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
