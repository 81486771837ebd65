"""Splitting a small network at every layer, and backbones of every kind at some."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
from networks import randomize, residual_network

from flatmin.common.errors import InputError
from flatmin.models import classifier, registry, split
from flatmin.models.classifier import Classifier


@pytest.fixture(scope="module")
def network() -> keras.Model:
    """A small network and a pooling that is none of its layers; tests only read it."""
    base = residual_network()
    return keras.Model(base.input, keras.layers.GlobalAveragePooling2D(name="pooling")(base.output))


def test_layer_index_name_and_index_agree(network: keras.Model) -> None:
    for index, layer in enumerate(network.layers):
        assert split.layer_index(network, layer.name) == split.layer_index(network, index) == index


@pytest.mark.parametrize("at", ["conv_dw_99", "", -1, 22, 10_000])
def test_layer_index_unknown_layer_is_refused(network: keras.Model, at: str | int) -> None:
    assert len(network.layers) == 22
    message = r"^finetune.fine_tune_at: expected .* an index below 22 or a name such as .*; received"
    with pytest.raises(InputError, match=message) as caught:
        split.layer_index(network, at)
    assert str(caught.value).endswith(repr(at))
    assert "\n" not in str(caught.value)


def test_split_model_at_every_layer_computes_the_same(network: keras.Model) -> None:
    layers = network.layers[:-1]  # without pooling, which is trained with what comes before it
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    expected = network(images, training=False).numpy()
    outputs = []
    for index in range(len(layers)):
        frozen, trained = split.split_model(network, layers, index)
        outputs.append(len(frozen.outputs))
        np.testing.assert_allclose(trained(frozen(images)), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        trained_variables = [variable for layer in layers[index:] for variable in layer.variables]
        assert [id(variable) for variable in trained.variables] == [id(variable) for variable in trained_variables]
        assert not {id(variable) for variable in frozen.variables} & {id(variable) for variable in trained_variables}
    # Behind the first layer of the second block the shortcut is a second tensor.
    assert outputs == [1] * 13 + [2] * 8


CHEAP = ("MobileNet025", "EfficientNetLite0")
# Wider or deeper than another row, with the same blocks and split point; "MobileNetV3" is another's second name.
ALIKE = {f"EfficientNet{name}" for name in ("B1", "B2", "B3", "Lite1", "Lite2")} | {"MobileNet", "MobileNetV3"}
OTHERS = [name for name in registry.BACKBONES if name not in ALIKE.union(CHEAP)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "levels"), [*itertools.product(CHEAP, ("last", "all")), *((n, "all") for n in OTHERS)]
)
def test_classifier_split_backbone_computes_the_same(name: str, levels: classifier.Levels) -> None:
    row = registry.find(name)
    size = max(64, row.smallest)
    model = create(name, size, levels)
    randomize(model.base)
    images = np.random.default_rng(0).uniform(0, 255, (1, size, size, 3)).astype(np.float32)
    logits = model.network(images, training=False).numpy()
    features = model.features(registry.preprocess(name, images), training=False).numpy()
    largest = np.abs(features).max()
    assert largest > 0
    layers = len(model.base.layers)
    points: list[str | int | None] = [row.fine_tune_at, layers // 3]
    if name in (*CHEAP, "DenseNet121"):
        points += [0, 1, layers // 2 + 1, layers - 1, None]
    for at in points:
        frozen, trained = model.split(at)
        activations = frozen(images, training=False)
        pooled = activations
        if trained.backbone_layers is not None:
            pooled = trained.backbone_layers(activations, training=False)
        np.testing.assert_allclose(pooled, features, rtol=0, atol=1e-5 * largest)
        np.testing.assert_allclose(trained(activations), logits, rtol=1e-5, atol=1e-5 * np.abs(logits).max())
        # Every weight is in one of the two parts, and the frozen layers use no trained one.
        trained_variables = {id(variable) for variable in trained.trainable_variables}
        frozen_variables = {id(variable) for variable in frozen.variables}
        assert trained_variables | frozen_variables >= {id(each) for each in model.network.trainable_variables}
        assert not trained_variables & frozen_variables
        if at is None:
            head = [variable.path for variable in model.head.trainable_variables]
            assert [variable.path for variable in trained.trainable_variables] == head
        else:
            later = model.base.layers[split.layer_index(model.base, at) :]
            expected = {variable.path for layer in later for variable in layer.trainable_variables}
            assert trained.backbone_layers is not None
            assert {variable.path for variable in trained.backbone_layers.trainable_variables} == expected


def create(name: str, size: int, levels: classifier.Levels) -> Classifier:
    return classifier.create(
        name, ["a", "b", "c", "d"], image_size=size, dropout=0.5, seed=1, weights="none", levels=levels
    )


@pytest.mark.slow
def test_classifier_split_in_residual_block_has_several_activations() -> None:
    model = create("EfficientNetLite0", 32, "last")
    for at, tensors in (("block2b_expand_conv", 1), ("block2b_dwconv", 2), ("block2b_add", 2), ("block3a_dwconv", 1)):
        frozen, _ = model.split(at)
        assert len(frozen.outputs) == tensors, at
