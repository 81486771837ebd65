"""A classifier of backbone, pooling and head: built, split into frozen and trained layers, saved and loaded."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.images import OWN_SIZE, Fit, Stored, to_square
from flatmin.models import build, registry
from flatmin.models.split import layer_index, nodes, split_model
from flatmin.models.weights_files import weights_digest

WEIGHTS = "classifier.weights.h5"
MODEL = "model.json"
VAL_LOGITS = "val_logits.npy"
STANDARDIZED = "standardized"  # the layer that `fit_standardization` sets; the name stands in saved weights
# These change an image's height and width a little, so their outputs count as no resolution of the network.
_RESIZING_LAYERS = (keras.layers.ZeroPadding2D, keras.layers.Cropping2D)
Levels = Literal["last", "all"]


@dataclass(frozen=True)
class Description:
    """The contents of `model.json`: all that is needed to assemble the same network again.

    Attributes:
        backbone: a name in `registry.BACKBONES`.
        image_size: height and width in pixels.
        class_names: one for each output, in order.
        dropout: the rate of the head's dropout.
        seed: draws the head's initial weights and its dropout.
        pretrained: `imagenet`, `none`, or the name of the file that the backbone's weights came from.
        weights_digest: that file's SHA-256; None for random weights and for Keras' own download.
        preprocessing: the mode of `registry.preprocess`.
        multiply_adds: of the backbone, for one image.
        fine_tune_at: the split point, the first trained layer by name or index; None trains the head alone.
        levels, hidden_units: as in `extract` of params.yaml.
        fit, stored_side, stored_enlarge: how pictures became what the network was trained on: `input_of` does it again.
        temperature: what its logits are divided by before softmax, fitted on val; None until finalize fits it.
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
    fit: Fit = "squash"
    stored_side: int | None = None
    stored_enlarge: bool = True
    temperature: float | None = None

    def input_of(self, picture: Image.Image) -> np.ndarray:
        """What the network sees of a picture, as `flatmin.images.read` gives it: uint8 [image_size, image_size, 3]."""
        stored = Stored(self.stored_side, self.stored_enlarge).resize(picture)
        return np.asarray(to_square(stored, self.image_size, self.fit))


class TrainedLayers(keras.Model):
    """The layers after the split: activations at the split -> logits, float32 [batch, classes].

    The backbone's layers always run in inference mode: BatchNorm keeps ImageNet's statistics while its gamma and beta
    are trained, and the backbone's own dropout is off. The head's dropout follows `training`.

    Attributes:
        backbone_layers: the trained layers of the backbone, with its pooling; None if the head alone is trained.
        head: pooled features -> logits.
    """

    def __init__(self, backbone_layers: keras.Model | None, head: keras.Model) -> None:
        # Names stand in the traced graph, which sums gradients in an order that follows from them: with another name
        # here or in `split_model`, second derivatives differ in their last bits.
        super().__init__(name="tail")
        self.backbone_layers = backbone_layers
        self.head = head

    def call(self, activations: Any, training: bool = False) -> tf.Tensor:
        features = activations if self.backbone_layers is None else self.backbone_layers(activations, training=False)
        return self.head(features, training=training)


