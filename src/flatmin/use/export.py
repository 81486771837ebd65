"""Exports a released classifier, and proves on val that the file answers as the classifier does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flatmin import runtime
from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime
from flatmin.images import Stored
from flatmin.inputs.records import Records
from flatmin.models import classifier
from flatmin.models.classifier import Description
from flatmin.use import card, convert, formats, parity, runtimes

RECORDS, METRICS = Path("data/records"), Path("metrics")
PARITY, CLASSES, CARD = "parity.json", "classes.json", "README.md"
CALIBRATION = 300  # pictures of train that int8 takes its ranges from
BATCH = 32  # pictures that the trained classifier gets at a time


def export(model: Path, name: formats.Name, out: Path, *, force: bool = False) -> None:
    """Write the folder `out`: the exported file, its class names, the proof and a model card.

    Args:
        model: the folder of a released classifier.
        force: export a file too that answers more pictures otherwise than the format's limit allows.

    Raises:
        InputError: the model, the records or `out` cannot be used, or the file answers otherwise too often. Then
            nothing is written.
    """
    runtime.configure(Runtime(), 0)
    trained = classifier.load(model)
    description, form = trained.description, formats.FORMATS[name]
    records = Records(RECORDS)
    _check(model, description, records, out)
    with files.atomic_write(out) as folder:
        folder.mkdir()
        path = folder / form.file
        convert.write(trained, name, path, lambda: _sample(records, description))
        probabilities, milliseconds = runtimes.answers(name, path, RECORDS, "val", description.image_size)
        logits = _logits(trained, records) / description.temperature
        found: dict[str, Any] = {
            "format": name,
            "limit": form.limit,
            "bytes": sum(each.stat().st_size for each in (path, *path.rglob("*")) if each.is_file()),
            "milliseconds": milliseconds,
            "machine": ", ".join(runtime.machine()[:2]),
            "versions": runtimes.versions(name),
            **parity.compare(logits, probabilities, records.labels("val")),
        }
        _refuse_other_answers(found, force)
        files.write_json(folder / PARITY, found)
        files.write_json(folder / CLASSES, {"class_names": description.class_names})
        (folder / CARD).write_text(card.text(card.Made(description, name, found), METRICS), encoding="utf-8")
    console.log(
        f"export: {out / form.file}, {found['differ']} of {found['images']} val answers differ from the trained "
        f"classifier's, accuracy {found['exported']['accuracy']:.4f} (trained {found['trained']['accuracy']:.4f})"
    )


def _check(model: Path, description: Description, records: Records, out: Path) -> None:
    if description.temperature is None:
        raise InputError(f"{model}: expected a classifier with a temperature, as finalize releases it, received none")
    if records.class_names != description.class_names:
        raise InputError(
            f"{RECORDS}: expected the model's classes {_short(description.class_names)}, "
            f"received {_short(records.class_names)}"
        )
    expected = description.fit, Stored(description.stored_side, description.stored_enlarge)
    received = records.fit("val"), records.stored_size("val")
    if received != expected:
        shown = (f"fit {fit}, stored side {stored.side}" for fit, stored in (expected, received))
        raise InputError(f"{RECORDS}: expected val as the model was trained, {', received '.join(shown)}")
    if (records.labels("val") < 0).any():
        raise InputError(f"{RECORDS}: expected labels of all val images, received some without")
    if out.exists() and not (out.is_dir() and ((out / PARITY).is_file() or not any(out.iterdir()))):
        raise InputError(f"--out: expected a new folder or one of an earlier export, received {out}")


def _short(names: Any) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} ({len(names)})"


def _refuse_other_answers(found: dict[str, Any], force: bool) -> None:
    if found["differ_share"] <= found["limit"]:
        return
    result = (
        f"{found['format']}: expected at most {100 * found['limit']:g} % of val's answers to differ from the trained "
        f"classifier's, received {found['differ']} of {found['images']}"
    )
    if not force:
        raise InputError(f"{result}; nothing is exported without --force")
    console.log(f"export: {result}; exported since --force is given")


def _inputs(records: Records, role: str, positions: Iterable[int], description: Description) -> Iterator[np.ndarray]:
    """What the network sees of the pictures at these positions: uint8 [size, size, 3] each."""
    return (description.input_of(stored.read()) for stored in records.stored(role, positions))


def _sample(records: Records, description: Description) -> Iterator[np.ndarray]:
    """At most `CALIBRATION` pictures of train, evenly spread over the records."""
    count = records.count("train")
    positions = np.unique(np.linspace(0, count - 1, min(count, CALIBRATION)).astype(np.int64))
    return _inputs(records, "train", positions, description)


def _logits(model: classifier.Classifier, records: Records) -> np.ndarray:
    """The trained classifier's logits of val: float32 [pictures, classes]."""
    count = records.count("val")
    starts = range(0, count, BATCH)
    parts = (range(start, min(start + BATCH, count)) for start in starts)
    batches = (np.stack(list(_inputs(records, "val", part, model.description))).astype(np.float32) for part in parts)
    return model.logits(batches, len(starts), "the trained classifier on val")
