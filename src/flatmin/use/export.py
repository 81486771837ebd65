"""Exports a released classifier, and proves on val that the file answers as the classifier does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from flatmin import images, runtime
from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime
from flatmin.inputs.records import ROLE, Records
from flatmin.models import classifier
from flatmin.use import card, convert, formats, network, parity, runtimes

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
    keras.config.set_dtype_policy("float32")
    trained = classifier.load(model)
    temperature = network.temperature(trained, model)
    records = Records(RECORDS)
    _check(trained, records, out)
    form, size = formats.FORMATS[name], trained.description.image_size
    fit, stored = records.fit("val"), _stored()
    with files.atomic_write(out) as folder:
        folder.mkdir()
        path = folder / form.file
        convert.write(trained, temperature, name, path, fit=fit, stored=stored, sample=lambda: _sample(records, size))
        probabilities, milliseconds = runtimes.answers(name, path, RECORDS, "val", size)
        logits = _logits(trained, records) / temperature
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
        files.write_json(folder / CLASSES, {"class_names": trained.description.class_names})
        made = card.Made(trained.description, name, fit, stored, found)
        (folder / CARD).write_text(card.text(made, METRICS), encoding="utf-8")
    console.log(
        f"export: {out / form.file}, {found['differ']} of {found['images']} val answers differ from the trained "
        f"classifier's, accuracy {found['exported']['accuracy']:.4f} (trained {found['trained']['accuracy']:.4f})"
    )


def _check(model: classifier.Classifier, records: Records, out: Path) -> None:
    received = records.class_names
    if received != model.description.class_names:
        raise InputError(
            f"{RECORDS}: expected the model's classes {_short(model.description.class_names)}, "
            f"received {_short(received)}"
        )
    if (records.labels("val") < 0).any():
        raise InputError(f"{RECORDS}: expected labels of all val pictures, received some without")
    if out.exists() and not (out.is_dir() and ((out / PARITY).is_file() or not any(out.iterdir()))):
        raise InputError(f"--out: expected a new folder or one of an earlier export, received {out}")


def _stored() -> images.Stored:
    """How large prepare stored the pictures."""
    return images.Stored(**files.read_json(RECORDS / "val" / ROLE)["stored"])


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


def _squares(records: Records, role: str, positions: Any, size: int) -> Iterator[np.ndarray]:
    """What the network sees of the pictures at these positions: uint8 [size, size, 3] each."""
    fit = records.fit(role)
    for stored in records.stored(role, positions):
        yield np.asarray(images.to_square(stored.read(), size, fit))


def _sample(records: Records, size: int) -> Iterator[np.ndarray]:
    """At most `CALIBRATION` pictures of train, evenly spread over the records, which have the classes mixed."""
    count = records.count("train")
    positions = np.unique(np.linspace(0, count - 1, min(count, CALIBRATION)).astype(np.int64))
    return _squares(records, "train", positions, size)


def _logits(model: classifier.Classifier, records: Records) -> np.ndarray:
    """The trained classifier's logits of val: float32 [pictures, classes]."""
    size, count = model.description.image_size, records.count("val")
    starts = range(0, count, BATCH)
    parts = (range(start, min(start + BATCH, count)) for start in starts)
    batches = (np.stack(list(_squares(records, "val", part, size))).astype(np.float32) for part in parts)
    return model.logits(batches, len(starts), "the trained classifier on val")
