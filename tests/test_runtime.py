"""How numbers are computed, each way in a process of its own: TensorFlow asks once."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from repository import ROOT

import flatmin
from flatmin import runtime
from flatmin.common.params import Runtime

PROGRAM = """
import sys
import numpy as np
from flatmin.common import console
with console.importing_tensorflow():
    import tensorflow as tf
    from flatmin import runtime
from flatmin.common.params import Runtime

runtime.configure(Runtime(matmul=sys.argv[1]), 0)
random = np.random.default_rng(0)
images, kernel = random.normal(size=(8, 16, 16, 64)), random.normal(size=(3, 3, 64, 64))
convolve = tf.function(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"))
np.save(sys.argv[2], convolve(tf.constant(images, tf.float32), tf.constant(kernel, tf.float32)))
"""


def convolved(math: str, folder: Path) -> np.ndarray:
    command = [sys.executable, "-c", PROGRAM, math, str(folder / math)]
    subprocess.run(command, check=True, cwd=folder, env={"PYTHONPATH": str(ROOT / "src")})
    return np.load(folder / f"{math}.npy")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return convolved("float32", tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("math", ["half", "bfloat16"])
def test_half_rounds_products_where_the_processor_can(math: str, plain: np.ndarray, tmp_path: Path) -> None:
    rounded = convolved(math, tmp_path)
    error = np.linalg.norm(rounded - plain) / np.linalg.norm(plain)
    if re.search(r"^flags.*\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
        assert 5e-4 < error < 1e-2
    else:
        assert error < 1e-5


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is asked for on x86 alone")
@pytest.mark.parametrize("value", [None, "0"])
def test_onednn_is_asked_for_unless_the_user_decided(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if value:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", value)
    importlib.reload(flatmin)
    assert os.environ["TF_ENABLE_ONEDNN_OPTS"] == (value or "1")
    if not tf.config.list_physical_devices("GPU"):
        assert runtime.machine()[-1] == f"oneDNN {value or '1'}", "on which resume states and views depend"


def test_params_decide_and_not_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    runtime.set_math(Runtime())
    assert "ONEDNN_DEFAULT_FPMATH_MODE" not in os.environ
