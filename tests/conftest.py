"""Settings of every test."""

import signal
import sys
from collections.abc import Iterator

import hypothesis
import pytest
from fixtures import finished_study, study  # noqa: F401 - pytest finds them here

from flatmin.common import console

console.set_tensorflow_defaults()  # before any test imports TensorFlow

# What a machine is busy with besides is no defect of the code under test.
hypothesis.settings.register_profile("flatmin", deadline=None)
hypothesis.settings.load_profile("flatmin")

# A shell's background job ignores Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_op_determinism() -> Iterator[None]:
    """Undo what `runtime.configure` switches on for the whole process, so that no later test sees it."""
    yield
    if "tensorflow" in sys.modules:
        from tensorflow.python.framework.config import disable_op_determinism

        disable_op_determinism()
