"""The commands of docs/use.md and of `flatmin --help` run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures import picture_folder
from pictures import write_picture
from PIL import Image
from repository import ROOT, Repository

from flatmin import cli
from flatmin.models import classifier


def commands(text: str) -> list[str]:
    """The lines that run `flatmin`, alone or at the end of a pipe, but for exports, which docs/export.md tells of."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if re.match(r"flatmin (?!export)|find .*\| flatmin ", line)]


IN_DOCS = commands("\n".join(re.findall(r"```sh\n(.*?)```", (ROOT / "docs/use.md").read_text(), re.DOTALL)))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a released classifier, pictures and a table where the commands look for them."""
    folder = tmp_path_factory.mktemp("docs")
    checkout = Repository(folder).folder
    picture_folder(folder / "pictures/flowers", per_class=12)
    picture_folder(folder / "pictures/new", per_class=2)
    many = []
    for index in range(12):
        for label in (0, 1):
            write_picture(checkout / f"birds/{label}-{index}.png", 10 * index + label)
            many.append(f"birds/{label}-{index}.png,b{label}")
    (checkout / "birds.csv").write_text("path,species\n" + "\n".join(many) + "\n")
    options: dict[str, Any] = {"image_size": 32, "dropout": 0.2, "seed": 1, "weights": "none"}
    classifier.create("EfficientNetLite0", ["cat", "dog", "horse"], **options).save(checkout / "models/final")
    for name in ("rose.jpg", "tulip.png", "picture.jpg", "cat.jpg", "dog.png"):
        Image.new("RGB", (40, 30), (200, len(name), 30)).save(checkout / name)
    program = folder / "bin/flatmin"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m flatmin.cli "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.mark.slow
def test_commands_of_the_page_run(workspace: Path) -> None:
    assert len(IN_DOCS) >= 8
    checkout = workspace / "checkout"
    environment = os.environ | {
        "HOME": str(workspace),
        "PATH": f"{workspace}/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))),
        "FLATMIN_CACHE": str(workspace / "cache"),
    }
    for command in IN_DOCS:
        shell = ["bash", "-o", "pipefail", "-c", command]
        done = subprocess.run(shell, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (checkout / "studies/flowers/params.yaml").is_file()
    assert (checkout / "studies/birds/params.yaml").is_file()
    assert len((checkout / "predictions.csv").read_text().splitlines()) == 7
    assert {"explained.png", "why.png"} <= {path.name for path in checkout.glob("*.png")}


@pytest.mark.parametrize("name", ["", "predict", "explain", "new", "check"])
def test_examples_of_the_help_are_usage_that_is_understood(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is nothing: they end with what is missing, and not with wrong usage."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main([*filter(None, [name]), "--help"])
    found = commands(capsys.readouterr().out)
    assert found
    for command in found:
        arguments = re.sub(r"^.*\| | > .*$", "", command).replace("'", "").split()[1:]
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 1, command
