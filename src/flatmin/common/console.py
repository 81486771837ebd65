"""Output on the terminal: log lines, progress bars, and silencing libraries."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def set_tensorflow_defaults() -> None:
    """Set the environment variables that TensorFlow reads while it is imported, unless the user has set them."""
    # Otherwise each stage begins with a page of notes about instruction sets and missing GPUs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow does not use oneDNN on x86 processors without AVX-512 VNNI, which makes training up to three times
    # slower.
    if platform.machine() == "x86_64":
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


# Keras imports these, where it finds them, for wrappers and pictures that no stage uses. Without them TensorFlow is
# imported in two thirds of the time.
NOT_FOR_KERAS = ("sklearn", "matplotlib", "pandas")


@contextmanager
def importing_tensorflow() -> Iterator[None]:
    """Import TensorFlow with its defaults set, and hide its notes while the block imports modules that use it."""
    set_tensorflow_defaults()
    with quiet():
        hidden = [name for name in NOT_FOR_KERAS if name not in sys.modules]
        sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]  # None: importing it raises ImportError
        try:
            importlib.import_module("tensorflow")
        finally:
            for name in hidden:
                del sys.modules[name]
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what libraries write to file descriptor 2, which none of their settings turns off; show it on an error."""
    with tempfile.TemporaryFile() as hidden:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            os.write(stderr, hidden.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def log(message: str) -> None:
    """Print a line immediately, above any progress bar."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(message, flush=True)


def progress(items: Iterable[Any], description: str, total: int | None = None, unit: str = "it") -> Iterable[Any]:
    """Iterate over `items` with a progress bar, which is shown only on a terminal."""
    return tqdm(items, desc=description, total=total, unit=unit, disable=None, leave=False)
