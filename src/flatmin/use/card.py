"""The model card of an exported model: README.md, in the shape that model hubs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.images import PAD, Fit, Stored
from flatmin.models.classifier import Description
from flatmin.use import formats, parity
from flatmin.use.resize import LONGEST

NAMES_SHOWN = 20


@dataclass(frozen=True)
class Made:
    """What was exported.

    Attributes:
        parity: the contents of parity.json.
    """

    description: Description
    name: formats.Name
    parity: dict[str, Any]

    @property
    def stored(self) -> Stored:
        """How large the study stored its pictures."""
        return Stored(self.description.stored_side, self.description.stored_enlarge)

    @property
    def format(self) -> formats.Format:
        return formats.FORMATS[self.name]


def text(made: Made, metrics: Path) -> str:
    """Write the card.

    Args:
        metrics: the folder of the study's metrics. Those that are missing, or of another model, are left out.
    """
    final, evaluated, prepared = (_read(metrics / f"{name}.json") for name in ("final", "evaluate", "prepare"))
    released = final.get("released", {})
    if released.get("temperature") != made.description.temperature:
        released, evaluated = {}, {}
    test = evaluated.get("final", {}).get("test", {})
    front = yaml.safe_dump(_front_matter(made, test, prepared), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front}---",
        f"# {_title(made, prepared)}",
        "\n".join(_about(made, released)),
        "## How to use it",
        "\n".join(_usage(made)),
        f"## Does the file answer as the trained classifier does?\n\n{chr(10).join(parity.table(made.parity))}",
        "\n".join(_proof(made)),
        "## Scores",
        "\n".join(_scores(made, released, test)),
        "## Data",
        "\n".join(_data(made, prepared)),
        "## Limits",
        "\n".join(_limits(made)),
    ]
    return "\n\n".join(sections) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        return files.read_json(path)
    except InputError:
        if path.exists():
            raise
        return {}


def _title(made: Made, prepared: dict[str, Any]) -> str:
    data = prepared.get("name", "unknown data")
    return f"{made.description.backbone} for {data}, {len(made.description.class_names)} classes ({made.name})"


def _front_matter(made: Made, test: dict[str, float], prepared: dict[str, Any]) -> dict[str, Any]:
    data = prepared.get("name", "unknown")
    values, split = (test, "test") if test else (made.parity["exported"], "val")
    return {
        "license": "unknown",  # that of the pictures and of the pretrained weights is not the study's to give
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "flatmin", made.name, made.description.backbone],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": _title(made, prepared),
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": data, "type": data, "split": split},
                        "metrics": [{"type": "accuracy", "name": f"{split} accuracy", "value": values["accuracy"]}],
                    }
                ],
            }
        ],
    }


def _about(made: Made, released: dict[str, Any]) -> list[str]:
    description = made.description
    lines = [
        f"An image classifier: {description.backbone} at {description.image_size} x {description.image_size} pixels "
        f"({description.multiply_adds / 1e6:,.0f} million multiply-adds), from "
        f"{'random weights' if description.pretrained == 'none' else f'pretrained weights ({description.pretrained})'}"
    ]
    if released:
        seed = f", seed {released['seed']}" if "seed" in released else ""
        lines[0] += f", trained by the method `{released['method']}`{seed} and chosen on val alone"
    lines[0] += "."
    names = description.class_names
    shown = ", ".join(f"`{name}`" for name in names[:NAMES_SHOWN])
    lines += ["", f"Classes, in the order of the output: {shown}{', ...' if len(names) > NAMES_SHOWN else ''}."]
    return [*lines, "All are in `classes.json`."]


def _usage(made: Made) -> list[str]:
    size = made.description.image_size
    taken = "of any height and width, all of one batch alike" if made.format.any_size else f"of {size} x {size} pixels"
    batch = "several images or one" if made.format.any_size else "one image"
    given = f"**In** `pixels`: uint8 `[batch, height, width, 3]`, {batch}, RGB in 0 to 255, {taken}."
    inside = "Inside: all resizing, the network's scaling of pixels, the temperature and the softmax."
    if not made.format.any_size:
        inside = "Inside: the network's scaling of pixels, the temperature and the softmax. Resizing is not."
    return [
        f"{given} **Out**: calibrated probabilities, float32 `[batch, {len(made.description.class_names)}]`. {inside}",
        "",
        "```python",
        *program(made),
        "```",
        *_quicker(made),
    ]


def _quicker(made: Made) -> list[str]:
    """What spares a file that takes any size much of its resizing."""
    if made.stored.side is None or not made.format.any_size:
        return []
    lines = ["", "To save time with large images, make them smaller before `pixels`. The answer stays the same:", ""]
    return [*lines, "```python", *_stored_size(made.stored), "```"]


def program(made: Made) -> list[str]:
    """The lines of a Python program that prints the class and the probability of `picture.jpg`."""
    loading = [line.format(file=made.format.file) for line in made.format.load]
    return [
        "import json",
        "import numpy as np",
        "from PIL import Image, ImageOps",
        loading[0],
        "",
        'picture = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB")',
        *(
            []
            if made.format.any_size
            else [*_stored_size(made.stored), *_square(made.description.fit, made.description.image_size)]
        ),
        "pixels = np.asarray(picture)",
        *loading[1:],
        'names = json.load(open("classes.json"))["class_names"]',
        "print(names[probabilities.argmax()], probabilities.max())",
    ]


def _stored_size(stored: Stored) -> list[str]:
    """The lines that bring a picture to the size in which the study stored it."""
    if stored.side is None:
        return []
    shorter = "min(picture.size)" if stored.enlarge else f"max(min(picture.size), {stored.side})"
    return [
        f"size = [max(1, round(each * {stored.side} / {shorter})) for each in picture.size]",
        "picture = picture.resize(size, Image.Resampling.BICUBIC)",
    ]


def _square(fit: Fit, size: int) -> list[str]:
    """The lines that fit a picture to the network's input."""
    bilinear = f"({size}, {size}), Image.Resampling.BILINEAR"
    if fit == "pad":
        return [  # as ImageOps.pad, but for pictures that would get thinner than a pixel
            f"width, height = (max(1, round(side / max(picture.size) * {size})) for side in picture.size)",
            f'square = Image.new("RGB", ({size}, {size}), ({PAD}, {PAD}, {PAD}))',
            f"place = round(({size} - width) / 2), round(({size} - height) / 2)",
            "square.paste(picture.resize((width, height), Image.Resampling.BILINEAR), place)",
            "picture = square",
        ]
    if fit == "crop":
        return [
            "side = min(picture.size)",
            "left, top = (picture.width - side) / 2, (picture.height - side) / 2",
            f"picture = picture.resize({bilinear}, (left, top, left + side, top + side))",
        ]
    return [f"picture = picture.resize({bilinear})"]


