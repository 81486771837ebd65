"""Steps on two devices and on two workers, against the NumPy reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sam_reference as reference
import sam_replicas
from loopback import free_ports
from sam_networks import assert_equal, values

ROOT = Path(__file__).parents[1]


Case = tuple[str, dict[str, Any], dict[str, Any]]  # kind, settings, and the settings of the reference
ON_DEVICES: list[Case] = [
    ("loop", {}, {}),
    ("loop", {"sync_perturbation": True}, {"synchronised": True}),
    ("loop", {"num_batch_splits": 2, "adaptive": True}, {"splits": 2, "adaptive": True}),
    ("loop", {"method": "friendly"}, {"sigma": 1.0, "decay": 0.9}),
    ("loop", {"method": "friendly", "sync_perturbation": True}, {"sigma": 1.0, "decay": 0.9, "synchronised": True}),
    ("loop", {"method": "looksam", "every": 2}, {"alpha": 0.7, "every": 2}),
    ("loop", {"method": "gsam"}, {"alpha": 0.4}),
    ("loop", {"accumulate": 3}, {"splits": 3}),
    ("loop", {"optimizer": {"global_clipnorm": 0.05}}, {"clip": 0.05}),
    ("loop", {"broken": 2}, {}),
    ("loop", {"broken": 2, "optimizer": {"initial_scale": 8.0}}, {}),
    ("counted", {"first": [6], "method": "friendly"}, {"sigma": 1.0, "decay": 0.9, "replicas": [6]}),
    ("counted", {"first": [8, 6], "accumulate": 3, "rho": 0.0}, {"rho": 0.0, "replicas": 1}),
    ("fit", {}, {}),
    ("fit", {"method": "wsam", "sync_perturbation": True}, {"gamma": 0.9, "synchronised": True}),
]
ON_WORKERS: list[Case] = [("loop", {}, {}), ("loop", {"sync_perturbation": True}, {"synchronised": True})]
# 41 examples in batches of eight: the second device has none of the last batch.
EMPTY: Case = ("fit", {"images": 41, "num_batch_splits": 2}, {})


def start_replicas(folder: Path, cases: list[Case], **environment: str) -> subprocess.Popen[str]:
    folder.mkdir()
    listed = json.dumps([(kind, {"rho": 0.5, **settings}) for kind, settings, _ in cases])
    return subprocess.Popen(
        [sys.executable, f"{ROOT}/tests/sam_replicas.py", str(folder), listed],
        env=os.environ | {"PYTHONPATH": f"{ROOT}/src"} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas") / "devices"
    finish(start_replicas(folder, [*ON_DEVICES, EMPTY]))
    return folder


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("replicas") / str(index) for index in range(2)]
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(len(folders))]}
    processes = []
    for index, folder in enumerate(folders):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        processes.append(start_replicas(folder, ON_WORKERS, TF_CONFIG=json.dumps(config)))
    for process in processes:
        finish(process)
    return folders


def assert_reference(file: Path, case: Case) -> None:
    kind, settings, settings_of_reference = case
    saved = np.load(file)
    assert saved["same"]  # on both replicas, bit for bit
    passes = [1 if settings.get("rho") == 0 or step % settings.get("every", 1) else 2 for step in range(6)]
    assert saved["evaluations"] == 8 * sum(passes)  # six batches of eight
    inputs, labels = sam_replicas.data()
    batches = [
        (x, y) for index, (x, y) in enumerate(zip(inputs, labels, strict=True)) if index != settings.get("broken")
    ]
    if waits := settings.get("accumulate"):
        batches = [(np.concatenate(inputs[i : i + waits]), np.concatenate(labels[i : i + waits])) for i in (0, 3)]
    start = [value.astype(np.float64) for value in values(sam_replicas.network().variables)]
    losses = []
    weights = start
    for number, batch in enumerate(batches):
        losses.append(reference.loss(weights, batch))
        options = {"method": settings.get("method", "sam"), "replicas": 2} | settings_of_reference
        weights = reference.train(start, batches[: number + 1], [0.5] * (number + 1), **options)
    assert_equal([saved["kernel"], saved["bias"]], weights, atol=1e-4)
    if not waits:
        reported = saved["losses"][np.isfinite(saved["losses"])]
        np.testing.assert_allclose(reported, [np.mean(losses)] if kind == "fit" else losses, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ON_DEVICES)), ids=[str(case[:2]) for case in ON_DEVICES])
def test_two_devices_equal_reference(devices: Path, number: int) -> None:
    assert_reference(devices / f"{number}.npz", ON_DEVICES[number])


@pytest.mark.slow
def test_device_without_examples_takes_every_step(devices: Path) -> None:
    saved = np.load(devices / f"{len(ON_DEVICES)}.npz")
    assert saved["steps"] == 6
    assert saved["evaluations"] == 2 * 41
    assert np.isfinite(saved["losses"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ON_WORKERS)), ids=[str(case[:2]) for case in ON_WORKERS])
def test_two_workers_equal_reference(workers: list[Path], number: int) -> None:
    for folder in workers:
        assert_reference(folder / f"{number}.npz", ON_WORKERS[number])
    one, other = (np.load(folder / f"{number}.npz") for folder in workers)
    assert all(np.array_equal(one[key], other[key]) for key in one.files)
