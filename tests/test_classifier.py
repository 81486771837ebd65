"""Cutting backbones of every kind, what a tail trains, saving and loading, and scores against plain references."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from flatmin.models import build, classifier, registry, scores, split

pass
from flatmin.common.errors import InputError
from flatmin.models.classifier import Classifier

CLASSES = ("a", "b", "c", "d")


def create(
    backbone: str = "MobileNet025", size: int = 32, dropout: float = 0.5, seed: int = 1, **head: Any
) -> Classifier:
    return classifier.create(backbone, CLASSES, size, dropout, seed, "none", **head)


def pixels(size: int = 32, count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype(np.float32)


def shake(model: keras.Model) -> None:
    """Give BatchNorm and biases values that do something: as built, many of them are 0 and 1."""
    random = np.random.default_rng(3)
    for variable in model.variables:
        if len(variable.shape) == 1 and variable.dtype == "float32":
            variable.assign(np.array(variable) + random.uniform(0.1, 0.5, variable.shape))


# Cutting

QUICK = ("MobileNet025", "EfficientNetLite0")
# Wider or deeper than another row, whose blocks and cut they have; "MobileNetV3" is another's second name.
ALIKE = {f"EfficientNet{name}" for name in ("B1", "B2", "B3", "Lite1", "Lite2")} | {"MobileNet", "MobileNetV3"}
SLOW = [name for name in registry.BACKBONES if name not in ALIKE.union(QUICK)]


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        *itertools.product(QUICK, ("last", "all")),
        *(pytest.param(name, "all", marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_trunk_and_tail_make_what_the_network_makes(name: str, levels: classifier.Levels) -> None:
    row = registry.find(name)
    size = max(64, row.smallest)
    built = create(name, size, levels=levels)
    shake(built.base)
    images = pixels(size, 1)
    logits = built.network(images, training=False).numpy()
    features = built.features(registry.preprocess(name, images), training=False).numpy()
    largest = np.abs(features).max()
    assert largest > 0  # what follows compares with it: random networks may give numbers near 1e-12
    layers = len(built.base.layers)
    cuts: list[str | int | None] = [row.fine_tune_at, layers // 3]
    if name in (*QUICK, "DenseNet121"):
        cuts += [0, 1, layers // 2 + 1, layers - 1, None]
    for at in cuts:
        trunk, tail = built.cut(at)
        boundary = trunk(images, training=False)
        pooled = boundary if tail.body is None else tail.body(boundary, training=False)
        np.testing.assert_allclose(pooled, features, rtol=0, atol=1e-5 * largest)
        np.testing.assert_allclose(tail(boundary), logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
        # Every weight is in one of the two parts, and no trained one is where the trunk computes with it.
        trained = {id(variable) for variable in tail.trainable_variables}
        frozen = {id(variable) for variable in trunk.variables}
        assert trained | frozen >= {id(variable) for variable in built.network.trainable_variables}
        assert not trained & frozen


@pytest.mark.parametrize("name", QUICK)
def test_the_cut_is_where_the_layer_is(name: str) -> None:
    built = create(name)
    index = split.layer_index(built.base, registry.find(name).fine_tune_at)
    _, tail = built.cut(index)
    trained = [variable.path for layer in built.base.layers[index:] for variable in layer.trainable_variables]
    assert tail.body is not None
    assert [variable.path for variable in tail.body.trainable_variables] == trained
    assert len(tail.trainable_variables) == len(trained) + 2


def test_cut_zero_trains_everything_and_none_the_head_alone() -> None:
    built = create()
    trunk, tail = built.cut(0)
    assert not trunk.variables
    assert len(tail.trainable_variables) == len(built.network.trainable_variables)
    trunk, tail = built.cut(None)
    assert [variable.path for variable in tail.trainable_variables] == [
        variable.path for variable in built.head.trainable_variables
    ]


def test_a_cut_within_a_residual_block_has_several_boundary_tensors() -> None:
    built = create("EfficientNetLite0")
    for at, tensors in (("block2b_expand_conv", 1), ("block2b_dwconv", 2), ("block2b_add", 2), ("block3a_dwconv", 1)):
        trunk, _ = built.cut(at)
        assert len(trunk.outputs) == tensors, at


def test_the_head_sees_every_resolution() -> None:
    built = create("EfficientNetLite0", 64, levels="all", hidden_units=8)
    shake(built.base)
    images = pixels(64, 5) * np.linspace(0, 1, 5, dtype=np.float32)[:, None, None, None]
    prepared = registry.preprocess("EfficientNetLite0", images)
    ends = [f"{name}_expand_activation" for name in ("block2a", "block3a", "block4a", "block6a")]
    tensors = [built.base.get_layer(name).output for name in (*ends, "top_activation")]
    assert [tensor.shape[1] for tensor in tensors] == [32, 16, 8, 4, 2]
    parts = [np.mean(each, axis=(1, 2)) for each in keras.Model(built.base.input, tensors)(prepared, training=False)]
    expected = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(built.features(prepared, training=False), expected, rtol=1e-3, atol=1e-5)
    classifier.standardize(built, tf.data.Dataset.from_tensor_slices((images, np.zeros(5))).batch(2))
    expected = (expected - expected.mean(axis=0)) / np.sqrt(expected.var(axis=0) + 1e-5)
    features = built.features(prepared, training=False).numpy()
    assert np.abs(features).max() > 1
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-3)
    hidden, into, kernel, bias = (np.array(variable) for variable in built.head.trainable_variables)
    logits = np.maximum(features @ hidden + into, 0) @ kernel + bias
    np.testing.assert_allclose(built.network(images, training=False), logits, rtol=1e-3, atol=1e-5)
    trunk, _ = built.cut("block4a_expand_conv")
    assert [tensor.shape[1:] for tensor in trunk.outputs] == [(8, 8, 40), (96,), (144,)], "pooled, not whole"


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("EfficientNetB0", [96, 144, 240, 672, 1280]),  # of the next stage's expansion; no gate of one pixel
        ("ConvNeXtTiny", [96, 192, 384, 768]),  # of sums, which are no layers
    ],
)
def test_a_resolution_is_what_the_network_makes_of_it_at_last(name: str, channels: list[int]) -> None:
    built = create(name, 64, levels="all")
    levels = built.features.get_layer("levels").input
    assert [tensor.shape[1] for tensor in levels] == channels
    pooled = [tensor._keras_history.operation.input for tensor in levels]
    assert min(tensor.shape[1] for tensor in pooled) == 2
    if name == "ConvNeXtTiny":
        assert {type(tensor._keras_history.operation).__name__ for tensor in pooled[:-1]} == {"Add"}


def test_name_and_index_are_the_same_cut() -> None:
    base = create().base
    for index, layer in enumerate(base.layers):
        assert split.layer_index(base, layer.name) == split.layer_index(base, index) == index


@pytest.mark.parametrize("at", ["conv_dw_99", "", -1, 86, 10_000])
def test_no_such_layer(at: str | int) -> None:
    built = create()
    assert len(built.base.layers) == 86
    with pytest.raises(
        InputError, match=r"^finetune.fine_tune_at: expected .* an index below 86 .* received"
    ) as caught:
        built.cut(at)
    assert repr(at) in str(caught.value)
    assert "\n" not in str(caught.value)


# The tail


@pytest.mark.parametrize("at", [0, "conv_dw_8", None])
def test_training_moves_no_batchnorm_statistics(at: str | int | None) -> None:
    built = create()
    shake(built.base)
    trunk, tail = built.cut(at)
    statistics = [variable for variable in built.base.variables if "moving" in variable.path]
    assert len(statistics) == 54
    before = [np.array(variable) for variable in statistics]
    tail(trunk(pixels(), training=False), training=True)
    for variable, value in zip(statistics, before, strict=True):
        np.testing.assert_array_equal(np.array(variable), value)
    assert not any("moving" in variable.path for variable in tail.trainable_variables)


def test_gamma_and_beta_are_trained() -> None:
    built = create()
    shake(built.base)
    trunk, tail = built.cut("conv_dw_8")
    names = [variable.path.split("/")[-1] for variable in tail.trainable_variables]
    assert names.count("gamma") == names.count("beta") == 12
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tail(trunk(pixels(), training=False), training=True) ** 2)
    gradients = tape.gradient(loss, [variable.value for variable in tail.trainable_variables])
    assert all(np.any(gradient) for gradient in gradients)


def test_only_the_heads_dropout_is_on_and_only_in_training() -> None:
    # MobileNet's own dropout stands behind its features; EfficientNetB0 drops whole blocks.
    built = create("EfficientNetB0", dropout=0.0)
    shake(built.base)
    trunk, tail = built.cut("block5a_expand_conv")
    boundary = trunk(pixels(), training=False)
    np.testing.assert_array_equal(tail(boundary, training=True), tail(boundary, training=False))
    built = create(dropout=0.5)
    shake(built.base)
    trunk, tail = built.cut("conv_dw_8")
    boundary = trunk(pixels(), training=False)
    first, second = tail(boundary, training=True).numpy(), tail(boundary, training=True).numpy()
    assert np.abs(first - second).max() > 0
    np.testing.assert_array_equal(tail(boundary, training=False), tail(boundary, training=False))


def test_the_tails_weights_are_the_networks() -> None:
    built = create()
    _, tail = built.cut("conv_dw_8")
    before = built.network(pixels(), training=False).numpy()
    tail.trainable_variables[-1].assign_add(np.arange(4.0))
    after = built.network(pixels(), training=False).numpy()
    np.testing.assert_allclose(after - before, np.tile(np.arange(4.0), (2, 1)), atol=1e-5)


def test_the_head_is_the_seeds() -> None:
    kernels = [np.array(create(seed=seed).head.trainable_variables[0]) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.any(kernels[0] != kernels[2])


def test_mixed_precision_gives_float32_logits() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        built = create()
        trunk, tail = built.cut("conv_dw_8")
        assert tail(trunk(pixels(), training=False)).dtype == tf.float32
    finally:
        keras.config.set_dtype_policy("float32")


# Saving and loading


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("head", [{}, {"levels": "all", "hidden_units": 8}])
def test_what_is_loaded_is_what_was_saved(head: dict[str, Any], tmp_path: Path) -> None:
    built = create(**head)
    shake(built.network)
    built.save(tmp_path / "one")
    built.save(tmp_path / "two")
    loaded = classifier.load(tmp_path / "one")
    loaded.save(tmp_path / "three")
    assert set(contents(tmp_path / "one")) == {"classifier.weights.h5", "model.json"}
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    dataset = tf.data.Dataset.from_tensor_slices((pixels(count=5), np.zeros(5, np.int32))).batch(2)
    logits = built.logits(dataset)
    np.testing.assert_array_equal(loaded.logits(dataset), logits)
    assert logits.shape == (5, 4)
    np.testing.assert_allclose(logits, built.network(pixels(count=5), training=False), rtol=1e-4, atol=1e-5)
    built.head.trainable_variables[-1].assign_add(np.ones(4))
    built.save(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "two")
    # What is loaded is a classifier like any other: it is cut and its description changed.
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


def test_the_description_says_what_it_is(tmp_path: Path) -> None:
    create().save(tmp_path / "model")
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
    }


def test_the_default_image_size_is_the_tables() -> None:
    assert classifier.create("MobileNet025", CLASSES, None, 0.1, 1, "none").description.image_size == 224


def damaged(folder: Path, name: str, content: bytes | None) -> Path:
    create().save(folder / "model")
    path = folder / "model" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    return folder / "model"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        pytest.param("model.json", None, "expected a file", id="no description"),
        pytest.param("model.json", b"{", "expected JSON", id="half a description"),
        pytest.param("model.json", b"[]", "expected a JSON object", id="another description"),
        pytest.param("model.json", b"{}", "expected a classifier's description", id="an empty description"),
        pytest.param("model.json", b'{"colour": 1}', "expected a classifier's description", id="an unknown key"),
        pytest.param("classifier.weights.h5", None, "expected weights", id="no weights"),
        pytest.param("classifier.weights.h5", b"", "expected weights of MobileNet025", id="empty weights"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    folder = damaged(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        classifier.load(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: {expected}")
    assert "\n" not in message


def test_truncated_weights_and_those_of_another_network(tmp_path: Path) -> None:
    create().save(tmp_path / "model")
    path = tmp_path / "model/classifier.weights.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="expected weights of MobileNet025"):
        classifier.load(tmp_path / "model")
    path.write_bytes(whole)
    with pytest.raises(InputError, match="expected weights of MobileNet025"):
        classifier.load(tmp_path / "model", class_names=["a", "b"])
    with pytest.raises(InputError, match="expected weights of EfficientNetLite0") as caught:
        classifier.load(tmp_path / "model", backbone="EfficientNetLite0")
    assert "\n" not in str(caught.value)
    with h5py.File(path, "w"):
        pass
    with pytest.raises(InputError, match="expected weights of MobileNet025"):
        classifier.load(tmp_path / "model")


def test_an_interrupted_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = create()
    built.save(tmp_path / "model")
    before = contents(tmp_path / "model")
    built.head.trainable_variables[1].assign(np.ones(4))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reporting, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built.save(tmp_path / "model")
    assert contents(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Scores


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(2, 12), st.floats(0.01, 100))
def test_scores_are_the_plain_ones(seed: int, count: int, classes: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    logits = (scale * random.normal(size=(count, classes))).astype(np.float32)
    labels = random.integers(0, classes, count)
    found = scores.score(logits, labels)
    assert set(found) == {"accuracy", "top5_accuracy", "loss"}
    assert all(type(value) is float for value in found.values())
    assert found["accuracy"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert found["top5_accuracy"] == pytest.approx((order == labels[:, None]).any(axis=1).mean())
    logarithms = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    assert found["loss"] == pytest.approx(-logarithms[np.arange(count), labels].mean(), abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(6, 12))
def test_ties_go_to_the_lower_index_as_argmax_has_it(seed: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.integers(0, 3, (20, classes)).astype(np.float32)
    labels = random.integers(0, classes, 20)
    found = scores.score(logits, labels)
    assert found["accuracy"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert found["top5_accuracy"] == pytest.approx((order == labels[:, None]).any(axis=1).mean())


def test_all_logits_equal_is_no_free_win() -> None:
    labels = np.arange(10)
    found = scores.score(np.zeros((10, 10), np.float32), labels)
    assert found == {"accuracy": 0.1, "top5_accuracy": 0.5, "loss": pytest.approx(np.log(10))}


def test_top5_of_fewer_than_six_classes_is_one() -> None:
    for classes in (2, 3, 4, 5):
        logits = np.random.default_rng(0).normal(size=(30, classes))
        assert scores.score(logits, np.arange(30) % classes)["top5_accuracy"] == 1


def test_large_logits_do_not_overflow() -> None:
    found = scores.score(np.array([[3e38, -3e38], [0, 1e4]], np.float32), np.array([0, 0]))
    assert found["loss"] == pytest.approx(5000)


def test_scores_of_a_diverged_network_are_not_finite() -> None:
    found = scores.score(np.full((2, 3), np.nan, np.float32), np.array([0, 1]))
    assert not np.isfinite(found["loss"])
    assert found["accuracy"] == 0, "where nothing is known, nothing is right"
