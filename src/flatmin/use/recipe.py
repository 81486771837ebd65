"""The params of a new study: sizes that suit the data, and the text of params.yaml with comments."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatmin.common.params import Data, Splits
from flatmin.data.sources import roles

_SIDES = (96, 128, 160, 192, 224)  # pixels of the network's input

_TEXT = """\
# {title}. {counts}.
# `flatmin new` wrote this. docs/params.md explains every key; `flatmin check {path}` checks the file.
seeds: [42, 43, 44]     # each trains finetune, control and sam-finetune once; [42] alone is the quick look

runtime:
  precision: float32
  deterministic: true   # running again gives the same bytes
  strategy: auto        # several GPUs are used where there are any
  engine: auto

data:
  source: {source}
  name: {name}{columns}
  seed: 42              # draws what is drawn of the images
{splits}
  image_size: auto      # stored no larger than the networks see them
  fit: {fit}{fit_comment}
  skip_broken: 0        # the number of images that may be unreadable; more stop the study, and are listed

augment:
  engine: imgaug
  n: 2                  # operations of RandAugment on an image, and their magnitude
  m: 7
  flip: true            # false where a mirrored image is another class, as with writing
  crop: {crop}

backbones: [{backbones}]   # those whose weights come with the requirements

extract:
  seed: 42
  optimizer: adam
  learning_rate: 0.001
  schedule: {{name: cosine, warmup_epochs: 1}}
  label_smoothing: 0.1
  batch_size: {batch_size}
  epochs: {extract_epochs}
  views: {extract_views}              # augmented views of each image, kept; 0 augments afresh in every epoch
  dropout: 0.2
  image_size: {image_size}       # {size_comment}

select:
  metric: accuracy      # or balanced_accuracy, where rare classes matter as much
  tolerance: 0.01       # a cheaper backbone may be one point worse

audit: {{}}             # near duplicates and wrong labels: docs/audit.md

finetune:
  optimizer: adamw
  learning_rate: 0.0005
  schedule: {{name: cosine, warmup_epochs: 1}}
  weight_decay: 0.02
  label_smoothing: 0.1
  batch_size: {batch_size}
  epochs: {epochs}
  views: {views}
  dropout: 0.2
  image_size: {image_size}
  fine_tune_at: null    # the first trained layer; null: the backbone's default, in its second half

sam:
  method: sam           # docs/sam.md has the others and their settings
  rho: 0.05             # the most important setting: try 0.02 and 0.1 on val
  adaptive: false
  every: 1

finalize:
  tolerance: 0.005      # of methods within half a point on val, the cheapest is released

evaluate:
  batch_size: 128
  sharpness: {{images: 32, steps: 10, probes: 3}}
"""


@dataclass(frozen=True)
class Sizes:
    """Sizes that suit a number of train pictures, and their size.

    Attributes:
        image_size: of the network's input, in pixels.
        batch_size, epochs, views: of finetune; views are those of extract, too, as far as its epochs go.
        extract_epochs: of the linear classifier, which costs next to nothing once the views are there.
    """

    image_size: int
    batch_size: int
    epochs: int
    views: int
    extract_epochs: int


def sizes(train: int, side: int, has_gpu: bool) -> Sizes:
    """Choose sizes: fewer epochs and views the more pictures there are, so that time grows slower than their number.

    Args:
        train: the number of train pictures.
        side: pixels of the shorter side of a typical picture.
    """
    # On a processor alone larger inputs of many pictures take days.
    largest = 224 if has_gpu or train < 2_000 else 160
    image_size = next((each for each in _SIDES if each >= min(side, largest)), _SIDES[-1])
    batch_size = next(each for each in (128, 64, 32, 16) if each <= max(16, train / 32))
    epochs = next(few for limit, few in ((500, 20), (5_000, 12), (50_000, 8), (float("inf"), 5)) if train < limit)
    views = min(epochs, next(few for limit, few in ((500, 10), (5_000, 6), (float("inf"), 4)) if train < limit))
    return Sizes(image_size, batch_size, epochs, views, 2 * epochs)


def data_section(values: dict[str, Any], splits: dict[str, int]) -> Data:
    """Complete a `data` section: the splits that are there keep their role, what lacks is taken out of train.

    Args:
        values: source, name and columns.
        splits: the number of pictures of each.
    """
    found = {roles.USUAL[name.lower()]: name for name in splits if name.lower() in roles.USUAL}
    if "train" not in found or len(found) < len(splits) or {"train", "val", "test"} <= set(found):
        return Data.model_validate(values)  # complete, or unusual: then opening it says what to write
    many = splits[found["train"]] >= 2_000
    if "test" in found:
        return Data.model_validate(values | {"val_fraction": 0.1 if many else 0.2})
    train, share = found["train"], 80 if many else 70
    given: dict[str, Any] = dict(found) | {"train": f"{train}[:{share}%]", "test": f"{train}[{share}%:]"}
    chosen = values | {"splits": Splits.model_validate(given)}
    return Data.model_validate(chosen | ({} if "val" in found else {"val_fraction": 0.1 if many else 0.2}))


def text(data: Data, chosen: Sizes, backbones: list[str], *, path: Path, counts: str, side: int, fit: str) -> str:
    """The contents of params.yaml."""
    columns = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.columns if value)
    if side <= chosen.image_size:
        size_comment = f"of 64 images half have a shorter side of at most {side} pixels"
    else:
        size_comment = f"pixels; the images have about {side}, and a larger size costs with its square"
    return _TEXT.format(
        title=f"{path.parent.name or 'A study'}: {data.name}".replace("\n", " "),
        path=path,
        counts=counts,
        source=data.source,
        name=json.dumps(data.name, ensure_ascii=False),
        columns=f"\n  columns: {{{columns}}}" if columns else "",
        splits=_splits(data),
        fit=fit,
        fit_comment="         # images are long: grey borders keep all of them" if fit == "pad" else "",
        crop=max(2, min(side, chosen.image_size) // 12),
        backbones=", ".join(backbones),
        batch_size=chosen.batch_size,
        extract_epochs=chosen.extract_epochs,
        extract_views=min(chosen.views, chosen.extract_epochs),
        image_size=chosen.image_size,
        size_comment=size_comment,
        epochs=chosen.epochs,
        views=chosen.views,
    )


def _splits(data: Data) -> str:
    lines = []
    if data.splits:
        given = data.splits.model_dump(exclude_none=True)
        lines.append("  splits:               # parts of a split hold the classes in proportion")
        lines += [f"    {role}: {json.dumps(expression, ensure_ascii=False)}" for role, expression in given.items()]
    else:
        lines.append("  # The splits are those of the data.")
    if data.val_fraction:
        lines.append(f"  val_fraction: {data.val_fraction}     # of each class of train, for every choice that is made")
    return "\n".join(lines)