@dataclass(frozen=True)
class Classifier:
    """A network and its parts, which share their weights.

    Attributes:
        description: what the network is.
        base: the backbone, from preprocessed images to feature maps.
        features: the backbone with its pooling, as one model: preprocessed images -> [batch, channels], float32 if
            `levels` is `all`, else of the dtype policy's compute dtype.
        head: features -> logits, float32 [batch, classes].
        network: all of it, from pixels float32 [batch, size, size, 3] in [0, 255] to logits.
    """

    description: Description
    base: keras.Model
    features: keras.Model
    head: keras.Model
    network: keras.Model = field(repr=False)

    def split(self, at: str | int | None) -> tuple[keras.Model, TrainedLayers]:
        """Split the network into frozen and trained layers, which share this classifier's weights.

        Args:
            at: the split point, the first trained layer of the backbone, by name or index; None trains the head alone.

        Returns:
            The frozen layers, from pixels float32 [batch, size, size, 3] in [0, 255] to the activations at the split:
            one tensor, or a list of several. And the trained layers, from these activations to logits.

        Raises:
            InputError: there is no such layer.
        """
        pixels = keras.Input(self.network.input.shape[1:], name="pixels")
        preprocessed = registry.preprocess(self.description.backbone, pixels)
        if at is None:
            activations, backbone_layers = self.features(preprocessed), None
        else:
            index = layer_index(self.base, at)
            frozen, backbone_layers = split_model(self.features, self.base.layers, index)
            activations = frozen(preprocessed)
        return keras.Model(pixels, activations, name="frozen_layers"), TrainedLayers(backbone_layers, self.head)

    def frozen_identity(self, at: str | int | None) -> dict[str, Any]:
        """Describe, as JSON, all that the activations at the split `at` depend on but the pixels."""
        frozen, _ = self.split(at)
        return {
            "backbone": self.description.backbone,
            "image_size": self.description.image_size,
            "preprocessing": self.description.preprocessing,
            "split": None if at is None else layer_index(self.base, at),
            "levels": self.description.levels,
            "weights": files.digest(np.ascontiguousarray(weight) for weight in frozen.get_weights()),
            "precision": keras.config.dtype_policy().name,
        }

    @cached_property
    def _forward(self) -> Any:
        return tf.function(lambda pixels: self.network(pixels, training=False), reduce_retracing=True)

    def logits_of(self, pixels: Any) -> np.ndarray:
        """Compute the logits of one batch in inference mode: float32 [batch, size, size, 3] -> [batch, classes]."""
        return self._forward(pixels).numpy()

    def logits(self, images: Iterable[Any], total: int | None = None, description: str = "scoring") -> np.ndarray:
        """Compute logits in inference mode.

        Args:
            images: batches of pixels, float32 [batch, size, size, 3].
            total: the number of batches, for the progress bar.
            description: the progress bar's label.

        Returns:
            float32 [examples, classes], in the order of the images.
        """
        batches = console.progress(images, description, total, "batch")
        return np.concatenate([self.logits_of(pixels) for pixels in batches])

    def save(self, folder: Path | str, val_logits: np.ndarray | None = None) -> None:
        """Write the weights, `model.json` and, if given, `val_logits.npy` into a folder; equal ones give equal bytes.

        val_logits: float32 [val images, classes], in the records' order.
        """
        with files.atomic_write(folder) as temporary:
            temporary.mkdir()
            self.network.save_weights(temporary / WEIGHTS)
            if val_logits is not None:
                np.save(temporary / VAL_LOGITS, val_logits)
            files.write_json(temporary / MODEL, asdict(self.description))


def assemble(description: Description, weights: str = "none") -> Classifier:
    """Build the classifier that a description describes, its backbone with `weights` as `build.build` accepts them."""
    size = description.image_size
    base = build.build(description.backbone, size, weights)
    features = pooled(base, description.levels)
    head = _head(description, features.output.shape[-1])
    pixels = keras.Input((size, size, 3), name="pixels")
    preprocessed = registry.preprocess(description.backbone, pixels)
    network = keras.Model(pixels, head(features(preprocessed)), name="classifier")
    return Classifier(description, base, features, head, network)


def pooled(base: keras.Model, levels: Levels) -> keras.Model:
    """Add global average pooling to a backbone: of its output, or of the last activations at each of its resolutions.

    Intermediate features help on classes that the network was not trained for (Head2Toe, arXiv:2201.03529). The pooled
    resolutions are concatenated from the largest to the smallest, and each channel is standardized with the statistics
    that `fit_standardization` sets.

    Args:
        base: a backbone, as `build.build` returns it.
        levels: `last` for the output alone, `all` for all resolutions but that of the images.

    Returns:
        A model from preprocessed images to [batch, channels].
    """
    if levels == "last":
        return keras.Model(
            base.input, keras.layers.GlobalAveragePooling2D(name="pooling")(base.output), name="features"
        )
    last: dict[int, Any] = {}  # the number of rows -> the last tensor with that number
    for node in nodes(base):
        for tensor in node.output_tensors:
            has_rows = len(tensor.shape) == 4 and tensor.shape[1] > 1  # unlike the gates of squeeze-and-excitation
            if has_rows and tensor.shape[1] != base.input.shape[1] and not isinstance(node.operation, _RESIZING_LAYERS):
                last[tensor.shape[1]] = tensor
    last[base.output.shape[1]] = base.output
    vectors = [keras.layers.GlobalAveragePooling2D(name=f"pooling_{rows}")(each) for rows, each in last.items()]
    scaled = keras.layers.BatchNormalization(
        epsilon=1e-5, center=False, scale=False, trainable=False, dtype="float32", name=STANDARDIZED
    )(keras.layers.Concatenate(name="levels")(vectors))
    return keras.Model(base.input, scaled, name="features")


