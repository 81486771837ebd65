"""Resume state: what a killed training needs to resume after its last whole epoch."""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from flatmin.common import console, files
from flatmin.common.errors import InputError
from flatmin.features import cache
from flatmin.training.schedule import Epoch

STATE_DAYS = 30


def forget_abandoned() -> None:
    """Remove the states that nobody has resumed for STATE_DAYS."""
    for folder in (cache.folder() / "state").glob("*"):
        with suppress(OSError):  # another process removes it too
            if max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < time.time() - STATE_DAYS * 86400:
                shutil.rmtree(folder)


class State:
    """Every variable, the best weights and the history after an epoch, in a file for each worker.

    Each of several workers keeps the epoch before the last one too: killed while they save, they have one in common.
    """

    def __init__(self, folder: Path, worker: int = 0, workers: int = 1) -> None:
        self.file = folder / f"worker_{worker}.npz"
        self._previous = folder / f"worker_{worker}_previous.npz" if workers > 1 else None
        try:  # now, not after the first epoch
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"$FLATMIN_CACHE: expected a folder to write to, received {folder}: {error.strerror}"
            ) from None

    def save(self, history: Sequence[Epoch], variables: Sequence[Any], best: Sequence[np.ndarray]) -> None:
        arrays = {f"variable_{index}": np.asarray(variable) for index, variable in enumerate(variables)}
        arrays |= {f"best_{index}": value for index, value in enumerate(best)}
        arrays["history"] = np.array(json.dumps(list(history)))
        with files.atomic_write(self.file) as temporary:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
            if self._previous and self.file.exists():
                os.replace(self.file, self._previous)

    def _by_epochs(self) -> dict[int, Path]:
        """The files by the number of epochs that they were saved after."""
        paths = {}
        for path in (self._previous, self.file):
            if path and path.exists():
                try:
                    with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
                        if saved.zip.testzip():
                            raise zipfile.BadZipFile(path)
                        paths[len(json.loads(str(saved["history"])))] = path
                except (EOFError, ValueError, KeyError, zipfile.BadZipFile):  # power was lost before it was on disk
                    console.log(f"{path}: expected a resume state, received a broken file, which is ignored")
        return paths

    def epochs(self) -> int:
        """The number of epochs after which the last state was saved."""
        return max(self._by_epochs(), default=0)

    def has(self, epochs: int) -> bool:
        """Whether there is a state after this number of epochs."""
        return epochs in self._by_epochs()

    def load(self, epochs: int, variables: Sequence[Any]) -> tuple[list[Epoch], list[np.ndarray]]:
        """Set the variables to the state after this number of epochs; return the history and the best weights."""
        path = self._by_epochs()[epochs]
        if path == self._previous:  # the later state is given up, and must not take this one's place when saved again
            os.replace(path, self.file)
        with np.load(self.file, allow_pickle=False) as saved:
            for index, variable in enumerate(variables):
                variable.assign(saved[f"variable_{index}"])
            best = [saved[f"best_{index}"] for index in range(sum(name.startswith("best_") for name in saved.files))]
            return json.loads(str(saved["history"])), best

    def remove(self) -> None:
        for path in (self._previous, self.file):
            if path:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # another worker's may be there
            self.file.parent.rmdir()
