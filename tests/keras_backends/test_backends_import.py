"""Importing the packages changes nothing in the process, on the backend that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sam_networks import BACKEND

SOURCE = Path(__file__).parents[2] / "src"

# What an import could change. Every value is a string, so that two of them can be compared, and shown.
SNAPSHOT = """
import locale, logging, os, random, signal, sys, threading, warnings

def of_python():
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    loggers = {name: each for name, each in loggers.items() if isinstance(each, logging.Logger)}
    return {
        "environment": dict(os.environ),
        "warnings": warnings.filters[:],
        "logging": {name: (each.level, each.handlers, each.disabled, each.propagate) for name, each in loggers.items()},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "random": random.getstate(),
        "streams": (sys.stdout, sys.stderr, sys.excepthook, threading.excepthook, sys.getrecursionlimit()),
        "folder and path": (os.getcwd(), sys.path[:], sys.meta_path[:], locale.setlocale(locale.LC_ALL)),
    }

def of_keras():
    import keras, numpy
    return {
        "numpy": (numpy.random.get_state()[1].tobytes(), numpy.geterr(), numpy.get_printoptions()),
        "keras": (
            keras.config.backend(), keras.config.floatx(), keras.config.epsilon(), keras.config.dtype_policy().name,
            keras.config.image_data_format(), keras.config.is_interactive_logging_enabled(),
            keras.config.is_traceback_filtering_enabled(), keras.distribution.distribution()),
    }

def of_tensorflow():
    import tensorflow as tf
    from tensorflow.python.eager import context
    from tensorflow.python.framework import config
    threads = tf.config.threading
    return {"tensorflow": (
        threads.get_intra_op_parallelism_threads(), threads.get_inter_op_parallelism_threads(),
        tf.config.get_visible_devices(), tf.config.get_soft_device_placement(), tf.config.functions_run_eagerly(),
        tf.config.optimizer.get_jit(), tf.config.optimizer.get_experimental_options(), context.context()._seed,
        config.is_op_determinism_enabled(), tf.executing_eagerly(), tf.get_logger().level)}

def of_jax():
    import jax
    return {"jax": (dict(jax.config.values), jax.devices())}

def of_torch():
    import torch
    return {"torch": (
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
        torch.get_rng_state().numpy().tobytes(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(), torch.get_default_device())}

def snapshot(*parts):
    return {key: repr(value) for part in (of_python, *parts) for key, value in part().items()}

def check(name, *parts):
    before, loaded = snapshot(*parts), set(sys.modules)
    package = __import__(f"flatmin.{name}", fromlist=["__all__"])
    if parts:
        assert all(getattr(package, each) is not None for each in package.__all__)
    after = snapshot(*parts)
    assert after == before, {key: (before[key], after[key]) for key in before if before[key] != after[key]}
    new = {each.partition(".")[0] for each in set(sys.modules) - loaded}
    assert not new & {"matplotlib", "pandas", "dvc"}, new
"""


def run(code: str) -> None:
    # Without the variables that the tests' own process may have set for TensorFlow.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    done = subprocess.run(
        [sys.executable, "-c", SNAPSHOT + code],
        env=environment | {"PYTHONPATH": str(SOURCE), "KERAS_BACKEND": BACKEND},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_import_of_sam_without_keras_changes_nothing_in_the_process() -> None:
    run("check('sam')\nassert not {'keras', 'tensorflow', 'jax', 'torch', 'numpy'} & set(sys.modules)")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "sharpness"])
def test_import_beside_keras_changes_nothing_in_the_process(name: str) -> None:
    run(f"import keras\nof_keras(), of_{BACKEND}()\ncheck({name!r}, of_keras, of_{BACKEND})")