def fit_standardization(model: Classifier, images: Iterable[Any]) -> None:
    """Set the standardization layer's mean and variance from these images. Done once, before the head is trained.

    Args:
        model: a classifier; it is left as it is unless its `levels` are `all`.
        images: batches of pixels, float32 [batch, size, size, 3].
    """
    if model.description.levels == "last":
        return
    layer = model.features.get_layer(STANDARDIZED)
    name = model.description.backbone
    unstandardized = keras.Model(model.base.input, layer.input)
    forward = tf.function(
        lambda pixels: unstandardized(registry.preprocess(name, pixels), training=False), reduce_retracing=True
    )
    batches = console.progress(images, "standardizing", unit="batch")
    features = np.concatenate([forward(pixels).numpy() for pixels in batches]).astype(np.float64)
    layer.moving_mean.assign(features.mean(axis=0))
    layer.moving_variance.assign(features.var(axis=0))


def _head(description: Description, channels: int) -> keras.Model:
    """Build the head: [batch, channels] -> logits, float32 [batch, classes]. Linear if there are no hidden units."""
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
    fit: Fit = "squash",
    stored: Stored = OWN_SIZE,
) -> Classifier:
    """Build a new classifier: a backbone with pretrained weights, and a head with random ones.

    Args:
        backbone: a name in `registry.BACKBONES`.
        class_names: one for each output, in order.
        image_size: height and width in pixels; None for the backbone's default.
        dropout: the rate of the head's dropout.
        seed: draws the head's weights and its dropout.
        weights: a setting that `weights_files.resolve_weights` accepts.
        levels, hidden_units: as in `extract` of params.yaml.
        fit, stored: of the pictures that it is trained on.

    Raises:
        InputError: as `build.build`.
    """
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
        fit=fit,
        stored_side=stored.side,
        stored_enlarge=stored.enlarge,
    )
    built = assemble(description, weights)
    counted = build.multiply_adds(built.base)
    return replace(built, description=replace(description, multiply_adds=counted))


def describe(folder: Path | str) -> Description:
    """Read the description of a saved classifier, without its weights.

    Raises:
        InputError: the file is missing, or is not such a description.
    """
    path = Path(folder) / MODEL
    try:
        return Description(**files.read_json(path))
    except TypeError as error:
        raise InputError(f"{path}: expected a classifier's description, received {error}") from None


def load(folder: Path | str, **changes: Any) -> Classifier:
    """Load a saved classifier.

    Args:
        folder: where `Classifier.save` wrote it.
        changes: replace values of the description, such as `image_size` or `dropout`.

    Raises:
        InputError: a file is missing or damaged, or the weights are not of this network.
    """
    folder = Path(folder)
    description = replace(describe(folder), **changes)
    classifier = assemble(description)
    _load_weights(classifier, folder)
    if changes.get("image_size"):
        counted = build.multiply_adds(classifier.base)
        return replace(classifier, description=replace(description, multiply_adds=counted))
    return classifier


def _load_weights(classifier: Classifier, folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder / WEIGHTS}: expected weights that an earlier stage wrote, received no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns about every layer that doesn't fit, before its error
            classifier.network.load_weights(folder / WEIGHTS)
    except (OSError, ValueError, KeyError) as error:
        received = " ".join(str(error).split())[:500]
        raise InputError(
            f"{folder / WEIGHTS}: expected weights of {classifier.description.backbone}, received {received}"
        ) from None


class Loader:
    """Loads saved classifiers one after another, for inference: networks of one architecture share one Keras model.

    So it is built and traced once. A classifier has its own weights only until the next one is loaded.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Classifier] = {}

    def load(self, folder: Path | str) -> tuple[Classifier, str]:
        """Load a classifier as `load` does; also return a digest, equal for classifiers that give equal logits."""
        folder = Path(folder)
        description = describe(folder)
        # What draws or names weights, and what is done to the logits, is no part of the network.
        values = asdict(replace(description, dropout=0, seed=0, temperature=None, pretrained="", weights_digest=None))
        architecture = json.dumps(values, sort_keys=True)
        if architecture in self._loaded:
            _load_weights(self._loaded[architecture], folder)
        else:
            self._loaded[architecture] = load(folder)
        digest = hashlib.sha256(f"{architecture} {files.sha256(folder / WEIGHTS)}".encode()).hexdigest()
        return self._loaded[architecture], digest
