"""A small study whose released classifier tells colours apart, for tests of what is done with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from networks import spread
from PIL import Image
from trainings import BACKBONE, NAMES

from flatmin.common import files, params
from flatmin.data import writer
from flatmin.images import Fit, Stored
from flatmin.inputs import batches
from flatmin.inputs.records import Records
from flatmin.models import classifier, registry
from flatmin.use import export, formats

SIZE, STORED, TEMPERATURE = 32, 24, 0.75
COUNTS = {"train": 36, "val": 60, "test": 6}
TEST_SCORES = {"accuracy": 0.8125, "balanced_accuracy": 0.8, "macro_f1": 0.79, "top5_accuracy": 1.0}


def write_study(fit: Fit = "squash") -> None:
    """Write pictures, records, metrics and models/final into the working directory."""
    random = np.random.default_rng(0)
    for role, count in COUNTS.items():
        for index in range(count):
            height, width = random.integers(STORED, 2 * STORED, 2)
            pixels = random.integers(0, 120, (height, width, 3), np.uint8)
            pixels[..., 2 - index % 3] += 100
            path = Path(f"images/{role}/{NAMES[index % 3]}/{index}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    splits = {role: role for role in COUNTS}
    data = {"source": "folder", "name": "images", "image_size": STORED, "fit": fit, "splits": splits}
    files.write_json("metrics/prepare.json", writer.write(params.Data.model_validate(data), "data/records"))
    _train(fit).save("models/final")
    description = files.read_json("models/final/model.json")
    files.write_json("models/final/model.json", description | {"temperature": TEMPERATURE})
    released = {"method": "sam", "seed": 3, "temperature": TEMPERATURE, "val": {"accuracy": 0.9, "loss": 0.2}}
    files.write_json("metrics/final.json", {"released": released})
    files.write_json("metrics/evaluate.json", {"final": {"test": TEST_SCORES}})


def _train(fit: Fit) -> classifier.Classifier:
    """Random layers, and a head fitted to their features of train by ridge regression."""
    records = Records("data/records")
    size: dict[str, Any] = {"image_size": SIZE, "fit": fit, "stored": Stored(STORED)}
    model = classifier.create(BACKBONE, NAMES, dropout=0.0, seed=1, weights="none", levels="all", **size)
    spread(model.base)
    pixels = np.concatenate([pixels for pixels, _ in batches.plain(records, "train", SIZE, 12)])
    classifier.fit_standardization(model, iter([pixels]))
    features = model.features(registry.preprocess(BACKBONE, pixels)).numpy()
    targets = 6.0 * np.eye(len(NAMES))[records.labels("train")] - 2.0
    kernel = np.linalg.solve(features.T @ features + 10.0 * np.eye(features.shape[1]), features.T @ targets)
    model.head.get_layer("logits").set_weights([kernel.astype(np.float32), np.zeros(len(NAMES), np.float32)])
    return model


def probabilities(picture: Image.Image) -> np.ndarray:
    """What the trained classifier says of a picture: float32 [classes]."""
    model = classifier.load("models/final")
    pixels = model.description.input_of(picture).astype(np.float32)
    return tf.nn.softmax(model.logits([pixels[None]]) / TEMPERATURE).numpy()[0]


def run_card(folder: Path, picture: Path) -> tuple[str, float]:
    """Run the program of a model card on a picture; the class and the probability that it prints."""
    program = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    (folder / "picture.jpg").write_bytes(picture.read_bytes())
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, probability = done.stdout.split()
    return name, float(probability)


def check_round_trip(name: formats.Name, out: Path) -> dict[str, Any]:
    """Export the study's classifier and compare what its card's program says with what the classifier says.

    Returns the contents of parity.json.
    """
    export.export(Path("models/final"), name, out)
    picture = Path(f"images/test/{NAMES[1]}/1.png")
    expected = probabilities(Image.open(picture))
    named, probability = run_card(out, picture)
    tolerance = 0.1 if name == "litert-int8" else 1e-4
    assert NAMES[int(expected.argmax())] == named == NAMES[1]
    assert abs(probability - float(expected.max())) < tolerance
    found: dict[str, Any] = json.loads((out / "parity.json").read_text())
    assert found["format"] == name
    assert found["images"] == COUNTS["val"]
    assert found["versions"].keys() >= {"keras", formats.FORMATS[name].runtime.replace("_", "-")}
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["README.md", "classes.json", "parity.json", "picture.jpg", formats.FORMATS[name].file]
    )
    return found
