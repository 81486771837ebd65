"""A classifier: a backbone and a linear head, cut into a frozen trunk and a trained tail, saved and loaded whole."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from flatmin import backbones, cache, reporting
from flatmin.reporting import InputError

WEIGHTS = "classifier.weights.h5"
MODEL = "model.json"


@dataclass(frozen=True)
class Description:
    """What `model.json` holds: all that is needed to assemble the same network again.

    weights_digest: SHA-256 of the file that the backbone's weights came from, None for none or Keras' own download.
    """

    backbone: str
    image_size: int
    class_names: Sequence[str]
    dropout: float
    seed: int
    pretrained: str
    weights_digest: str | None
    preprocessing: str
    multiply_adds: int
    fine_tune_at: str | int | None = None


class Tail(keras.Model):
    """The trained layers: boundary tensors -> logits, float32 [batch, classes].

    The backbone's part always runs in inference mode: BatchNorm keeps ImageNet's statistics while its gamma and beta
    are trained, and the backbone's own dropout is off. The head's dropout follows `training`.
    """

    def __init__(self, body: keras.Model | None, head: keras.Model) -> None:
        super().__init__(name="tail")
        self.body = body
        self.head = head

    def call(self, boundary: Any, training: bool = False) -> tf.Tensor:
        features = boundary if self.body is None else self.body(boundary, training=False)
        return self.head(features, training=training)


@dataclass(frozen=True)
class Classifier:
    """Base and head, and what describes them."""

    description: Description
    base: keras.Model
    head: keras.Model
    network: keras.Model = field(repr=False)

    def cut(self, at: str | int | None) -> tuple[keras.Model, Tail]:
        """Trunk and tail, sharing this classifier's weights.

        Args:
            at: the first trained layer of the backbone, by name or index; None freezes the whole backbone and
                pools what it makes.

        Returns:
            trunk: pixels float32 [batch, size, size, 3] in [0, 255] -> boundary tensors; and the tail.
        """
        pixels = keras.Input(self.network.input.shape[1:], name="pixels")
        prepared = backbones.preprocess(self.description.backbone, pixels)
        if at is None:
            pooling, *trained = self.head.layers
            head = keras.Sequential([keras.Input(self.head.input.shape[-1:]), *trained], name="head")
            return keras.Model(pixels, pooling(self.base(prepared)), name="trunk"), Tail(None, head)
        frozen, body = cut(self.base, layer_index(self.base, at))
        return keras.Model(pixels, frozen(prepared), name="trunk"), Tail(body, self.head)

    def trunk_identity(self, at: str | int | None) -> dict[str, Any]:
        """What the trunk of `cut(at)` makes of pixels depends on: what JSON can hold."""
        trunk, _ = self.cut(at)
        return {
            "backbone": self.description.backbone,
            "image_size": self.description.image_size,
            "preprocessing": self.description.preprocessing,
            "cut": None if at is None else layer_index(self.base, at),
            "weights": cache.digest(np.ascontiguousarray(weight) for weight in trunk.get_weights()),
            "precision": keras.config.dtype_policy().name,
        }

    @cached_property
    def _forward(self) -> Any:
        return tf.function(lambda pixels: self.network(pixels, training=False), reduce_retracing=True)

    def logits(self, images: tf.data.Dataset, total: int | None = None, description: str = "scoring") -> np.ndarray:
        """float32 [examples, classes] for batches of (images, labels) in their order, in inference mode."""
        batches = reporting.progress(images, description, total, "batch")
        return np.concatenate([self._forward(pixels).numpy() for pixels, _ in batches])

    def save(self, folder: Path | str) -> None:
        """Write weights and `model.json`; equal weights give equal bytes."""
        with reporting.whole(folder) as aside:
            aside.mkdir()
            self.network.save_weights(aside / WEIGHTS)
            reporting.write_json(aside / MODEL, asdict(self.description))


def assemble(description: Description, weights: str = "none") -> Classifier:
    """Build backbone and head, the backbone with `weights` as `backbones.build` takes them."""
    size = description.image_size
    base = backbones.build(description.backbone, size, weights)
    head = keras.Sequential(
        [
            keras.layers.GlobalAveragePooling2D(name="pooling"),
            keras.layers.Dropout(description.dropout, seed=description.seed, name="dropout"),
            keras.layers.Dense(
                len(description.class_names),
                kernel_initializer=keras.initializers.GlorotUniform(description.seed),
                dtype="float32",
                name="logits",
            ),
        ],
        name="head",
    )
    pixels = keras.Input((size, size, 3), name="pixels")
    network = keras.Model(pixels, head(base(backbones.preprocess(description.backbone, pixels))), name="classifier")
    return Classifier(description, base, head, network)


def create(
    backbone: str, class_names: Sequence[str], image_size: int | None, dropout: float, seed: int, weights: str
) -> Classifier:
    """A new classifier around a backbone of the table, with pretrained weights and a random head."""
    size = image_size or backbones.find(backbone).image_size
    description = Description(
        backbone=backbone,
        image_size=size,
        class_names=list(class_names),
        dropout=dropout,
        seed=seed,
        pretrained=weights if weights in {"imagenet", "none"} else Path(weights).name,
        weights_digest=backbones.digest(backbone, weights),
        preprocessing=backbones.find(backbone).preprocessing,
        multiply_adds=0,
    )
    built = assemble(description, weights)
    counted = backbones.multiply_adds(built.base)
    return replace(built, description=replace(description, multiply_adds=counted))


def load(folder: Path | str, **changes: Any) -> Classifier:
    """What `save` wrote. `changes` replace values of the description, such as `image_size` or `dropout`.

    Raises:
        InputError: a file is missing, or doesn't hold such a classifier.
    """
    folder = Path(folder)
    saved = reporting.read_json(folder / MODEL)
    try:
        description = Description(**{**saved, **changes})
    except TypeError as error:
        raise InputError(f"{folder / MODEL}: expected a classifier's description, received {error}") from None
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder / WEIGHTS}: expected weights that an earlier stage wrote, found none")
    classifier = assemble(description)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each layer that doesn't fit, a hundred lines before the error
            classifier.network.load_weights(folder / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        received = " ".join(str(error).split())[:500]
        raise InputError(
            f"{folder / WEIGHTS}: expected weights of {description.backbone}, received {received}"
        ) from None
    if changes.get("image_size"):
        counted = backbones.multiply_adds(classifier.base)
        return replace(classifier, description=replace(description, multiply_adds=counted))
    return classifier


def layer_index(base: keras.Model, at: str | int) -> int:
    """The index in `base.layers` of the layer named, or given by its index.

    Raises:
        InputError: there is no such layer.
    """
    names = [layer.name for layer in base.layers]
    if isinstance(at, int) and 0 <= at < len(names):
        return at
    if at in names:
        return names.index(str(at))
    raise InputError(
        f"finetune.fine_tune_at: expected a layer of {base.name}: an index below {len(names)} or a name such as "
        f"{names[len(names) // 2]}; received {at!r}"
    )


def cut(base: keras.Model, index: int) -> tuple[keras.Model, keras.Model]:
    """Cut a functional model before `base.layers[index]` into two that make the same of an image in a row.

    The tensors that frozen layers make and trained ones use are the boundary; a cut inside a residual block has
    several. Operations that are no layers, such as `x + y`, are trained where anything they use is.
    """
    if index == 0:
        return keras.Sequential([keras.Input(base.input.shape[1:]), keras.layers.Identity()], name="frozen"), base
    frozen_layers = {id(layer) for layer in base.layers[:index]}
    is_layer = {id(layer) for layer in base.layers}
    nodes = [node for depth in sorted(base._nodes_by_depth, reverse=True) for node in base._nodes_by_depth[depth]]
    trained: set[int] = set()
    boundary: dict[int, Any] = {}
    for node in nodes:
        operation = node.operation
        uses_trained = any(id(tensor) in trained for tensor in node.input_tensors)
        if id(operation) in frozen_layers or (id(operation) not in is_layer and not uses_trained):
            continue
        trained.update(id(tensor) for tensor in node.output_tensors)
        boundary.update((id(tensor), tensor) for tensor in node.input_tensors if id(tensor) not in trained)
    tensors = list(boundary.values())
    crossing = tensors[0] if len(tensors) == 1 else tensors
    return keras.Model(base.input, crossing, name="frozen"), keras.Model(crossing, base.output, name="body")


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, top-5 accuracy (fractions) and mean cross-entropy (nats) of float logits [n, classes]."""
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels]
    # Ties count against the prediction but for the index order that argmax has.
    rank = (logits > own[:, None]).sum(axis=1) + (
        (logits == own[:, None]) & (np.arange(logits.shape[1]) < labels[:, None])
    ).sum(axis=1)
    highest = logits.max(axis=1)
    log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return {
        "accuracy": float((rank == 0).mean()),
        "top5_accuracy": float((rank < 5).mean()),
        "loss": float((log_sum - own).mean()),
    }
