"""Classifies pictures: class, calibrated probability, the most probable classes."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.special

from flatmin import runtime
from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime
from flatmin.models import classifier
from flatmin.models.classifier import Classifier
from flatmin.use import pictures
from flatmin.use.pictures import Picture

_BATCH_VALUES = 2**23  # of a batch; 55 pictures of 224 x 224
_LARGEST_BATCH = 32


class Prediction(NamedTuple):
    """What a classifier says of a picture.

    Attributes:
        path: of the picture.
        answer: the class; None where its probability is too low.
        top: the most probable classes with their probabilities, the first one first.
    """

    path: str
    answer: str | None
    top: list[tuple[str, float]]


def predict(names: Sequence[str], model: Path, *, form: str, top: int, abstain_below: float) -> None:
    """Write a line for each picture to standard output as soon as its batch is done, broken ones to standard error.

    Args:
        names: pictures, folders, `-`.
        model: a classifier's folder.
        form: `table`, `csv` or `jsonl`.
        top: the number of classes to write.
        abstain_below: the smallest probability of an answer.

    Raises:
        InputError: the model cannot be used, `top` is too large, there are no pictures, or some are broken; the others
            are predicted then.
    """
    description = classifier.describe(model)
    if top > len(description.class_names):
        raise InputError(f"--top: expected at most {len(description.class_names)}, the model's classes, received {top}")
    paths, total = pictures.find(names)
    loaded = load(model)
    if not sys.stdout.isatty():
        paths = console.progress(paths, "predict", total, "image")
    broken: list[str] = []
    read = _without_broken(pictures.read_all(paths, description), broken)
    count = 0
    writer = _WRITERS[form](description.class_names, top)
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]  # names of files
    try:
        print(writer.header, end="")
        for prediction in _predictions(loaded, read, top, abstain_below):
            count += 1
            print(writer.line(prediction), end="", flush=True)
    except BrokenPipeError:  # whoever reads it has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if broken:
        raise InputError(f"expected images that can be read, received {len(broken)} of {count + len(broken)} broken")


def load(model: Path) -> Classifier:
    """Load a classifier, to compute as evaluate does."""
    runtime.configure(Runtime(), 0)
    loaded = classifier.load(model)
    if loaded.description.temperature is None:
        print(f"{model}: not calibrated, since finalize did not release it", file=sys.stderr)
    return loaded


def probabilities(model: Classifier, pixels: np.ndarray) -> np.ndarray:
    """The calibrated probabilities, float64 [batch, classes], of uint8 [batch, size, size, 3]."""
    logits = model.logits_of(pixels.astype(np.float32)).astype(np.float64) / (model.description.temperature or 1)
    found: np.ndarray = scipy.special.softmax(logits, axis=1)
    return found


def _without_broken(read: Iterable[Picture], broken: list[str]) -> Iterator[Picture]:
    for picture in read:
        if picture.pixels is None:
            print(f"{pictures.shown(picture.path)}: {picture.reason}", file=sys.stderr)
            broken.append(picture.path)
        else:
            yield picture


def _predictions(model: Classifier, read: Iterator[Picture], top: int, abstain_below: float) -> Iterator[Prediction]:
    size = min(_LARGEST_BATCH, max(1, _BATCH_VALUES // (3 * model.description.image_size**2)))
    names = model.description.class_names
    while batch := list(itertools.islice(read, size)):
        found = probabilities(model, np.stack([picture.pixels for picture in batch if picture.pixels is not None]))
        order = np.argsort(-found, axis=1, kind="stable")[:, :top]  # of equals the first, as argmax
        for picture, row, best in zip(batch, found, order.tolist(), strict=True):
            ranked = [(names[label], float(row[label])) for label in best]
            yield Prediction(picture.path, ranked[0][0] if ranked[0][1] >= abstain_below else None, ranked)


class _Writer(NamedTuple):
    """How predictions are written: what comes before them, and the line of each."""

    header: str
    line: Callable[[Prediction], str]


def _table(class_names: Sequence[str], top: int) -> _Writer:
    width = min(40, max(6, *map(len, class_names)))
    header = "".join(f"{'class':<{width}}  probability  " for _ in range(top)) + "image\n"

    def line(prediction: Prediction) -> str:
        shown = [name for name, _ in prediction.top]
        shown[0] = prediction.answer or "(none)"
        cells = [f"{name:<{width}}  {each:11.4f}  " for name, (_, each) in zip(shown, prediction.top, strict=True)]
        return f"{''.join(cells)}{pictures.shown(prediction.path)}\n"

    return _Writer(header, line)


def _csv(class_names: Sequence[str], top: int) -> _Writer:
    ranks = range(1, top + 1) if top > 1 else ()
    header = ["image", "class", "probability", *(f"{name}_{rank}" for rank in ranks for name in ("top", "probability"))]

    def line(prediction: Prediction) -> str:
        ranked = [cell for name, each in prediction.top for cell in (name, _rounded(each))] if ranks else []
        return _csv_line([prediction.path, prediction.answer or "", _rounded(prediction.top[0][1]), *ranked])

    return _Writer(_csv_line(header), line)


def _csv_line(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _jsonl(class_names: Sequence[str], top: int) -> _Writer:
    def line(prediction: Prediction) -> str:
        values = {
            "image": prediction.path,
            "class": prediction.answer,
            "probability": _rounded(prediction.top[0][1]),
            "top": [{"class": name, "probability": _rounded(each)} for name, each in prediction.top],
        }
        return json.dumps(values, ensure_ascii=False) + "\n"

    return _Writer("", line)


def _rounded(probability: float) -> float:
    return float(f"{probability:.6g}")


_WRITERS = {"table": _table, "csv": _csv, "jsonl": _jsonl}
