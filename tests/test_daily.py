"""Daily use: `make repro`, the environment and clones, in the cases that docs/daily.md names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import toy
from repository import ROOT, TINY, Repository, stages_run

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make, as in the image")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return toy.repository(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def checkout(finished: Repository, tmp_path: Path) -> Repository:
    """A finished study of arithmetic, with an environment of its own that has the packages of this one."""
    checkout = toy.duplicate(finished, tmp_path / "study")
    environment = checkout.folder / ".venv"
    venv.create(environment, symlinks=True)
    packages = environment / "lib/python3.11/site-packages/packages.pth"
    packages.write_text(sysconfig.get_path("purelib") + "\n")
    dvc = Path(sys.executable).with_name("dvc").read_text().partition("\n")[2]
    for name, text in (("bin/dvc", f"#!{environment}/bin/python\n{dvc}"), ("cpu.done", ""), ("bin/flatmin", "")):
        (environment / name).write_text(text)
        (environment / name).chmod(0o755)
    checkout.variables |= {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "MAKELEVEL": "",  # make may run these tests
        "MAKEFLAGS": "",
    }
    return checkout


@pytest.mark.slow
@needs_make
def test_make_repro_names_what_to_commit_and_nothing_once_it_is(checkout: Repository) -> None:
    checkout.write_params(TINY | {"data": TINY["data"] | {"seed": 8}})
    with (checkout.folder / "src/flatmin/inputs/batches.py").open("a") as file:
        file.write("# an edit\n")
    (checkout.folder / "metrics/größe 1.json").write_text("{}")
    output = checkout.run("make", "repro")
    assert stages_run(output) == ["count", "train"]
    *_, last = output.splitlines()
    assert last == "to keep this result: git add dvc.lock metrics params.yaml src && git commit"
    checkout.run("sh", "-c", last.partition(": ")[2] + " --quiet --message result")
    assert checkout.run("git", "status", "--porcelain") == ""
    assert "to keep" not in checkout.run("make", "repro")


@pytest.mark.slow
@needs_make
def test_dvc_of_an_environment_that_is_not_activated_runs_the_stages_in_it(checkout: Repository) -> None:
    checkout.run("make", "setup")
    assert stages_run(checkout.run(".venv/bin/dvc", "repro", "--force", "count")) == ["count"]
    assert checkout.run("git", "status", "--porcelain") == ""


@needs_make
@pytest.mark.parametrize("move", [shutil.move, partial(shutil.copytree, symlinks=True)])
def test_make_setup_in_a_moved_or_copied_checkout_says_what_to_do(
    checkout: Repository, tmp_path: Path, move: Callable[[Path, Path], object]
) -> None:
    move(checkout.folder.parent, tmp_path / "moved")
    moved = Repository.existing(tmp_path / "moved")
    moved.variables = checkout.variables
    output = moved.run("make", "setup", expect=2)
    expected = f"expected an environment that was made here, received that of {checkout.folder}/.venv"
    assert f"error: .venv: {expected}: remove .venv and run make again\n" in output


def test_clone_for_windows_has_the_same_bytes(finished: Repository, tmp_path: Path) -> None:
    finished.run("git", "clone", "--quiet", "--config", "core.autocrlf=true", ".", str(tmp_path / "clone"))
    for name in finished.run("git", "ls-files").splitlines():
        assert (tmp_path / "clone" / name).read_bytes() == (finished.folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "command",
    [
        "sh scripts/study.sh digits",
        pytest.param("python scripts/sweep.py studies/digits/sweep.yaml", marks=pytest.mark.slow),
    ],
)
def test_study_and_sweep_where_dvc_cannot_clone_are_refused_in_one_line(tmp_path: Path, command: str) -> None:
    folder = tmp_path / "tést"
    folder.mkdir()
    program, script, name = command.split()
    path = shutil.which(program)
    assert path
    done = subprocess.run([path, ROOT / script, name], cwd=folder, capture_output=True, encoding="utf-8", check=False)
    expected = f"error: {folder}: expected a path in ASCII, since DVC can't configure a clone elsewhere"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{expected}; move the checkout\n"
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_plots_page_says_where_the_curves_are_without_the_internet(finished: Repository, tmp_path: Path) -> None:
    plot = tmp_path / "curve.csv"
    plot.write_text("epoch,loss\n1,2\n2,1\n")
    finished.run("dvc", "plots", "show", str(plot), "--out", str(tmp_path / "drawn"))
    page = (tmp_path / "drawn/index.html").read_text()
    before, _, after = page.partition('if (typeof vegaEmbed === "undefined")')
    assert "/vega-embed@" in before, "what is missing without the internet"
    assert "<code>report/index.html</code>" in after.partition("</script>")[0]
    assert "vegaEmbed(" in after, "the chart itself"
