"""Settings of every test."""

import signal
import sys
from collections.abc import Iterator

import hypothesis
import pytest

from flatmin.common import console

console.set_tensorflow_defaults()  # before any test imports TensorFlow

# What a machine is busy with besides is no defect of the code under test.
hypothesis.settings.register_profile("flatmin", deadline=None)
hypothesis.settings.load_profile("flatmin")

# A shell's background job ignores Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_op_determinism() -> Iterator[None]:
    """`runtime.configure` switches it on for the process: not for whichever tests follow."""
    yield
    if "tensorflow" in sys.modules:
        from tensorflow.python.framework.config import disable_op_determinism

        disable_op_determinism()
