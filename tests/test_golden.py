"""The golden numbers are unchanged, their tolerance holds on other machines, and it notices deliberate breaks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import golden
import keras
import numpy as np
import pytest
from PIL import Image

from flatmin import sam
from flatmin.common import params
from flatmin.evaluation import metrics
from flatmin.inputs import augment
from flatmin.models import split
from flatmin.training import optimizer, schedule

pytestmark = pytest.mark.slow


def run_golden(*arguments: str, cores: int = 0, **variables: str) -> str:
    """Run tests/golden.py in a process of its own; its standard output. cores: how many it may use, 0 for all."""
    command = [sys.executable, str(Path(golden.__file__)), *arguments]
    if cores:
        allowed = sorted(os.sched_getaffinity(0))[:cores]
        command = ["taskset", "--cpu-list", ",".join(map(str, allowed)), *command]
    path = os.pathsep.join(["src", "tests"])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_golden_numbers_are_unchanged() -> None:
    run_golden()


@pytest.mark.parametrize(
    "variables",
    [
        {"TF_ENABLE_ONEDNN_OPTS": "0", "GOLDEN_ENGINE": "tensorflow"},
        {"ONEDNN_MAX_CPU_ISA": "SSE41", "GOLDEN_ENGINE": "litert"},
    ],
    ids=["without-onednn-tensorflow", "sse41-litert"],
)
def test_golden_tolerance_with_another_processor_holds(variables: dict[str, str]) -> None:
    received = json.loads(run_golden("--print", cores=1, **variables).splitlines()[-1])
    assert [line for _, _, line in golden.differences(received, golden.read())] == []


def test_golden_variable_for_the_instruction_set_takes_effect() -> None:
    code = "import tensorflow as tf; tf.nn.conv2d(tf.ones((1, 8, 8, 8)), tf.ones((3, 3, 8, 8)), 1, 'SAME').numpy()"
    variables = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ONEDNN_VERBOSE": "1", "TF_ENABLE_ONEDNN_OPTS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)
    assert re.search(r"cpu,isa:Intel SSE4\.1\b", done.stdout), done.stdout[:500] + done.stderr[-500:]


def _only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let the golden test's steps be those of a few update rules."""
    rules = golden.steps_to_compute()
    monkeypatch.setattr(golden, "steps_to_compute", lambda: {name: rules[name] for name in names})


def break_sam_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    original = sam.perturbation
    monkeypatch.setattr(
        "flatmin.sam.step.perturbation",
        lambda *args, **options: [None if e is None else -e for e in original(*args, **options)],
    )
    _only(monkeypatch, "sam")


def break_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """GSAM adds the orthogonal part where it takes it off."""
    from flatmin.sam import methods

    original = methods.gsam_gradient
    monkeypatch.setattr(methods, "gsam_gradient", lambda first, perturbed, alpha: original(first, perturbed, -alpha))
    _only(monkeypatch, "gsam")


def break_ema(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer gets a momentum that is 0.05 too large."""
    original = optimizer.make_optimizer
    monkeypatch.setattr(
        "flatmin.training.step.make_optimizer",
        lambda recipe: original(recipe.model_copy(update={"ema": recipe.ema + 0.05})),
    )


def break_magnitude(monkeypatch: pytest.MonkeyPatch) -> None:
    original = augment.augment
    monkeypatch.setattr(
        "golden.augment",
        lambda images, settings, *seeds: original(images, settings.model_copy(update={"m": settings.m + 1}), *seeds),
    )


def break_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images shrink without antialiasing."""
    monkeypatch.setattr(
        "golden.to_square", lambda picture, size, _: picture.resize((size, size), Image.Resampling.NEAREST)
    )


def break_label_smoothing(monkeypatch: pytest.MonkeyPatch) -> None:
    original = keras.losses.CategoricalCrossentropy
    monkeypatch.setattr(keras.losses, "CategoricalCrossentropy", lambda label_smoothing, **options: original(**options))
    _only(monkeypatch, "plain")


def break_split_point(monkeypatch: pytest.MonkeyPatch) -> None:
    original = split.layer_index
    monkeypatch.setattr("flatmin.models.classifier.layer_index", lambda base, at: original(base, at) + 1)


def break_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up is one step too long."""
    original = schedule.cosine
    warmed = {"name": "cosine", "warmup_epochs": 0.7}  # of two epochs of five steps: half an epoch is 2, this is 4
    changed = {"schedule": params.Cosine.model_validate(warmed)}
    monkeypatch.setattr(
        "flatmin.training.step.cosine",
        lambda update, updates, recipe: original(update, updates, recipe.model_copy(update=changed)),
    )


def break_ece_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    original = metrics.calibration_error
    monkeypatch.setattr(metrics, "calibration_error", lambda logits, labels, bins: original(logits, labels, bins + 1))


def break_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval covers 94 % in place of 95 %."""
    original = np.quantile
    monkeypatch.setattr(np, "quantile", lambda values, at: original(values, [0.03, 0.97]))


BREAKS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "SAM's sign": ("steps", break_sam_sign),
    "a method's formula": ("steps", break_method),
    "EMA": ("averages", break_ema),
    "an augmentation's magnitude": ("augmentation", break_magnitude),
    "the resize": ("inputs", break_resize),
    "label smoothing": ("steps", break_label_smoothing),
    "the split point": ("activations", break_split_point),
    "the cosine schedule": ("schedules", break_cosine),
    "ECE's bins": ("scores", break_ece_bins),
    "the interval": ("comparison", break_interval),
}


@pytest.mark.parametrize("name", BREAKS)
def test_golden_deliberate_break_moves_a_number_tenfold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part, break_it = BREAKS[name]
    break_it(monkeypatch)
    received = golden.compute([part])
    computed = {part: {key: value for key, value in golden.read()[part].items() if key in received[part]}}
    moved = golden.differences(received, computed)
    assert moved, f"{name}: nothing moved"
    _, by, line = moved[0]
    print(f"{name}: {line}")
    assert by >= 10 * golden.TOLERANCES[part], line