def _proof(made: Made) -> list[str]:
    found = made.parity
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    limit = f"An export is refused where more than {100 * found['limit']:g} % of the answers differ"
    kept = "this one was forced" if found["differ_share"] > found["limit"] else "this one is below"
    return [
        f"The file answered in its own runtime, in a process of its own, on the images as the study stored them "
        f"({versions}). {limit}; {kept}. Log-probabilities are compared down to {parity.FLOOR:g}. The same as JSON: "
        "`parity.json`."
    ]


def _scores(made: Made, released: dict[str, Any], test: dict[str, float]) -> list[str]:
    if not released:
        return ["metrics/final.json is missing or of another model: nothing is known but the table above."]
    rows = [f"| val accuracy (optimistic, since val chose it) | {released['val']['accuracy']:.4f} |"]
    names = {
        "accuracy": "test accuracy",
        "balanced_accuracy": "test balanced accuracy",
        "macro_f1": "test macro F1",
        "top5_accuracy": "test top-5 accuracy",
        "calibrated_loss": "test cross-entropy in nats, calibrated",
        "calibrated_ece": "test expected calibration error, calibrated",
    }
    rows += [f"| {label} | {test[key]:.4f} |" for key, label in names.items() if key in test]
    missing = [] if test else ["", "metrics/evaluate.json has no scores of it on test."]
    return ["Of the trained classifier, before the export:", "", "| | |", "|---|---|", *rows, *missing]


def _data(made: Made, prepared: dict[str, Any]) -> list[str]:
    if not prepared:
        return ["metrics/prepare.json is missing: what it was trained on is not known."]
    roles = prepared["roles"]
    rows = [
        f"| {role} | {each['count']:,} | {each['smallest_class']:,} to {each['largest_class']:,} |"
        if "largest_class" in each
        else f"| {role} | {each['count']:,} | |"
        for role, each in roles.items()
    ]
    return [f"`{prepared['name']}`:", "", "| role | images | of a class |", "|---|---|---|", *rows]


def _limits(made: Made) -> list[str]:
    lines = [
        "- It knows its classes alone: an image of anything else gets one of them, often with confidence.",
        "- Probabilities are calibrated on val, for images like those of the study.",
        "- The licence depends on the images and on the pretrained weights: look it up before you pass the file on.",
    ]
    if made.format.any_size:
        lines += ["- Time and memory of the resize inside grow with the image: seconds for 12 megapixels."]
        if made.stored.side is not None:
            lines += [
                f"- Pictures of more than {LONGEST}:1 are squeezed to that, where the study kept their proportions "
                "until they met the network's square."
            ]
    return lines
