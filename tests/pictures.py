"""Pictures, folders of pictures, and `data` sections that read them, for the tests of data and records."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from flatmin.common.params import Data

DIGITS = {
    "source": "bundled",
    "name": "digits",
    "splits": {"train": "train[:50%]", "test": "train[50%:]"},
    "val_fraction": 0.2,
}
FEW_DIGITS = {**DIGITS, "splits": {"train": "train[:300]", "test": "train[300:400]"}}
CIFAR = "visual_domain_decathlon/cifar100"
needs_cifar = pytest.mark.skipif(
    not (Path(os.environ.get("TFDS_DATA_DIR", "nowhere")) / CIFAR).is_dir(),
    reason=f"TFDS_DATA_DIR names no folder with {CIFAR}",
)


def picture(seed: int = 0, mode: str = "RGB", width: int = 12, height: int = 8) -> Image.Image:
    """Draw noise in a mode with one 8-bit channel per letter."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    return Image.fromarray(pixels[..., 0] if len(mode) == 1 else pixels, mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def write_picture(path: Path, seed: int = 0, **options: Any) -> None:
    """Write noise in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **options)


def cats_and_dogs(root: Path, **splits: int) -> Path:
    """Make a folder with the given number of pictures of each class in each split, all different."""
    seed = 0
    for split, size in splits.items():
        for class_name in ("cat", "dog"):
            for index in range(size):
                seed += 1
                write_picture(root / split / class_name / f"{index:02d}.png", seed)
    return root


def folder_data(name: Path | str, train: str = "train", test: str = "test", **changes: Any) -> Data:
    """Make the `data` section of a folder; `val` and `predict` are split expressions, other changes are keys.

    One image per class becomes val unless the changes say otherwise.
    """
    splits = {"train": train, "test": test}
    for role in ("val", "predict"):
        if role in changes:
            splits[role] = changes.pop(role)
    values = {"source": "folder", "name": str(name), "splits": splits, **changes}
    if "val" not in splits and not {"val_fraction", "val_per_class"} & set(changes):
        values["val_per_class"] = 1
    return Data.model_validate(values)


def decode_with_pillow(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def decode_with_tensorflow(image: bytes) -> np.ndarray:
    return np.asarray(tf.io.decode_image(image, channels=3, expand_animations=False))
