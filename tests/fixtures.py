"""The tiny study for several test files: as params, records, a classifier and a repository in which it ran."""

from __future__ import annotations

import copy
import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from repository import TINY, Repository


def tiny_params(**changes: Any) -> dict[str, Any]:
    """Return the tiny study's params with changes; those of a section are added to it, anything else replaces.

    A section's key given as None is kept as null.
    """
    params = copy.deepcopy(TINY)
    for name, value in changes.items():
        is_section = isinstance(value, Mapping) and isinstance(params.get(name), dict)
        params[name] = {**params[name], **value} if is_section else value
    return params


# The study that the session runs once: epochs enough for a training to be killed among them.
STUDY = tiny_params(finetune={"epochs": 5})


def random_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Return uint8 noise [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def picture_folder(folder: Path, classes: int = 3, per_class: int = 20) -> Path:
    """Write pictures that are told apart by their colour, as JPEG and PNG, into a folder for each class."""
    colors = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(per_class):
            color = tuple(value - index for value in colors[label])
            picture = Image.new("RGB", (20 + index % 3, 24), color)
            picture.save(folder / f"class{label}" / f"{index}.{'png' if index % 2 else 'jpg'}")
    return folder


def tiny_records(folder: Path, **data: Any) -> Any:
    """Write the tiny study's records, with changes to its `data` section, and return their reader."""
    from flatmin.common import params
    from flatmin.data import writer
    from flatmin.inputs.records import Records

    settings = params.parse(tiny_params(data=data))
    writer.write(settings.data, folder)
    return Records(folder)


def tiny_classifier(**changes: Any) -> Any:
    """Return a classifier of two classes with random weights, for images of 32 pixels."""
    from flatmin.models import classifier

    options: dict[str, Any] = {"image_size": 32, "dropout": 0.2, "seed": 1, "weights": "none"} | changes
    return classifier.create("EfficientNetLite0", ["cat", "dog"], **options)


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the session's temporary folder, which pytest-xdist's workers have in common."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository in which STUDY ran and is committed, the same for all workers: tests only read it.

    What `dvc repro` printed is in `repro.log` beside the checkout.
    """
    folder = session_folder(tmp_path_factory) / "finished-study"
    made = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the second worker waits for the first
        if made.exists():
            return Repository.existing(folder)
        shutil.rmtree(folder, ignore_errors=True)
        repository = Repository(folder, STUDY)
        (folder / "repro.log").write_text(repository.run("dvc", "repro", "-v"))
        repository.commit("study")
        made.touch()
    return repository


@pytest.fixture
def study(finished_study: Repository, tmp_path: Path) -> Repository:
    """A copy of the finished study, DVC's cache and `$FLATMIN_CACHE` included, for a test to change."""
    folder = tmp_path / "study"
    shutil.copytree(finished_study.folder.parent, folder, symlinks=True)
    return Repository.existing(folder)
