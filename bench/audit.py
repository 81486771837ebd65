"""What audit finds in the digits and in CIFAR-100, how well, and what balancing does: bench/audit.json, docs/audit.md.

    python bench/audit.py [PART ...]    measure these parts (digits, cifar100, copies, planted, imbalance), or all

CIFAR-100 is read from $TFDS_DATA_DIR. Records and models are kept in build/audit/. bench/page.py fills the page.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flatmin.common import console, errors, files, params

with console.importing_tensorflow():
    from PIL import Image, ImageEnhance, ImageOps

    from flatmin import runtime as devices
    from flatmin.audit import audit, labels, similarity
    from flatmin.audit.duplicates import Places
    from flatmin.audit.similarity import Whitening
    from flatmin.common.params import Audit, Augment, Extract, Runtime
    from flatmin.data import writer
    from flatmin.features import store
    from flatmin.images import to_square
    from flatmin.inputs import batches
    from flatmin.inputs.records import Records
    from flatmin.models import classifier
    from flatmin.training import stages

HERE = Path(__file__).parent
RESULTS = HERE / "audit.json"
FOLDER = HERE.parent / "build/audit"
BACKBONE, SIDE = "EfficientNetLite0", 72
SETTINGS = Audit()
DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "source": "bundled",
        "name": "digits",
        "image_size": 32,
        "splits": {"train": "train[:80%]", "val": "train[80%:90%]", "test": "train[90%:]"},
    },
    "cifar100": {
        "source": "tfds",
        "name": "visual_domain_decathlon/cifar100",
        "image_size": "original",
        "splits": {"train": "train", "val": "validation", "test": "test"},
    },
}


def prepared(name: str) -> tuple[Records, str]:
    """The records of a data set and the folder of a frozen classifier, both made once."""
    folder = FOLDER / name
    if not (folder / "records").exists():
        writer.write(params.Data.model_validate(DATA[name]), folder / "records")
    records = Records(folder / "records")
    if not (folder / "model").exists():
        options: dict[str, Any] = {"image_size": SIDE, "dropout": 0.0, "seed": 0, "weights": "imagenet"}
        classifier.create(BACKBONE, records.class_names, **options).save(folder / "model")
    return records, str(folder / "model")


def audited(name: str) -> dict[str, Any]:
    """Run audit as the stage does; its metrics, and the seconds it takes without the forward pass."""
    records, model = prepared(name)
    audit._activations(records, model, Runtime())  # cached from now on
    folder = FOLDER / name
    options = {"records": str(records.folder), "model": model}
    options |= {"metrics": str(folder / "audit.json"), "outputs": str(folder / "audit")}
    started, worked = time.monotonic(), time.process_time()
    audit.audit(runtime=Runtime(), settings=SETTINGS, **options)
    took = {"seconds": time.monotonic() - started, "processor_seconds": time.process_time() - worked}
    images = {role: records.count(role) for role in records.roles}
    return {"images": images, **took, "leaked": leaked(folder), "found": files.read_json(folder / "audit.json")}


def leaked(folder: Path) -> int:
    """The number of test images with a near duplicate in train or val."""
    rows = files.read_csv(folder / "audit/pairs.csv")
    return len({row["position"] for row in rows if row["role"] == "test" and row["like_role"] in ("train", "val")})


# Made copies


def _recompressed(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=75)
    return Image.open(buffer).convert("RGB")


def _cropped(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    box = (0.025 * width, 0.025 * height, 0.975 * width, 0.975 * height)
    return picture.resize(picture.size, Image.Resampling.BICUBIC, box)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "rescaled to three quarters": lambda picture: picture.resize((picture.width * 3 // 4, picture.height * 3 // 4)),
    "recompressed, JPEG of quality 75": _recompressed,
    "cropped by 5 %": _cropped,
    "brightened by a fifth": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "mirrored": ImageOps.mirror,
}
COPIED = 400  # pictures of test


def copies(name: str) -> dict[str, Any]:
    """The share of made copies that audit's rule finds, and of the same pictures with one of another class."""
    records, model = prepared(name)
    pictures = [each.read() for each in records.stored("test", range(min(COPIED, records.count("test"))))]
    places = Places.read(records)
    with (
        devices.dtype_policy("float32"),
        store.plain(records, classifier.load(model), runtime=Runtime(), roles=records.roles) as cached,
    ):
        every = -(-len(places.role) // audit.FITTED)
        whitening = Whitening.fit(
            np.concatenate([each.read(np.arange(0, each.count, every))[0] for each in cached.values()])
        )
    vectors, signs = _described(model, whitening, pictures)
    found: dict[str, Any] = {}
    for change, make in CHANGES.items():
        others, theirs = _described(model, whitening, [make(picture) for picture in pictures])
        found[change] = float(_near((vectors * others).sum(axis=1), similarity.different_bits(theirs, signs)).mean())
    return {"pictures": len(pictures), "found": found}


def _near(cosine: np.ndarray, bits: np.ndarray) -> np.ndarray:
    return (bits <= SETTINGS.hash_bits) & (cosine >= SETTINGS.cosine + similarity.PER_BIT * bits)


def _described(model: str, whitening: Whitening, pictures: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors and hashes of pictures."""
    frozen, _ = classifier.load(model).split(None)

    def pixels(side: int) -> np.ndarray:
        return np.stack([np.asarray(to_square(picture, side, "squash")) for picture in pictures]).astype(np.float32)

    activations = np.concatenate(
        [np.asarray(frozen(part, training=False)) for part in np.array_split(pixels(SIDE), 1 + len(pictures) // 64)]
    )
    return similarity.unit(whitening(activations)), similarity.hashes(pixels(similarity.SIDE))


# Planted errors

NOISE = 0.05
PLANTED = {"digits": None, "cifar100": 100}  # images of each class of train; None: all of train and val


def planted(name: str) -> dict[str, Any]:
    """Precision and recall of label suspects where 5 % of the labels were changed, beside cleanlab's own."""
    from cleanlab.filter import find_label_issues

    records, model = prepared(name)
    places = Places.read(records)
    vectors = audit._activations(records, model, Runtime())
    true, chosen, classes = places.labels, places.of(["train", "val"]), len(records.class_names)
    if (each := PLANTED[name]) is not None:
        train = places.of(["train"])
        chosen = np.concatenate([train[true[train] == label][:each] for label in range(classes)])
    random = np.random.default_rng(0)
    given = true[chosen].copy()
    wrong = random.choice(len(given), round(NOISE * len(given)), replace=False)
    given[wrong] = (given[wrong] + random.integers(1, classes, len(wrong))) % classes
    started = time.process_time()
    probabilities = labels.out_of_fold(vectors[chosen], given, classes)
    took = time.process_time() - started
    found = {"Flatmin": labels.suspects(probabilities, given).position}
    for rule in ("confident_learning", "prune_by_noise_rate"):
        issues = find_label_issues(given, probabilities, filter_by=rule, n_jobs=1)
        found[f"cleanlab, {rule}"] = np.flatnonzero(issues)
    return {
        "images": len(given),
        "wrong": len(wrong),
        "out_of_fold_accuracy": float((probabilities.argmax(axis=1) == true[chosen]).mean()),
        "processor_seconds": took,
        "rules": {rule: _hits(suspected, wrong) for rule, suspected in found.items()},
        "first": _hits(found["Flatmin"][: len(wrong)], wrong)["precision"],
    }


def _hits(suspected: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    hits = len(np.intersect1d(suspected, wrong))
    return {"suspects": len(suspected), "precision": hits / max(1, len(suspected)), "recall": hits / len(wrong)}


# A made imbalance

FREQUENT, RARE = 60, 3  # images of each of the digits 0 to 4, and 5 to 9, in train
BALANCED = {"nothing": {}, "class_weights": {"class_weights": "balanced"}, "sampling": {"sampling": "balanced"}}
SEEDS = (1, 2, 3)


def imbalance() -> dict[str, Any]:
    """Test accuracy and recall of the rare digits, of a head trained on 1 to 20 digits, in three ways and seeds."""
    folder = FOLDER / "imbalance"
    _write_uneven(folder)
    found: dict[str, Any] = {}
    for name, changes in BALANCED.items():
        rows = [_uneven_head(folder, seed, changes) for seed in SEEDS]
        found[name] = {key: [row[key] for row in rows] for key in rows[0]}
    return {"frequent": FREQUENT, "rare": RARE, "ways": found}


def _write_uneven(folder: Path) -> None:
    """A table of digits: FREQUENT and RARE of each for train, ten of each for val, all others for test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows, seen = [], dict.fromkeys(range(10), 0)
    for index, label in enumerate(digits.target.tolist()):
        place, train = seen[label], FREQUENT if label < 5 else RARE
        seen[label] += 1
        split = "val" if place < 10 else "train" if place < 10 + train else "test" if place >= 10 + FREQUENT else None
        if split:
            picture = Image.fromarray(np.rint(digits.images[index] * (255 / 16)).astype(np.uint8))
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            picture.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"pictures/{index}.png")
            rows.append([f"pictures/{index}.png", label, split])
    files.write_csv(folder / "table.csv", ["image", "label", "split"], rows)
    data = {"source": "table", "name": str(folder / "table.csv"), "image_size": "original"}
    writer.write(params.Data.model_validate(data), folder / "records")


def _uneven_head(folder: Path, seed: int, changes: dict[str, str]) -> dict[str, float]:
    """Train a head on the frozen backbone, as extract-train does; its scores on test."""
    recipe = {"optimizer": "adam", "learning_rate": 0.003, "batch_size": 32, "epochs": 30, "views": 1, "seed": seed}
    outputs = stages.Outputs(str(folder / "model"), str(folder / "metrics.json"), str(folder / "plot.csv"))
    state = stages.extract(
        BACKBONE,
        runtime=Runtime(),
        augment=Augment(),
        recipe=Extract.model_validate({**recipe, "augment": False, "image_size": SIDE, **changes}),
        metric="balanced_accuracy" if changes else "accuracy",
        records=str(folder / "records"),
        outputs=outputs,
    )
    state.remove()
    records, model = Records(folder / "records"), classifier.load(folder / "model")
    logits = model.logits(pixels for pixels, _ in batches.plain(records, "test", SIDE, 64))
    own = records.labels("test")
    right, rare = logits.argmax(axis=1) == own, np.array([int(name) >= 5 for name in records.class_names])[own]
    return {"accuracy": float(right.mean()), "rare": float(right[rare].mean()), "frequent": float(right[~rare].mean())}


# All of it

PARTS: dict[str, Callable[[], Any]] = {
    "digits": lambda: audited("digits"),
    "copies": lambda: {name: copies(name) for name in DATA},
    "planted": lambda: {name: planted(name) for name in DATA},
    "imbalance": imbalance,
    "cifar100": lambda: audited("cifar100"),
}


def main() -> None:
    for part in sys.argv[1:] or PARTS:
        devices.configure(Runtime(), 0)
        measured = PARTS[part]()
        results = files.read_json(RESULTS) if RESULTS.exists() else {}
        files.write_json(RESULTS, results | {part: measured})


if __name__ == "__main__":
    errors.run(main)
