"""LiteRT gives the activations that TensorFlow gives, or does not run; which of both is decided once."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import pytest
import tensorflow as tf

from flatmin import runtime
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime
from flatmin.features import cache, engine
from flatmin.features.engine import Engine
from flatmin.models import classifier
from flatmin.models.classifier import Classifier

SIZE = 32
PIXELS = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def efficientnet() -> Classifier:
    return classifier.create("EfficientNetLite0", ["a", "b"], image_size=SIZE, dropout=0.2, seed=0, weights="imagenet")


def choose(frozen: keras.Model, identity: Any, settings: Runtime | None = None) -> Engine:
    return engine.choose(frozen, identity, settings or Runtime(), lambda: PIXELS)


def fail(*_: object) -> Any:
    pytest.fail("converted or loaded again")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "split_point", "tensors"),
    [("EfficientNetLite0", "block5b_dwconv", 2), ("ResNet50", "conv4_block3_2_conv", 2)],
)
def test_engine_of_a_backbone_gives_tensorflows_activations(
    backbone: str,
    split_point: str,
    tensors: int,
    efficientnet: Classifier,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = efficientnet
    if backbone != "EfficientNetLite0":
        model = classifier.create(backbone, ["a", "b"], image_size=SIZE, dropout=0.2, seed=0, weights="none")
    frozen, _ = model.split(split_point)
    identity = model.frozen_identity(split_point)
    chosen = choose(frozen, identity)
    assert chosen.name == "litert"
    expected = tf.nest.flatten(frozen(PIXELS, training=False))
    assert len(expected) == tensors
    check_activations(chosen, expected)
    out, err = capfd.readouterr()
    assert out == ""
    assert "INFO" not in err
    # The conversion is cached, and loaded only for the first batch.
    monkeypatch.setattr(engine, "_converted", fail)
    with monkeypatch.context() as loading:
        loading.setattr(engine, "_compiled", fail)
        again = choose(frozen, identity, Runtime(engine="litert"))
    assert again.name == "litert"
    check_activations(again, expected)


def check_activations(chosen: Engine, expected: list[tf.Tensor]) -> None:
    for count in (5, 2, 5):  # batches of several sizes, the last of which is one that was there before
        for received, tensor in zip(chosen(PIXELS[:count]), expected, strict=True):
            scale = float(np.abs(tensor).max())
            np.testing.assert_allclose(received, tensor[:count], rtol=0, atol=engine.TOLERANCE["float32"] * scale)


@pytest.mark.slow
def test_engine_in_half_precision_rounds_where_the_processor_can(efficientnet: Classifier) -> None:
    frozen, _ = efficientnet.split(None)
    identity = efficientnet.frozen_identity(None)
    expected = frozen(PIXELS, training=False).numpy()

    def error(matmul: Literal["float32", "bfloat16", "half"]) -> float:
        chosen = choose(frozen, identity, Runtime(matmul=matmul))
        assert chosen.name == "litert"
        return float(np.linalg.norm(chosen(PIXELS)[0] - expected) / np.linalg.norm(expected))

    if runtime.has_float16():
        assert 1e-3 < error("half") < 3e-2
    else:
        assert error("half") < 1e-5
    assert error("bfloat16") < 1e-5
    assert error("float32") < 1e-5


def model_of(layer: Any) -> tuple[keras.Model, dict[str, str]]:
    pixels = keras.Input((SIZE, SIZE, 3))
    model = keras.Model(pixels, layer(pixels))
    return model, {"name": model.name}


def test_engine_tensorflow_when_asked_for_converts_nothing(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_converted", fail)
    frozen, identity = model_of(lambda x: x * 2)
    chosen = choose(frozen, identity, Runtime(engine="tensorflow"))
    assert chosen.name == "tensorflow"
    np.testing.assert_array_equal(chosen(PIXELS)[0], PIXELS * 2)
    assert list(cache_folder.iterdir()) == []


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_engine_under_a_half_precision_policy_is_tensorflow(
    precision: Literal["mixed_float16", "mixed_bfloat16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_converted", fail)
    frozen, identity = model_of(lambda x: x * 3)
    assert choose(frozen, identity, Runtime(precision=precision)).name == "tensorflow"


class Unknown(keras.layers.Layer):
    """An operation that LiteRT has not."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.math.erfinv(inputs / 1000), inputs.shape)


def test_engine_of_layers_that_cannot_be_converted_is_tensorflow_with_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, identity = model_of(Unknown())
    lines = []
    for _ in range(2):
        chosen = choose(frozen, identity)
        assert chosen.name == "tensorflow"
        np.testing.assert_allclose(chosen(PIXELS)[0], tf.math.erfinv(PIXELS / 1000), rtol=1e-5, atol=1e-7)
        out, err = capfd.readouterr()
        assert "Erfinv:" not in err
        lines.append(out)
        monkeypatch.setattr(engine, "_converted", fail)  # the refusal is cached, with its reason
    assert lines[0] == lines[1]
    assert lines[0].startswith("engine: TensorFlow runs the frozen layers, since LiteRT does not: ")
    assert lines[0].count("\n") == 1
    with pytest.raises(InputError, match=r"^runtime\.engine: expected frozen layers that LiteRT runs, received .+$"):
        choose(frozen, identity, Runtime(engine="litert"))


def test_engine_whose_activations_differ_is_tensorflow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that multiplies by three stands for one that computes something else."""
    triple = tf.function(lambda pixels: [pixels * 3], input_signature=[tf.TensorSpec((None, SIZE, SIZE, 3))])
    other = engine._converted(triple)
    monkeypatch.setattr(engine, "_converted", lambda _: other)
    frozen, identity = model_of(lambda x: x * 2)
    assert choose(frozen, identity).name == "tensorflow"
    assert "activations that differ by 0.5 of their norm" in capsys.readouterr().out
    frozen, identity = model_of(lambda x: x * 3)
    assert choose(frozen, identity).name == "litert"


def test_engine_without_its_library_is_tensorflow_but_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, identity = model_of(keras.layers.Rescaling(2.0))

    def fail_with(error: OSError) -> None:
        def raise_error(*_: object) -> None:
            raise error

        monkeypatch.setattr(engine, "_compiled", raise_error)

    fail_with(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        choose(frozen, identity)
    assert not list(cache.folder().rglob("*.txt")), "that is no reason to remember"
    fail_with(OSError("library.so: cannot open shared object file"))  # as ctypes raises it
    assert choose(frozen, identity).name == "tensorflow"


def test_engine_decision_is_keyed_by_layers_and_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    converted = []
    convert = engine._converted

    def counted(forward: Any) -> bytes:
        converted.append(1)
        return convert(forward)

    monkeypatch.setattr(engine, "_converted", counted)
    frozen, identity = model_of(lambda x: x * 2)
    choose(frozen, identity)
    choose(frozen, identity)
    assert len(converted) == 1
    choose(frozen, identity, Runtime(matmul="bfloat16"))
    choose(frozen, identity | {"weights": "others"})
    monkeypatch.setattr(engine, "machine", lambda: ["another"])
    choose(frozen, identity)
    assert len(converted) == 4
