"""A classifier: backbone, pooling and head, cut into a frozen trunk and a trained tail, saved and loaded whole."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.models import build, registry
from flatmin.models.split import layer_index, nodes, split_model
from flatmin.models.weights_files import weights_digest

WEIGHTS = "classifier.weights.h5"
MODEL = "model.json"
RESIZING = (keras.layers.ZeroPadding2D, keras.layers.Cropping2D)  # whose outputs are of no resolution of their own
STANDARDIZED = "standardized"
Levels = Literal["last", "all"]


@dataclass(frozen=True)
class Description:
    """What `model.json` holds: all that is needed to assemble the same network again.

    weights_digest: SHA-256 of the file that the backbone's weights came from, None for none or Keras' own download.
    levels, hidden_units: as params.yaml's `extract` has them.
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
    levels: Levels = "last"
    hidden_units: int = 0


class TrainedLayers(keras.Model):
    """The trained layers: boundary tensors -> logits, float32 [batch, classes].

    The backbone's part always runs in inference mode: BatchNorm keeps ImageNet's statistics while its gamma and beta
    are trained, and the backbone's own dropout is off. The head's dropout follows `training`.
    """

    def __init__(self, backbone_layers: keras.Model | None, head: keras.Model) -> None:
        super().__init__(name="tail")
        self.backbone_layers = backbone_layers
        self.head = head

    def call(self, boundary: Any, training: bool = False) -> tf.Tensor:
        features = boundary if self.backbone_layers is None else self.backbone_layers(boundary, training=False)
        return self.head(features, training=training)


@dataclass(frozen=True)
class Classifier:
    """What describes it, and its parts: images -> `base`, then pooled: `features` -> `head`: logits.

    features: the base with its pooling, one model: images as `base` takes them -> [batch, channels], with levels `all`
        float32, else of the policy's compute dtype.
    """

    description: Description
    base: keras.Model
    features: keras.Model
    head: keras.Model
    network: keras.Model = field(repr=False)

    def split(self, at: str | int | None) -> tuple[keras.Model, TrainedLayers]:
        """Trunk and tail, sharing this classifier's weights.

        Args:
            at: the first trained layer of the backbone, by name or index; None trains the head alone.

        Returns:
            trunk: pixels float32 [batch, size, size, 3] in [0, 255] -> boundary tensors; and the tail.
        """
        pixels = keras.Input(self.network.input.shape[1:], name="pixels")
        prepared = registry.preprocess(self.description.backbone, pixels)
        if at is None:
            return keras.Model(pixels, self.features(prepared), name="trunk"), TrainedLayers(None, self.head)
        frozen, body = split_model(self.features, self.base.layers, layer_index(self.base, at))
        return keras.Model(pixels, frozen(prepared), name="trunk"), TrainedLayers(body, self.head)

    def frozen_identity(self, at: str | int | None) -> dict[str, Any]:
        """What the trunk of `split(at)` makes of pixels depends on: what JSON can hold."""
        trunk, _ = self.split(at)
        return {
            "backbone": self.description.backbone,
            "image_size": self.description.image_size,
            "preprocessing": self.description.preprocessing,
            "cut": None if at is None else layer_index(self.base, at),
            "levels": self.description.levels,
            "weights": files.digest(np.ascontiguousarray(weight) for weight in trunk.get_weights()),
            "precision": keras.config.dtype_policy().name,
        }

    @cached_property
    def _forward(self) -> Any:
        return tf.function(lambda pixels: self.network(pixels, training=False), reduce_retracing=True)

    def logits(self, images: tf.data.Dataset, total: int | None = None, description: str = "scoring") -> np.ndarray:
        """float32 [examples, classes] for batches of (images, labels) in their order, in inference mode."""
        batches = console.progress(images, description, total, "batch")
        return np.concatenate([self._forward(pixels).numpy() for pixels, _ in batches])

    def save(self, folder: Path | str) -> None:
        """Write weights and `model.json`; equal weights give equal bytes."""
        with files.atomic_write(folder) as aside:
            aside.mkdir()
            self.network.save_weights(aside / WEIGHTS)
            files.write_json(aside / MODEL, asdict(self.description))


def assemble(description: Description, weights: str = "none") -> Classifier:
    """Build a classifier, its backbone with `weights` as `build.build` takes them."""
    size = description.image_size
    base = build.build(description.backbone, size, weights)
    features = pooled(base, description.levels)
    head = _head(description, features.output.shape[-1])
    pixels = keras.Input((size, size, 3), name="pixels")
    prepared = registry.preprocess(description.backbone, pixels)
    network = keras.Model(pixels, head(features(prepared)), name="classifier")
    return Classifier(description, base, features, head, network)


