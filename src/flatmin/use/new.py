"""Writes the params of a new study for a folder or table of pictures, and says what it will take."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from flatmin.common import console, files, params
from flatmin.common.errors import InputError
from flatmin.common.params import largest_image_size
from flatmin.common.params_errors import read_yaml
from flatmin.images import Stored
from flatmin.use import check, estimate, recipe, survey
from flatmin.use.estimate import Sample
from flatmin.use.survey import Survey

_BACKBONES = ["EfficientNetLite0", "EfficientNetLite1"]
_LONG = 1.8  # a picture's longer side over its shorter one, from which on `squash` spoils it
_SMALL = 32  # pixels


def new(name: str, values: dict[str, Any], to: Path | None, imported: float) -> None:
    """Look at the data, write params, time a few pictures and steps.

    Args:
        name: of the study.
        values: source, name and columns of the `data` section.
        to: the file to write; None for the study's in this checkout.
        imported: the seconds that importing TensorFlow took.

    Raises:
        InputError: the data cannot be used, `to` is there already, or this is no checkout.
    """
    path = to or _path(name)
    if path.exists():
        raise InputError(f"{path}: expected no such file yet, found one")
    values = values | {"name": os.path.abspath(os.path.expanduser(values["name"]))}  # a study runs in a clone
    data = recipe.data_section(values, survey.split_sizes(params.Data.model_validate(values | {"val_fraction": 0.2})))
    found = survey.survey(data)
    check.tell(data, found)
    as_they_are = estimate.read_sample(found, Stored(), data.max_pixels)
    if not as_they_are.examples:
        raise InputError(f"data.name: expected images that can be read, received {as_they_are.broken[0]}")
    for line in _odd(as_they_are):
        console.log(f"note: {line}")
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    side = as_they_are.side
    chosen = recipe.sizes(found.total("train"), side, has_gpu)
    fit = "pad" if np.median(as_they_are.proportions) >= _LONG else "squash"
    counts = f"{len(found.class_names)} classes, {_counts(found)}"
    text = recipe.text(data, chosen, _BACKBONES, path=path, counts=counts, side=side, fit=fit)
    with files.atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        settings = params.parse(read_yaml(temporary), str(path))
    console.log(f"{path}: written; read its comments, then {_command(name, path, to)}")
    console.log(f"timing {len(as_they_are.examples)} images and {estimate.STEPS} steps ...")
    console.log(f"{_command(name, path, to)}: {expected(settings, found, imported).describe()}")


def expected(settings: params.Params, found: Survey, imported: float) -> estimate.Estimate:
    """What a study of these params will take here."""
    largest = largest_image_size(settings.backbones, settings.extract.image_size, settings.finetune.image_size)
    stored = Stored.by_setting(settings.data.image_size, largest)
    sample = estimate.read_sample(found, stored, settings.data.max_pixels)
    timings = estimate.measure(settings, sample, found.class_names, imported)
    return estimate.estimate(settings, found, sample, timings)


def _path(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise InputError(f"NAME: expected letters, digits, '.', '_' and '-', received {name!r}")
    if not Path("dvc.yaml").is_file() or not Path("studies").is_dir():
        raise InputError(f"studies/{name}: expected to be in a checkout of Flatmin, which this is not; see --to")
    return Path("studies", name, "params.yaml")


def _command(name: str, path: Path, to: Path | None) -> str:
    return f"make study NAME={name}" if to is None else f"a study of {path}"


def _counts(found: Survey) -> str:
    return ", ".join(f"{found.total(role):,} {role}" for role in found.counts)


def _odd(sample: Sample) -> list[str]:
    """What pictures tell once they are read."""
    odd = []
    count = len(sample.examples)
    if sample.broken:
        odd.append(
            f"{len(sample.broken)} of {count + len(sample.broken)} images cannot be read, such as {sample.broken[0]}"
        )
    if sample.side < _SMALL:
        odd.append(f"images are small: half of {count} have a shorter side of at most {sample.side} pixels")
    if (long := int((sample.proportions >= _LONG).sum())) > count // 10:
        odd.append(f"{long} of {count} images are at least {_LONG} times as long as wide, or as wide as long")
    if any(picture.dark for _, picture in sample.examples):
        odd.append("some images of 16 bits use less than a quarter of their range, and are dark for it")
    if any(picture.frames for _, picture in sample.examples):
        odd.append("some files have several frames or pages, of which the first is taken")
    free = shutil.disk_usage(Path.cwd()).free
    if free < 10**10:
        odd.append(f"the disk has {free / 1e9:.1f} GB left")
    return odd
