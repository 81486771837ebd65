"""How numbers are computed: precision, dtype policy, strategy, and the machine that results depend on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from repository import ROOT

from flatmin import runtime
from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime

# TensorFlow asks once in a process.
PROGRAM = """
import sys
import numpy as np
from flatmin.common import console
with console.importing_tensorflow():
    import tensorflow as tf
    from flatmin import runtime
from flatmin.common import console
from flatmin.common.params import Runtime

runtime.configure(Runtime(matmul=sys.argv[1]), 0)
random = np.random.default_rng(0)
images, kernel = random.normal(size=(8, 16, 16, 64)), random.normal(size=(3, 3, 64, 64))
convolve = tf.function(lambda x, w: tf.nn.conv2d(x, w, 1, "SAME"))
np.save(sys.argv[2], convolve(tf.constant(images, tf.float32), tf.constant(kernel, tf.float32)))
"""


@pytest.mark.slow
def test_configure_half_rounds_products_where_the_processor_can(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, matmul, str(tmp_path / matmul)],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT / "src")},
        )
        for matmul in ("float32", "half")
    ]
    assert [process.wait() for process in started] == [0, 0]
    plain, rounded = (np.load(tmp_path / f"{matmul}.npy") for matmul in ("float32", "half"))
    error = np.linalg.norm(rounded - plain) / np.linalg.norm(plain)
    if re.search(r"^flags.*\b(avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
        assert 5e-4 < error < 1e-2
    else:
        assert error < 1e-5


def test_set_matmul_is_decided_by_params_and_not_by_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = ("TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE")
    for variable in variables:
        monkeypatch.setenv(variable, "BF16")
    runtime.set_matmul(Runtime())
    assert not {*variables} & {*os.environ}
    for matmul in ("bfloat16", "half"):
        runtime.set_matmul(Runtime.model_validate({"matmul": matmul}))
        assert [os.environ.pop(variable) for variable in variables] == ["BF16", "BF16"]


def test_dtype_policy_after_the_block_is_what_it_was() -> None:
    before = keras.config.dtype_policy()
    with runtime.dtype_policy("mixed_bfloat16"):
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
        with suppress(KeyboardInterrupt), runtime.dtype_policy("float32"):
            assert keras.layers.Dense(1).compute_dtype == "float32"
            raise KeyboardInterrupt
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    assert keras.config.dtype_policy() == before


@pytest.mark.parametrize(
    ("worker", "writers", "expected"), [(0, None, True), (1, None, False), (1, "all", True), (1, "first", False)]
)
def test_writes_outputs_is_the_chief_unless_all_write(
    worker: int, writers: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLATMIN_WRITERS", raising=False)
    if writers:
        monkeypatch.setenv("FLATMIN_WRITERS", writers)
    assert runtime.writes_outputs(worker) == expected


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN is asked for on x86 alone")
@pytest.mark.parametrize("value", [None, "0"])
def test_machine_says_that_onednn_computes_unless_the_user_decided(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume states and cached activations depend on it."""
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    if value:
        monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", value)
    console.set_tensorflow_defaults()
    if not tf.config.list_physical_devices("GPU"):
        assert runtime.machine()[-1] == f"oneDNN {value or '1'}"


def test_strategy_on_one_device_is_tensorflows_default() -> None:
    assert runtime.strategy(Runtime(strategy="one")) is tf.distribute.get_strategy()
    assert runtime.worker(tf.distribute.get_strategy()) == (0, 1)


TASK = {"type": "worker", "index": 0}
WRONG_CONFIGS: dict[str, object] = {
    "none": None,
    "no JSON": "no json",
    "a list": [],
    "no workers": {"cluster": {}},
    "an empty task": {"cluster": {"worker": ["a:1"]}, "task": {}},
    "an index that is a bool": {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": True}},
    "an index of none": {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}},
    "a parameter server": {"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "ps", "index": 0}},
    "workers that are no list": {"cluster": {"worker": "a:1"}, "task": TASK},
    "an address that is a number": {"cluster": {"worker": [1]}, "task": TASK},
    "an address without a port": {"cluster": {"worker": ["a"]}, "task": TASK},
    "an address with a scheme": {"cluster": {"worker": ["http://a:1"]}, "task": TASK},
    "a cluster that is a list": {"cluster": ["a:1"], "task": TASK},
}


@pytest.mark.parametrize("config", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_strategy_multi_worker_with_a_wrong_tf_config_is_an_error(
    config: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(InputError, match=r"TF_CONFIG: expected JSON with cluster\.worker and task"):
        runtime.strategy(Runtime(strategy="multi_worker"))
