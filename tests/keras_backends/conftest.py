"""Settings of the tests that run on each of Keras' backends. With --confcutdir they load nothing of the pipeline."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Keras 3.15's variables on JAX, with NumPy 2.
    config.addinivalue_line(
        "filterwarnings", "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    )
