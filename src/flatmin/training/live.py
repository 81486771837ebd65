"""TensorBoard's event files of a training, for who watches it. They change no result."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tensorflow as tf

from flatmin.common.errors import InputError, first_line


def write(name: str, number: int, values: Mapping[str, float]) -> None:
    """Write values of a training's validation `number`, at once, below `$FLATMIN_LOGS`; without it do nothing.

    Args:
        name: of the training, such as `finetune@42`, whose folder is `finetune/42`.

    Raises:
        InputError: the folder can't be written to.
    """
    folder = os.environ.get("FLATMIN_LOGS")
    if not folder:
        return
    # What `tf.summary.scalar` writes, which needs the package tensorboard.
    scalar = tf.compat.v1.SummaryMetadata()
    scalar.plugin_data.plugin_name = "scalars"
    try:
        with _writer(Path(folder, *name.split("@"))).as_default():
            for key, value in values.items():
                tf.summary.write(key, tf.constant(value, tf.float32), number, scalar)
            tf.summary.flush()
    except tf.errors.OpError as error:
        raise InputError(
            f"$FLATMIN_LOGS: expected a folder to write to, received {folder!r}: {first_line(str(error))}"
        ) from None


@cache
def _writer(folder: Path) -> Any:
    return tf.summary.create_file_writer(str(folder))
