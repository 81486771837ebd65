"""Lines, progress bars and silence on the terminal."""

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
    # Without it each stage opens with a page about instruction sets and missing GPUs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow leaves oneDNN out on an x86 processor without AVX-512 VNNI, which makes training up to three times slower.
    if platform.machine() == "x86_64":
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


@contextmanager
def importing_tensorflow() -> Iterator[None]:
    """Import TensorFlow, or what imports it, within this block: with the defaults above, and without a page of notes."""
    set_tensorflow_defaults()
    with quiet():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what libraries write to file descriptor 2, which no setting of theirs turns off; show it if the block fails."""
    with tempfile.TemporaryFile() as written:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException:
            written.seek(0)
            os.write(stderr, written.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def log(message: str) -> None:
    """Print a line at once, above any progress bar."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(message, flush=True)


def progress(items: Iterable[Any], description: str, total: int | None = None, unit: str = "it") -> Iterable[Any]:
    """`items` behind a progress bar that is shown on a terminal only."""
    return tqdm(items, desc=description, total=total, unit=unit, disable=None, leave=False)
