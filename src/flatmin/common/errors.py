"""Errors that the user can fix, in one line, and the entry point that prints them."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable


class InputError(Exception):
    """What the user gave can't be used. The message is one line: key or file, expected, received."""


def run(stage: Callable[..., None], *arguments: str) -> None:
    """Run a stage's function; on wrong input print one line and exit with 1.

    `FLATMIN_DEBUG=1` in the environment adds the traceback. Ctrl-C exits with 130, as a shell expects.
    """
    try:
        stage(*arguments)
    except KeyboardInterrupt:
        print("interrupted: run it again to go on from the last whole epoch", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        if os.environ.get("FLATMIN_DEBUG") == "1":
            traceback.print_exc()
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1)


def _explain(error: Exception) -> str | None:
    """The line for what the user can mend; None for what is a bug of ours."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        where = error.filename or "the file system"
        return f"{where}: expected a file or folder that can be used, received: {error.strerror or error}"
    # TensorFlow's errors by name, since it is not imported here. What a generator raises, tf.data hands on as text.
    found = re.search(
        r"\b(InputError|DataLossError|ResourceExhaustedError|BrokenProcessPool): (.*)",
        f"{type(error).__name__}: {error}",
    )
    if not found:
        return None
    kind, received = found.groups()
    expected = {
        "DataLossError": "data/records: expected whole records (`dvc repro --force prepare` makes them)",
        "ResourceExhaustedError": "expected room in memory and on the disk (a smaller batch_size takes less memory)",
        "BrokenProcessPool": "augment: expected processes that live to the end (is memory short?)",
    }
    return received if kind == "InputError" else f"{expected[kind]}, received: {first_line(received)}"


def first_line(text: str) -> str:
    """The first line of a library's error, without TensorFlow's name of a node before it, which says nothing."""
    return re.sub(r"^\{\{function_node .*?\}\} ", "", text.strip().partition("\n")[0])
