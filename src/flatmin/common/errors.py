"""Errors that the user can fix, and the entry point of each command, which prints them in one line."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable


class InputError(Exception):
    """The user's input cannot be used. The message is one line: key or file, expected, received."""


def run(stage: Callable[..., None], *arguments: str) -> None:
    """Run a stage's function. On an error that the user can fix, print one line and exit with status 1.

    `FLATMIN_DEBUG=1` in the environment adds the traceback. Ctrl-C exits with status 130, as shells expect.
    """
    try:
        stage(*arguments)
    except KeyboardInterrupt:
        print("interrupted: run it again to resume after the last complete epoch", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        if os.environ.get("FLATMIN_DEBUG") == "1":
            traceback.print_exc()
        else:
            sys.unraisablehook = lambda _: None  # a file cut short by a full disk fails once more as it is collected
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1)


def _explain(error: Exception) -> str | None:
    """Return the line for an error that the user can fix, or None for a bug."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        where = error.filename or "the file system"
        reason = error.strerror or (error.args[0] if error.args else error)
        while isinstance(reason, list | tuple):  # of a folder that is copied: (from, to, reason) of each file
            reason = reason[-1]
        return f"{where}: expected a usable file or folder, received: {reason}"
    # TensorFlow's errors are recognised by name, because it is not imported here. tf.data wraps a generator's
    # error in another error, as text.
    match = re.search(
        r"\b(InputError|DataLossError|ResourceExhaustedError|BrokenProcessPool): (.*)",
        f"{type(error).__name__}: {error}",
    )
    if not match:
        return None
    kind, received = match.groups()
    expected = {
        "DataLossError": "data/records: expected complete records (`dvc repro --force prepare` writes them again)",
        "ResourceExhaustedError": "expected enough memory and disk space (a smaller batch_size needs less memory)",
        "BrokenProcessPool": "augment: expected worker processes that run to the end (out of memory?)",
    }
    return received if kind == "InputError" else f"{expected[kind]}, received: {first_line(received)}"


def first_line(text: str) -> str:
    """Return the first line of a library's error message, without TensorFlow's uninformative node name before it."""
    return re.sub(r"^\{\{function_node .*?\}\} ", "", text.strip().partition("\n")[0])
