"""Classifiers: their head and pooling, what their trained layers train, saving and loading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import randomize
from pictures import picture
from PIL import Image

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.images import Stored, to_square
from flatmin.models import build, classifier, registry
from flatmin.models.classifier import Classifier

CLASSES = ("a", "b", "c", "d")
DESCRIPTION = classifier.Description("MobileNet025", 32, CLASSES, 0.5, 1, "none", None, "tf", 0)


def create(
    backbone: str = "MobileNet025", size: int = 32, dropout: float = 0.5, seed: int = 1, **head: Any
) -> Classifier:
    return classifier.create(backbone, CLASSES, image_size=size, dropout=dropout, seed=seed, weights="none", **head)


@pytest.fixture(scope="module")
def shared_model() -> Classifier:
    return create()


@pytest.fixture
def model(shared_model: Classifier) -> Classifier:
    """A MobileNet025 with random weights, the same in every test."""
    randomize(shared_model.network)
    return shared_model


def pixels(size: int = 32, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


# The trained layers


@pytest.mark.parametrize("at", [0, "conv_dw_8", None])
def test_trained_layers_training_keeps_batchnorm_statistics(model: Classifier, at: str | int | None) -> None:
    frozen, trained = model.split(at)
    statistics = [variable for variable in model.base.variables if "moving" in variable.path]
    assert len(statistics) == 54
    before = [np.array(variable) for variable in statistics]
    trained(frozen(pixels(), training=False), training=True)
    for variable, value in zip(statistics, before, strict=True):
        np.testing.assert_array_equal(np.array(variable), value)
    assert not any("moving" in variable.path for variable in trained.trainable_variables)


def test_trained_layers_gradients_reach_gamma_and_beta(model: Classifier) -> None:
    frozen, trained = model.split("conv_dw_8")
    names = [variable.path.split("/")[-1] for variable in trained.trainable_variables]
    assert names.count("gamma") == names.count("beta") == 12
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(trained(frozen(pixels(), training=False), training=True) ** 2)
    gradients = tape.gradient(loss, [variable.value for variable in trained.trainable_variables])
    assert all(np.any(gradient) for gradient in gradients)


def test_trained_layers_dropout_is_on_only_in_training(model: Classifier) -> None:
    frozen, trained = model.split("conv_dw_8")
    activations = frozen(pixels(), training=False)
    first, second = (trained(activations, training=True).numpy() for _ in range(2))
    assert np.abs(first - second).max() > 0
    np.testing.assert_array_equal(trained(activations, training=False), trained(activations, training=False))


@pytest.mark.slow
def test_trained_layers_backbone_dropout_is_off_in_training() -> None:
    model = create("EfficientNetB0", dropout=0.0)  # which drops whole blocks
    randomize(model.base)
    frozen, trained = model.split("block5a_expand_conv")
    activations = frozen(pixels(), training=False)
    np.testing.assert_array_equal(trained(activations, training=True), trained(activations, training=False))


def test_trained_layers_share_weights_with_network(model: Classifier) -> None:
    _, trained = model.split("conv_dw_8")
    before = model.network(pixels(), training=False).numpy()
    trained.trainable_variables[-1].assign_add(np.arange(4.0))
    after = model.network(pixels(), training=False).numpy()
    np.testing.assert_allclose(after - before, np.tile(np.arange(4.0), (2, 1)), atol=1e-5)


def test_split_at_zero_freezes_nothing_and_none_trains_head_only(model: Classifier) -> None:
    frozen, trained = model.split(0)
    assert not frozen.variables
    assert len(trained.trainable_variables) == len(model.network.trainable_variables)
    _, trained = model.split(None)
    assert trained.backbone_layers is None
    assert [id(each) for each in trained.variables] == [id(each) for each in model.head.variables]


def test_split_unknown_layer_is_refused(model: Classifier) -> None:
    with pytest.raises(InputError, match=r"^finetune.fine_tune_at: .* an index below 86 .* received 'conv_dw_99'$"):
        model.split("conv_dw_99")


def test_frozen_identity_changes_with_split_and_frozen_weights_only(model: Classifier) -> None:
    before = {at: model.frozen_identity(at) for at in ("conv_dw_8", "conv_dw_9", None)}
    assert json.loads(json.dumps(before["conv_dw_8"])) == before["conv_dw_8"]
    assert before["conv_dw_8"] != before["conv_dw_9"] != before[None]
    assert model.frozen_identity(50) == model.frozen_identity(model.base.layers[50].name)
    last = model.base.get_layer("conv_pw_13_bn").gamma  # behind the first two split points
    last.assign_add(np.ones(last.shape))
    after = {at: model.frozen_identity(at) for at in before}
    assert [at for at in before if after[at] != before[at]] == [None]


def test_split_mixed_precision_gives_float32_logits() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        frozen, trained = create().split("conv_dw_8")
        assert trained(frozen(pixels(), training=False)).dtype == tf.float32
    finally:
        keras.config.set_dtype_policy("float32")


# Head and pooling


def test_create_head_is_drawn_by_seed() -> None:
    def kernel(seed: int) -> np.ndarray:
        description = dataclasses.replace(DESCRIPTION, seed=seed)
        return np.array(classifier._head(description, 8).trainable_variables[0])

    np.testing.assert_array_equal(kernel(1), kernel(1))
    assert np.any(kernel(1) != kernel(2))


@pytest.mark.slow
def test_fit_standardization_all_levels_standardizes_every_resolution() -> None:
    model = create("EfficientNetLite0", 64, levels="all", hidden_units=8)
    randomize(model.base)
    images = pixels(64, 5) * np.linspace(0, 1, 5, dtype=np.float32)[:, None, None, None]
    preprocessed = registry.preprocess("EfficientNetLite0", images)
    ends = [f"{name}_expand_activation" for name in ("block2a", "block3a", "block4a", "block6a")]
    tensors = [model.base.get_layer(name).output for name in (*ends, "top_activation")]
    assert [tensor.shape[1] for tensor in tensors] == [32, 16, 8, 4, 2]
    maps = keras.Model(model.base.input, tensors)(preprocessed, training=False)
    expected = np.concatenate([np.mean(each, axis=(1, 2)) for each in maps], axis=1)
    np.testing.assert_allclose(model.features(preprocessed, training=False), expected, rtol=1e-3, atol=1e-5)
    classifier.fit_standardization(model, np.split(images, [2, 4]))
    expected = (expected - expected.mean(axis=0)) / np.sqrt(expected.var(axis=0) + 1e-5)
    features = model.features(preprocessed, training=False).numpy()
    assert np.abs(features).max() > 1
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3)
    hidden, hidden_bias, kernel, bias = (np.array(variable) for variable in model.head.trainable_variables)
    logits = np.maximum(features @ hidden + hidden_bias, 0) @ kernel + bias
    np.testing.assert_allclose(model.network(images, training=False), logits, rtol=1e-3, atol=1e-5)
    frozen, _ = model.split("block4a_expand_conv")
    shapes = [tensor.shape[1:] for tensor in frozen.outputs]
    assert shapes == [(8, 8, 40), (96,), (144,)]  # frozen resolutions are pooled before the split


def test_fit_standardization_last_level_changes_nothing(model: Classifier) -> None:
    before = model.network.get_weights()
    classifier.fit_standardization(model, [pixels()])
    for one, other in zip(model.network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("EfficientNetB0", [96, 144, 240, 672, 1280]),  # of the next stage's expansion; no gate of one pixel
        ("ConvNeXtTiny", [96, 192, 384, 768]),  # of sums, which are no layers
    ],
)
def test_pooled_all_levels_takes_last_activations_of_each_resolution(name: str, channels: list[int]) -> None:
    levels = classifier.pooled(build.build(name, 64, "none"), "all").get_layer("levels").input
    assert [tensor.shape[1] for tensor in levels] == channels
    maps = [tensor._keras_history.operation.input for tensor in levels]
    assert min(tensor.shape[1] for tensor in maps) == 2
    if name == "ConvNeXtTiny":
        assert {type(tensor._keras_history.operation).__name__ for tensor in maps[:-1]} == {"Add"}


# Saving and loading


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("head", [{}, {"levels": "all", "hidden_units": 8}])
def test_save_and_load_restore_classifier(head: dict[str, Any], tmp_path: Path) -> None:
    model = create(**head)
    randomize(model.network)
    model.save(tmp_path / "one")
    loaded = classifier.load(tmp_path / "one")
    loaded.save(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    batches = np.split(pixels(count=5), [2, 4])
    logits = model.logits(batches)
    np.testing.assert_array_equal(loaded.logits(batches), logits)
    assert logits.shape == (5, 4)
    np.testing.assert_allclose(logits, model.network(pixels(count=5), training=False), rtol=1e-4, atol=1e-5)
    changed = classifier.load(tmp_path / "one", image_size=64, dropout=0.0, fine_tune_at="conv_dw_8")
    assert changed.description.multiply_adds > 3 * loaded.description.multiply_adds
    assert changed.description == dataclasses.replace(
        loaded.description,
        image_size=64,
        dropout=0.0,
        fine_tune_at="conv_dw_8",
        multiply_adds=build.multiply_adds(changed.base),
    )
    for one, other in zip(changed.network.trainable_variables, loaded.network.trainable_variables, strict=True):
        np.testing.assert_array_equal(np.array(one), np.array(other))


def test_save_equal_weights_give_equal_bytes(model: Classifier, tmp_path: Path) -> None:
    for name in ("one", "two"):
        model.save(tmp_path / name)
    assert set(contents(tmp_path / "one")) == {"classifier.weights.h5", "model.json"}
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    model.head.trainable_variables[-1].assign_add(np.ones(4))
    model.save(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "two")


def test_save_interrupted_leaves_the_old_one(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path / "model")
    before = contents(tmp_path / "model")
    model.head.trainable_variables[1].assign(np.ones(4))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save(tmp_path / "model")
    assert contents(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_save_writes_description(model: Classifier, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    described = json.loads((tmp_path / "model/model.json").read_text())
    assert described.pop("multiply_adds") > 0
    assert described == {
        "backbone": "MobileNet025",
        "class_names": list(CLASSES),
        "dropout": 0.5,
        "fine_tune_at": None,
        "hidden_units": 0,
        "image_size": 32,
        "levels": "last",
        "preprocessing": "tf",
        "pretrained": "none",
        "seed": 1,
        "weights_digest": None,
        "fit": "squash",
        "stored_side": None,
        "stored_enlarge": True,
        "temperature": None,
    }


def test_describe_input_of_is_what_the_records_gave(tmp_path: Path) -> None:
    stored = Stored(20, enlarge=False)
    made = classifier.create(
        "MobileNet025", CLASSES, image_size=32, dropout=0.5, seed=1, weights="none", fit="crop", stored=stored
    )
    made.save(tmp_path / "model")
    description = classifier.describe(tmp_path / "model")
    image = picture(width=60, height=40)
    expected = to_square(image.resize((30, 20), Image.Resampling.BICUBIC), 32, "crop")
    np.testing.assert_array_equal(description.input_of(image), np.asarray(expected))
    assert description.input_of(image).shape == (32, 32, 3)


def test_create_default_image_size_is_backbones() -> None:
    model = classifier.create("MobileNet025", CLASSES, image_size=None, dropout=0.1, seed=1, weights="none")
    assert model.description.image_size == 224


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        pytest.param("model.json", None, "expected a file", id="no description"),
        pytest.param("model.json", b"{", "expected JSON", id="half a description"),
        pytest.param("model.json", b"[]", "expected a JSON object", id="another description"),
        pytest.param("model.json", b"{}", "expected a classifier's description", id="an empty description"),
        pytest.param("model.json", b'{"colour": 1}', "expected a classifier's description", id="an unknown key"),
        pytest.param("classifier.weights.h5", None, "expected weights", id="no weights"),
    ],
)
def test_load_damaged_file_is_named_in_one_line(
    model: Classifier, tmp_path: Path, name: str, content: bytes | None, expected: str
) -> None:
    model.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        classifier.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {expected}")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_load_damaged_weights_or_those_of_another_network_are_refused(model: Classifier, tmp_path: Path) -> None:
    model.save(tmp_path)
    path = tmp_path / "classifier.weights.h5"
    whole = path.read_bytes()
    with h5py.File(tmp_path / "empty.h5", "w"):
        pass
    for content in (b"", whole[: len(whole) // 2], (tmp_path / "empty.h5").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"^{path}: expected weights of MobileNet025") as caught:
            classifier.load(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    with pytest.raises(InputError, match="expected weights of MobileNet025"):
        classifier.load(tmp_path, class_names=["a", "b"])
    with pytest.raises(InputError, match="expected weights of EfficientNetLite0") as caught:
        classifier.load(tmp_path, backbone="EfficientNetLite0")
    assert "\n" not in str(caught.value)
