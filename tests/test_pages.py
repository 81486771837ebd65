"""The pages: their generated blocks, their commands and examples, and the notebook."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
from fixtures import picture_folder, random_images, tiny_classifier
from pictures import write_picture
from PIL import Image
from repository import ROOT, Repository

from flatmin import cli
from flatmin.common.errors import InputError
from flatmin.models import classifier

sys.path.insert(0, str(ROOT / "scripts"))
from blocks import BLOCK, fill

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("studies/*/*.md"))]


def blocks(page: Path | str, language: str) -> list[str]:
    """Return the code of a page in this language, block by block."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def flatmin_commands(text: str) -> list[str]:
    """The lines that run `flatmin`, alone or at the end of a pipe, but for exports, which have tests of their own."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if re.match(r"flatmin (?!export)|find .*\| flatmin ", line)]


# A page may repeat another one's command, which runs once.
COMMANDS = list(
    dict.fromkeys(
        line.partition(" #")[0].strip()
        for page in PAGES
        for block in blocks(page, "sh")
        for line in flatmin_commands(block)
    )
)


@pytest.mark.slow
def test_docs_leave_no_difference_in_git(tmp_path: Path) -> None:
    """Where this fails, `make docs` mends the pages. PNGs are left out: their bytes follow the machine's libraries."""
    repository = Repository(tmp_path)
    shutil.copytree(ROOT / "metrics", repository.folder / "metrics")
    repository.commit("metrics")
    recipe = (ROOT / "Makefile").read_text().partition("\ndocs: ")[2].partition("\n\n")[0]
    scripts = re.findall(r"\$\(RUN\) python (\S+)", recipe)
    assert "scripts/pages.py" in scripts
    for page in (
        path for pattern in ("*.md", "docs/*.md", "studies/*/*.md") for path in repository.folder.glob(pattern)
    ):
        page.write_text(BLOCK.sub(r"<!-- begin \1 -->\n<!-- end \1 -->\n", page.read_text()))
    assert len(repository.run("git", "diff", "--name-only").split()) > 5
    for script in scripts:
        repository.run("python", script)
    assert repository.run("git", "status", "--short", "--", ".", ":!*.png") == ""
    for name in ("accuracy", "differences"):
        assert ElementTree.parse(ROOT / f"docs/{name}.svg").getroot().tag.endswith("svg")  # noqa: S314 - our own


@pytest.mark.parametrize(
    ("text", "found"),
    [("", ""), ("<!-- begin one -->\n", ""), ("<!-- begin one -->\n<!-- end one -->\n" * 2, "one, one")],
)
def test_fill_page_without_its_blocks_is_refused_and_not_written(tmp_path: Path, text: str, found: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(InputError, match=f"page.md: expected the blocks one, once each and ended, found {found}$"):
        fill(page, {"one": "new\n"})
    assert page.read_text() == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_names_targets_and_scripts_that_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join([*blocks(page, "sh"), *re.findall(r"`(make [^`]+)`", page.read_text())])
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= targets
    for name in re.findall(r"(?:scripts|bench|stages)/\w+\.(?:py|sh)\b", code):
        assert (ROOT / name).is_file(), name


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
    for name in ("rose.jpg", "tulip.png", "cat.jpg"):
        Image.new("RGB", (40, 30), (200, len(name), 30)).save(checkout / name)
    program = folder / "bin/flatmin"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m flatmin.cli "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.mark.slow
def test_flatmin_commands_of_the_pages_run(workspace: Path) -> None:
    assert len(COMMANDS) >= 8
    checkout = workspace / "checkout"
    environment = os.environ | {
        "HOME": str(workspace),
        "PATH": f"{workspace}/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH")))),
        "FLATMIN_CACHE": str(workspace / "cache"),
    }
    for command in COMMANDS:
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
    found = flatmin_commands(capsys.readouterr().out)
    assert found
    for command in found:
        arguments = re.sub(r"^.*\| | > .*$", "", command).replace("'", "").split()[1:]
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 1, command


@pytest.mark.slow
def test_use_page_example_classifies_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("docs/use.md", "python")
    monkeypatch.chdir(tmp_path)
    model = tiny_classifier()
    model.save("models/final")
    (pixels,) = random_images(1, 32, seed=1)
    Image.fromarray(pixels).save("picture.png")
    label, layers = run_python(code, tmp_path).splitlines()
    logits = model.network(pixels[None].astype(np.float32)).numpy()
    assert label == ["cat", "dog"][int(logits.argmax())]
    assert "block5a_expand_conv" in layers
    exported = keras.models.load_model("final.keras")
    np.testing.assert_array_equal(exported(pixels[None].astype(np.float32)), logits)


# What the README's example leaves to the reader.
YOURS = """
import keras, numpy as np
network = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2, "softmax")])
images, labels = np.ones((16, 8), "float32"), np.zeros(16, "int32")
"""
EXAMPLES = [YOURS + code for code in blocks("README.md", "python")]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_sam_examples_run(number: int, tmp_path: Path) -> None:
    run_python(EXAMPLES[number], tmp_path)
    if ".save(" in EXAMPLES[number]:
        assert list(tmp_path.glob("*.keras"))


def run_python(code: str, folder: Path) -> str:
    """Run a page's code in a process of its own, where Keras' warnings are errors."""
    (folder / "example.py").write_text(code)
    command = [sys.executable, "-W", "error::UserWarning", "example.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
