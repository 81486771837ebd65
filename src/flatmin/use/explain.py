"""Shows where in a picture a classifier saw a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.evaluation import cam
from flatmin.use import pictures, predict

_SIDE = 448  # pixels, at least, of each of the two pictures


def explain(image: str, model: Path, class_name: str | None, out: Path) -> None:
    """Write a PNG: on the left what the network sees of a picture, on the right the same with what speaks for a class.

    Args:
        model: a classifier's folder.
        class_name: None for the predicted class.

    Raises:
        InputError: the model or the picture cannot be used, the model has no such class, or `out` is no new PNG.
    """
    if out.suffix.lower() != ".png":
        raise InputError(f"--out: expected a name that ends in .png, received {str(out)!r}")
    if out.exists() and out.samefile(image):
        raise InputError(f"--out: expected another file than the image, received {str(out)!r}")
    loaded = predict.load(model)
    names = list(loaded.description.class_names)
    if class_name is not None and class_name not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise InputError(f"--class: expected one of {shown}, received {class_name!r}")
    picture = pictures.read(image, loaded.description)
    if picture.pixels is None:
        raise InputError(f"{pictures.shown(image)}: expected an image that can be read, received: {picture.reason}")
    (found,) = predict.probabilities(loaded, picture.pixels[None])
    label = int(found.argmax()) if class_name is None else names.index(class_name)
    (activation,) = cam.activation_maps(loaded, picture.pixels[None].astype(np.float32), [label])
    with files.atomic_write(out) as temporary:
        _beside(picture.pixels, activation).save(temporary, "PNG")
    best = int(found.argmax())
    other = "" if label == best else f"; the model says {names[best]}, {found[best]:.4f}"
    console.log(f"{out}: what speaks for {names[label]}, probability {found[label]:.4f}{other}")
    if not activation.any():
        console.log(f"{out}: nothing in the image speaks for {names[label]}")


def _beside(pixels: np.ndarray, activation: np.ndarray) -> Image.Image:
    """The picture and, right of it, the picture coloured by the map.

    Args:
        pixels: uint8 [size, size, 3]. activation: float32 [rows, columns] in [0, 1].
    """
    side = max(_SIDE, len(pixels))
    seen = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    both = Image.new("RGB", (2 * side, side))
    both.paste(seen, (0, 0))
    both.paste(cam.overlay(seen, activation), (side, 0))
    return both