def pooled(base: keras.Model, levels: Levels) -> keras.Model:
    """A backbone with global average pooling: of its output, or of the last activations of each of its resolutions.

    What a network makes before its last layers serves classes that it was not trained for (Head2Toe, arXiv:2201.03529).
    Resolutions stand one behind the other, each channel as `fit_standardization` has it.
    """
    if levels == "last":
        return keras.Model(
            base.input, keras.layers.GlobalAveragePooling2D(name="pooling")(base.output), name="features"
        )
    last: dict[int, Any] = {}
    for node in nodes(base):
        for tensor in node.output_tensors:
            is_image = len(tensor.shape) == 4 and tensor.shape[1] > 1  # not the gates of squeeze-and-excitation
            if is_image and tensor.shape[1] != base.input.shape[1] and not isinstance(node.operation, RESIZING):
                last[tensor.shape[1]] = tensor
    last[base.output.shape[1]] = base.output
    vectors = [keras.layers.GlobalAveragePooling2D(name=f"pooling_{rows}")(each) for rows, each in last.items()]
    scaled = keras.layers.BatchNormalization(
        epsilon=1e-5, center=False, scale=False, trainable=False, dtype="float32", name=STANDARDIZED
    )(keras.layers.Concatenate(name="levels")(vectors))
    return keras.Model(base.input, scaled, name="features")


def fit_standardization(model: Classifier, images: tf.data.Dataset) -> None:
    """Bring each channel that the head sees to mean 0 and variance 1 over these images; for good.

    Args:
        model: one with `levels` "all"; others are left as they are.
        images: batches as `views.plain` gives them.
    """
    if model.description.levels == "last":
        return
    layer = model.features.get_layer(STANDARDIZED)
    name = model.description.backbone
    plain = keras.Model(model.base.input, layer.input)
    forward = tf.function(
        lambda pixels: plain(registry.preprocess(name, pixels), training=False), reduce_retracing=True
    )
    batches = console.progress(images, "standardizing", unit="batch")
    features = np.concatenate([forward(pixels).numpy() for pixels, _ in batches]).astype(np.float64)
    layer.moving_mean.assign(features.mean(axis=0))
    layer.moving_variance.assign(features.var(axis=0))


def _head(description: Description, channels: int) -> keras.Model:
    """float32 [batch, channels] -> logits, float32 [batch, classes]; linear without hidden units."""
    layers = [
        keras.Input((channels,)),
        keras.layers.Dropout(description.dropout, seed=description.seed, name="dropout"),
    ]
    if description.hidden_units:
        initializer = keras.initializers.HeNormal(description.seed + 1)
        layers += [
            keras.layers.Dense(description.hidden_units, "relu", kernel_initializer=initializer, name="hidden"),
            keras.layers.Dropout(description.dropout, seed=description.seed + 1, name="hidden_dropout"),
        ]
    initializer = keras.initializers.GlorotUniform(description.seed)
    classes = len(description.class_names)
    layers += [keras.layers.Dense(classes, kernel_initializer=initializer, dtype="float32", name="logits")]
    return keras.Sequential(layers, name="head")


def create(
    backbone: str,
    class_names: Sequence[str],
    *,
    image_size: int | None,
    dropout: float,
    seed: int,
    weights: str,
    levels: Levels = "last",
    hidden_units: int = 0,
) -> Classifier:
    """A new classifier around a backbone of the table, with pretrained weights and a random head."""
    size = image_size or registry.find(backbone).image_size
    description = Description(
        backbone=backbone,
        image_size=size,
        class_names=list(class_names),
        dropout=dropout,
        seed=seed,
        pretrained=weights if weights in {"imagenet", "none"} else Path(weights).name,
        weights_digest=weights_digest(backbone, weights),
        preprocessing=registry.find(backbone).preprocessing,
        multiply_adds=0,
        levels=levels,
        hidden_units=hidden_units,
    )
    built = assemble(description, weights)
    counted = build.multiply_adds(built.base)
    return replace(built, description=replace(description, multiply_adds=counted))


def describe(folder: Path | str) -> Description:
    """Of what `save` wrote, without its weights.

    Raises:
        InputError: the file is missing, or holds no description.
    """
    path = Path(folder) / MODEL
    try:
        return Description(**files.read_json(path))
    except TypeError as error:
        raise InputError(f"{path}: expected a classifier's description, received {error}") from None


def load(folder: Path | str, **changes: Any) -> Classifier:
    """What `save` wrote. `changes` replace values of the description, such as `image_size` or `dropout`.

    Raises:
        InputError: a file is missing, or doesn't hold such a classifier.
    """
    folder = Path(folder)
    description = replace(describe(folder), **changes)
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
        counted = build.multiply_adds(classifier.base)
        return replace(classifier, description=replace(description, multiply_adds=counted))
    return classifier
