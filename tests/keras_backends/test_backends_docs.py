"""The examples of pages and docstrings run on the backend that runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
from sam_networks import BACKEND

ROOT = Path(__file__).parents[2]
PAGES = ("sam", "moving", "sharpness")
IMPORTS = {"tensorflow": "import tensorflow", "jax": "import jax", "torch": "import torch"}
EXAMPLES = [
    pytest.param(code, id=f"{page}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / f"docs/{page}.md").read_text(), re.DOTALL))
    if not any(f"\n{line}" in f"\n{code}" for name, line in IMPORTS.items() if name != BACKEND)
]


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES)
def test_example_of_a_page_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})  # noqa: S102 - of our own page
    assert not re.search(r"\.save\(|ModelCheckpoint", code) or list(tmp_path.glob("*.keras"))


@pytest.mark.parametrize("module", ["flatmin.sam.step", "flatmin.sam.keras_model"])
def test_examples_of_docstrings_give_what_they_say(module: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module))
    assert tried > 5
    assert failed == 0


@pytest.mark.parametrize("name", ["sam", "sharpness"])
def test_package_is_typed_and_names_what_is_public(name: str) -> None:
    package = importlib.import_module(f"flatmin.{name}")
    assert (ROOT / f"src/flatmin/{name}/py.typed").exists()
    assert all(getattr(package, each) is not None for each in package.__all__)
