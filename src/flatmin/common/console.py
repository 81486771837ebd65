"""Output on the terminal: log lines, progress bars, and silencing libraries."""

from __future__ import annotations

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


@contextmanager
def importing_tensorflow() -> Iterator[None]:
    """Set TensorFlow's defaults, and hide its notes while the block imports it or a module that imports it."""
    set_tensorflow_defaults()
    with quiet():
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
