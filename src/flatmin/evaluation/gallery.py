"""The pictures that the report shows: of each class and role, duplicates, and what the released classifier gets wrong.

They are small copies, and their number has limits, whatever the size of the data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
from PIL import Image

from flatmin import images
from flatmin.common import files
from flatmin.evaluation import cam
from flatmin.inputs.records import Records
from flatmin.inputs.thumbnails import Gallery
from flatmin.models.classifier import Classifier

CLASS_SIDE = 96  # of those of a class, of which there are most
CLASSES, EACH = 30, 3  # classes that are shown, and pictures of each in each role
MISTAKES = 24
PAIRS, IN_PAIR = 10, 4  # pairs of classes that are confused, and pictures of each
DUPLICATES = 6  # pairs of pictures for each pair of roles
SEED = 0  # of the choice among a class's pictures


def classes_shown(names: Sequence[str], recall: Mapping[str, float]) -> list[int]:
    """The labels of the classes to show: all, or of many those that are recognised worst, in the order of labels.

    recall: by class, of those that test has.
    """
    order = sorted(range(len(names)), key=lambda label: (recall.get(names[label], 2.0), label))
    return sorted(order[:CLASSES])


def examples(gallery: Gallery, records: Records, labels: Iterable[int]) -> dict[str, dict[str, list[str]]]:
    """Pictures drawn from each role and class: by role and class name, their files."""
    found: dict[str, dict[str, list[str]]] = {}
    for role in (role for role in records.roles if role != "predict"):
        random, of_role = np.random.default_rng(SEED), records.labels(role)
        for label in labels:
            positions = np.flatnonzero(of_role == label)
            drawn = np.sort(random.choice(positions, min(EACH, len(positions)), replace=False))
            found.setdefault(role, {})[records.class_names[label]] = [
                gallery.add(role, position, CLASS_SIDE) for position in drawn
            ]
    return found


def duplicates(gallery: Gallery, records: Records, dataset: Path | str) -> dict[str, list[list[str]]]:
    """Equal pictures of two roles, by `train_test` and the like: the files of the first pairs in dataset.json."""
    found: dict[str, list[list[str]]] = {}
    for pair, described in files.read_json(dataset)["duplicates"].items():
        roles = pair.split("_")
        for names in described["names"][:DUPLICATES]:
            places = [(role, records.names(role).index(name)) for role, name in zip(roles, names, strict=True)]
            found.setdefault(pair, []).append([gallery.add(role, position) for role, position in places])
    return found


def mistakes(
    gallery: Gallery, records: Records, model: Classifier, logits: np.ndarray, labels: np.ndarray, temperature: float
) -> list[dict[str, Any]]:
    """The test images of which a classifier is most sure and wrong, each with what speaks for the predicted class.

    Args:
        logits: float [n, classes], those of `model`. labels: int [n].
        temperature: what they are divided by.
    """
    probabilities = scipy.special.softmax(logits.astype(np.float64) / temperature, axis=1)
    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:MISTAKES]
    if not len(worst):
        return []
    seen = [_as_seen(records, position, model.description.image_size) for position in worst]
    maps = cam.activation_maps(model, np.stack(seen).astype(np.float32), predicted[worst])
    return [
        {
            "name": records.names("test")[position],
            "actual": records.class_names[labels[position]],
            "predicted": records.class_names[predicted[position]],
            "probability": float(probabilities[position, predicted[position]]),
            "probability_of_actual": float(probabilities[position, labels[position]]),
            "picture": gallery.add("test", position),
            "activation": gallery.save(cam.overlay(Image.fromarray(pixels), each), f"activation-{position}"),
        }
        for position, pixels, each in zip(worst.tolist(), seen, maps, strict=True)
    ]


def _as_seen(records: Records, position: int, size: int) -> np.ndarray:
    """A test image as the network sees it: uint8 [size, size, 3]."""
    (stored,) = records.stored("test", [position])
    return np.asarray(images.to_square(stored.read(), size, records.fit("test")))


def confused(gallery: Gallery, records: Records, predicted: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """The pairs of classes that are confused most often, with pictures: predictions and labels are int [n]."""
    wrong = np.flatnonzero(predicted != labels)
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:PAIRS]
    return [
        {
            "actual": records.class_names[actual],
            "predicted": records.class_names[guess],
            "count": int(counts[index]),
            "of": int((labels == actual).sum()),
            "pictures": [
                gallery.add("test", position)
                for position in np.flatnonzero((labels == actual) & (predicted == guess))[:IN_PAIR]
            ],
        }
        for index, (actual, guess) in zip(most.tolist(), pairs[:, most].T.tolist(), strict=True)
    ]
