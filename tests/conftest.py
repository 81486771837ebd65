"""Settings of every test."""

import signal
import sys
from collections.abc import Iterator

import hypothesis
import pytest

# What a machine is busy with besides is no defect of the code under test.
hypothesis.settings.register_profile("flatmin", deadline=None)
hypothesis.settings.load_profile("flatmin")

# A shell's background job ignores Ctrl-C, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow tests first in each half, since each of two workers begins with one: quick ones even out the end."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    half, middle = len(slow) // 2, len(quick) // 2
    items[:] = [*slow[:half], *quick[:middle], *slow[half:], *quick[middle:]]


@pytest.fixture(autouse=True)
def _no_op_determinism() -> Iterator[None]:
    """`runtime.configure` switches it on for the process: not for the tests that follow."""
    yield
    if "tensorflow" in sys.modules:
        from tensorflow.python.framework.config import disable_op_determinism

        disable_op_determinism()
