"""Resume states: complete or ignored, of two epochs where workers are several, and removed once abandoned."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from flatmin.common.errors import InputError
from flatmin.training import resume
from flatmin.training.resume import State


def test_state_saved_and_loaded_gives_back_history_variables_and_best_weights(tmp_path: Path) -> None:
    state = State(tmp_path / "state")
    variables = [keras.Variable(np.arange(3.0)), keras.Variable(7, dtype="int32")]
    assert (state.epochs(), state.has(1)) == (0, False)
    state.save([{"val_loss": 0.1 + 0.2}], variables, [np.ones(2)])
    for variable in variables:
        variable.assign(variable * 0)
    assert (state.epochs(), state.has(1)) == (1, True)
    history, best = state.load(1, variables)
    assert history == [{"val_loss": 0.1 + 0.2}]
    np.testing.assert_array_equal(best[0], np.ones(2))
    np.testing.assert_array_equal(np.array(variables[0]), np.arange(3.0))
    assert int(variables[1].numpy()) == 7
    state.remove()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99, None], ids=["empty", "half", "cut off", "one bit"])
def test_state_incomplete_or_damaged_is_ignored_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fraction: float | None
) -> None:
    state = State(tmp_path / "state")
    state.save([{"val_loss": 1.0}], [keras.Variable(np.arange(300.0))], [np.ones(2)])
    content = state.file.read_bytes()
    if fraction is None:
        content = content[:900] + bytes([content[900] ^ 1]) + content[901:]
    else:
        content = content[: int(fraction * len(content))]
    state.file.write_bytes(content)
    assert state.epochs() == 0
    printed = capsys.readouterr().out
    assert "worker_0.npz: expected a resume state, received a broken file, which is ignored" in printed
    state.remove()
    assert not (tmp_path / "state").exists()


def test_state_interrupted_while_saving_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(tmp_path / "state")
    variables = [keras.Variable(np.arange(3.0))]
    state.save([{"val_loss": 1.0}], variables, [np.ones(2)])
    savez = np.savez

    def interrupted(file: Any, **arrays: Any) -> None:
        savez(file, **arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        state.save([{"val_loss": 1.0}, {"val_loss": 0.5}], variables, [np.zeros(2)])
    assert state.epochs() == 1
    assert state.load(1, variables)[0] == [{"val_loss": 1.0}]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["worker_0.npz"]


def test_state_of_one_of_several_workers_keeps_two_epochs(tmp_path: Path) -> None:
    alone, one_of_two = State(tmp_path / "alone"), State(tmp_path / "together", 1, 2)
    variables = [keras.Variable(0.0)]
    for epochs in (1, 2, 3):
        variables[0].assign(float(epochs))
        for state in (alone, one_of_two):
            state.save([{"val_loss": 1.0}] * epochs, variables, [])
    assert [alone.has(epochs) for epochs in (1, 2, 3)] == [False, False, True]
    assert [one_of_two.has(epochs) for epochs in (1, 2, 3)] == [False, True, True]
    assert one_of_two.load(2, variables)[0] == [{"val_loss": 1.0}] * 2
    assert float(variables[0]) == 2.0
    # Resumed after two, and killed again while the others saved the third.
    one_of_two.save([{"val_loss": 1.0}] * 3, variables, [])
    assert [one_of_two.has(epochs) for epochs in (1, 2, 3)] == [False, True, True]
    one_of_two.remove()
    assert not (tmp_path / "together").exists()


def test_state_in_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE: expected a folder to write to, received .*file/state"):
        State(tmp_path / "file" / "state")


def test_forget_abandoned_removes_states_of_more_than_thirty_days(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path))
    resume.forget_abandoned()
    for name, days in (("abandoned", 31), ("slow", 29)):
        State(tmp_path / "state" / name).save([{"val_loss": 1.0}], [], [])
        for path in (tmp_path / "state" / name, tmp_path / "state" / name / "worker_0.npz"):
            os.utime(path, (time.time() - days * 86400,) * 2)
    resume.forget_abandoned()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["slow"]
