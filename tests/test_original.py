"""studies/cifar100-original: its settings, its networks, and an epoch of each on few images with random weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from repository import ROOT
from trainings import run_stage

from flatmin.common import params
from flatmin.data import writer
from flatmin.models import classifier, split

VALUES: dict[str, Any] = yaml.safe_load((ROOT / "studies/cifar100-original/params.yaml").read_text())
SIZES = dict.fromkeys(VALUES["backbones"], 180) | {"NASNetMobile": 224}
PUBLISHED_SPLITS = {"ResNet50": 120, "MobileNetV2": 100}


def few_images(backbone: str) -> params.Params:
    """Return the study's params for an epoch on 200 images, of CIFAR-100 or else of the digits."""
    values = {**VALUES, "extract": VALUES["extract"] | {"epochs": 1, "weights": {backbone: "none"}}}
    if "TFDS_DATA_DIR" in os.environ:
        splits = {"train": "train[:4000]", "val": "validation[:8]", "test": "test[:8]"}
        values["data"] = VALUES["data"] | {"splits": splits, "train_per_class": 2}
    else:
        splits = {"train": "train[:400]", "val": "train[400:408]", "test": "train[408:416]"}
        data = {"source": "bundled", "name": "digits", "image_size": 72, "splits": splits, "train_per_class": 20}
        values["data"] = data
    return params.parse(values)


def test_params_recipes_are_the_published_ones() -> None:
    settings = params.parse(VALUES)
    for recipe, rate in ((settings.extract, 1e-3), (settings.finetune, 1e-4)):
        assert (recipe.optimizer, recipe.learning_rate, recipe.batch_size, recipe.epochs) == ("adam", rate, 128, 100)
        assert (recipe.dropout, recipe.label_smoothing, recipe.weight_decay, recipe.ema) == (0.2, 0, 0, None)
        assert recipe.early_stopping == params.EarlyStopping(patience=5, min_delta=1e-3)
        plateau = params.Plateau(name="plateau", factor=0.2, patience=3, min_delta=1e-4, minimum=1e-6)
        assert recipe.schedule == plateau
        assert recipe.views == 0
    assert settings.augment == params.Augment(engine="imgaug", n=3, m=7, flip=True)
    assert len(settings.backbones) == 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the records, which are the same for every backbone."""
    made = tmp_path_factory.mktemp("study")
    settings = few_images("ResNet50")
    writer.write(settings.data, made / "data/records")
    return made


@pytest.mark.slow
def test_extract_backbone_of_the_study_trains_an_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the smallest of the six networks, which tests of models build."""
    backbone = "MobileNetV2"
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FLATMIN_CACHE", str(folder / "cache"))
    settings = few_images(backbone)
    run_stage("extract_train", settings, backbone)
    found = json.loads(Path(f"metrics/extract/{backbone}.json").read_text())
    assert (found["epochs"], found["gradient_evaluations"], found["image_size"]) == (1, 200, SIZES[backbone])
    assert np.isfinite(found["val"]["loss"])
    at = VALUES["finetune"]["fine_tune_at"][backbone]
    network = classifier.load(Path("models/extract") / backbone, fine_tune_at=at)
    layers = network.base.layers
    assert [type(layer).__name__ for layer in network.head.layers] == ["Dropout", "Dense"]
    assert [layer.name for layer in network.features.layers if layer not in layers] == ["pooling"]
    first_trained = split.layer_index(network.base, at)
    assert first_trained == PUBLISHED_SPLITS.get(backbone, first_trained)
    _, trained_layers = network.split(network.description.fine_tune_at)
    trained = {id(variable) for variable in trained_layers.trainable_variables}
    for index, layer in enumerate(layers):
        are_trained = [id(variable) in trained for variable in layer.trainable_variables]
        assert are_trained == [index >= first_trained] * len(are_trained), layer.name
