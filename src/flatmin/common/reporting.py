"""What the stages tell: errors in one line, files that appear whole, metrics, plots, progress."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


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


@contextmanager
def quiet() -> Iterator[None]:
    """Import TensorFlow within this: its libraries write a page to file descriptor 2 that no setting turns off.

    What was written is shown after all when the block fails.
    """
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


@contextmanager
def whole(path: Path | str) -> Iterator[Path]:
    """Give a path beside `path` to write a file or folder to; it takes `path`'s place when the block ends well.

    What processes that were killed left there goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if left == aside or not Path("/proc", left.name.split(".")[-2]).exists():
            _remove(left)
    try:
        yield aside
        if path.is_dir() or aside.is_dir():  # else it is replaced at once
            _remove(path)
        os.replace(aside, path)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path | str, values: Mapping[str, Any]) -> None:
    """Write nested `values` with sorted keys, so that equal values give equal bytes.

    Raises:
        InputError: a number is not finite, which JSON can't hold.
    """
    _refuse_non_finite(values, str(path))
    with whole(path) as aside:
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")


def _refuse_non_finite(values: Mapping[Any, Any], where: str) -> None:
    for key, value in values.items():
        if isinstance(value, list | tuple):
            _refuse_non_finite(dict(enumerate(value)), f"{where}: {key}")
        elif isinstance(value, Mapping):
            _refuse_non_finite(value, f"{where}: {key}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{where}: {key}: expected a finite number, received {value}")


def read_json(path: Path | str) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        InputError: there is no such file, or it holds no JSON object.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a file that an earlier stage wrote, found none") from None
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, received {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, received {type(values).__name__}")
    return values


def write_csv(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table with a header; the line ends are `\\n` everywhere."""
    with whole(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
