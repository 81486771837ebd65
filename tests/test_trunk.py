"""LiteRT makes of pixels what TensorFlow makes, or does not run."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Literal

import keras
import numpy as np
import pytest
import tensorflow as tf

from flatmin import runtime
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime
from flatmin.features import cache, engine
from flatmin.models import classifier

SIZE = 64
PIXELS = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3)).astype(np.float32)


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLATMIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "weights", "at", "tensors"),
    [
        ("EfficientNetLite0", "imagenet", None, 1),
        ("EfficientNetLite0", "imagenet", "block5b_dwconv", 2),
        ("MobileNet", "none", "conv_dw_8", 1),
        ("ResNet50", "none", "conv4_block3_2_conv", 2),
    ],
)
def test_litert_gives_what_tensorflow_gives(
    backbone: str, weights: str, at: str | None, tensors: int, capfd: pytest.CaptureFixture[str]
) -> None:
    built = classifier.create(backbone, ["a", "b"], SIZE, 0.2, 0, weights)
    frozen, _ = built.cut(at)
    identity = built.trunk_identity(at)
    name, run = engine.engine(frozen, identity, Runtime(), PIXELS)
    assert name == "litert"
    expected = tf.nest.flatten(frozen(PIXELS, training=False))
    assert len(expected) == tensors
    for count in (5, 2, 5):  # batches of several sizes, the last of which is one that was there before
        for received, tensor in zip(run(PIXELS[:count]), expected, strict=True):
            scale = float(np.abs(tensor).max())
            np.testing.assert_allclose(received, tensor[:count], rtol=0, atol=engine.TOLERANCE["float32"] * scale)
    out, err = capfd.readouterr()
    assert out == ""
    assert "INFO" not in err
    # The conversion is kept.
    kept = sorted((cache.folder() / "litert").glob("*/engine.tflite"))
    assert kept
    changed = [path.stat().st_mtime_ns for path in kept]
    engine.engine(frozen, identity, Runtime(trunk="litert"), PIXELS)
    assert [path.stat().st_mtime_ns for path in sorted((cache.folder() / "litert").glob("*/*.tflite"))] == changed


@pytest.mark.slow
def test_half_precision_rounds_where_the_processor_can() -> None:
    built = classifier.create("EfficientNetLite0", ["a", "b"], SIZE, 0.2, 0, "imagenet")
    frozen, _ = built.cut(None)
    name, run = engine.engine(frozen, built.trunk_identity(None), Runtime(matmul="half"), PIXELS)
    assert name == "litert"
    expected = frozen(PIXELS, training=False).numpy()

    def error(run: engine.Run) -> float:
        return float(np.linalg.norm(run(PIXELS)[0] - expected) / np.linalg.norm(expected))

    if runtime.has_float16():
        assert 1e-3 < error(run) < 3e-2
    else:
        assert error(run) < 1e-5
    _, run = engine.engine(frozen, built.trunk_identity(None), Runtime(matmul="bfloat16"), PIXELS)
    assert error(run) < 1e-5


def test_tensorflow_runs_it_where_it_is_asked_for() -> None:
    frozen, identity = model(lambda x: x * 2)
    name, run = engine.engine(frozen, identity, Runtime(trunk="tensorflow"), PIXELS)
    assert name == "tensorflow"
    np.testing.assert_array_equal(run(PIXELS)[0], PIXELS * 2)
    assert not (cache.folder() / "litert" / cache.key(identity, modules=["backbones", "classifier", "trunk"])).exists()


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_runs_in_tensorflow(precision: Literal["mixed_float16", "mixed_bfloat16"]) -> None:
    frozen, identity = model(lambda x: x * 3)
    assert engine.engine(frozen, identity, Runtime(precision=precision), PIXELS)[0] == "tensorflow"


class Unknown(keras.layers.Layer):
    """An operation that LiteRT has not."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.math.erfinv(inputs / 1000), inputs.shape)


def model(layer: object) -> tuple[keras.Model, dict[str, str]]:
    pixels = keras.Input((SIZE, SIZE, 3))
    made = keras.Model(pixels, layer(pixels))  # type: ignore[operator]
    return made, {"name": made.name}


def test_what_cannot_be_converted_runs_in_tensorflow(capfd: pytest.CaptureFixture[str]) -> None:
    frozen, identity = model(Unknown())
    name, run = engine.engine(frozen, identity, Runtime(), PIXELS)
    assert name == "tensorflow"
    np.testing.assert_allclose(run(PIXELS)[0], tf.math.erfinv(PIXELS / 1000), rtol=1e-5, atol=1e-7)
    line, err = capfd.readouterr()
    assert "Erfinv:" not in err
    assert line.startswith("trunk: TensorFlow runs it, since LiteRT does not: ")
    assert line.count("\n") == 1
    with pytest.raises(InputError, match=r"runtime\.trunk: expected a trunk that LiteRT runs, received .*"):
        engine.engine(frozen, identity, Runtime(trunk="litert"), PIXELS)


def test_a_missing_library_is_done_without_and_a_full_disk_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, identity = model(keras.layers.Rescaling(2.0))

    def fail_with(error: OSError) -> None:
        def fails(*_: object) -> None:
            raise error

        monkeypatch.setattr(trunk, "_litert", fails)

    fail_with(OSError("library.so: cannot open shared object file"))  # as ctypes raises it
    assert engine.engine(frozen, identity, Runtime(), PIXELS)[0] == "tensorflow"
    fail_with(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        engine.engine(frozen, identity, Runtime(), PIXELS)


def test_what_differs_runs_in_tensorflow(capsys: pytest.CaptureFixture[str]) -> None:
    """A kept conversion that is of another network stands for one that computes something else."""
    doubled, identity = model(lambda x: x * 2)
    assert engine.engine(doubled, identity, Runtime(), PIXELS)[0] == "litert"
    tripled, _ = model(lambda x: x * 3)
    assert engine.engine(tripled, identity, Runtime(), PIXELS)[0] == "tensorflow"
    assert "activations that differ by 0.333 of their norm" in capsys.readouterr().out
