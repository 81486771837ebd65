"""Two devices or two workers train as one does, and a lost worker costs an epoch at most."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from loopback import free_ports
from repository import ROOT
from trainings import (
    SELECTED,
    TRAIN,
    VARIED,
    finetune,
    metrics,
    rename,
    saved_weights,
    small,
    view_files,
    write_classifier,
    write_images,
    written,
)

from flatmin.common.errors import InputError
from flatmin.common.params import Params
from flatmin.models import classifier
from flatmin.training.resume import State
from flatmin.training.workers import Workers

PLAIN_RECIPE: dict[str, Any] = {"dropout": 0.0, "optimizer": "sgd", "learning_rate": 0.05}
PYTHONPATH = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])


def write_study(folder: Path, train: int) -> None:
    with chdir(folder):
        write_images(folder, train)
        write_classifier()


def assert_close(folder: str, other: str) -> None:
    """Two classifiers were trained to the same weights, but for rounding."""
    first, second = saved_weights(folder), saved_weights(other)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], atol=1e-4)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


# Two logical devices

TWO_DEVICES = """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
import pytest
from flatmin.common import params
from flatmin.training.schedule import Budget
from trainings import control, finetune, interrupted_after, rename

def settings(strategy, **changes):
    values = params.load("params.json").model_dump()
    values["runtime"]["strategy"] = strategy
    values["finetune"] |= changes
    return params.parse(values)

for strategy in ("one", "mirrored"):
    finetune(settings(strategy, views=2))
    rename("finetune", strategy)
    Budget(20, 2).write("models/budget/3.json")  # seven steps, validated after three
    control(settings(strategy, views=2))
    rename("control", f"control_{strategy}")
averaged = settings("mirrored", views=2, ema=0.7, schedule={"name": "cosine"}, learning_rate=0.01)
finetune(averaged, averaged.sam)
rename("sam", "whole_sam")
with interrupted_after(1), pytest.raises(KeyboardInterrupt):
    finetune(averaged, averaged.sam)
finetune(averaged, averaged.sam)
rename("sam", "resumed_sam")
Budget(33, 2).write("models/budget/3.json")  # twelve steps, validated after six
control(averaged)
rename("control", "whole_control")
with interrupted_after(1), pytest.raises(KeyboardInterrupt):
    control(averaged)
control(averaged)
rename("control", "resumed_control")
"""


@pytest.mark.slow
def test_two_devices_train_as_one_and_resume_byte_for_byte(workspace: Path) -> None:
    """The last batch holds one image, so that the second device has none of it."""
    write_study(workspace, TRAIN)
    Path("params.json").write_text(small(augment=VARIED, **PLAIN_RECIPE).model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close("models/one", "models/mirrored")
    one, mirrored = metrics("one"), metrics("mirrored")
    assert one["val"] == pytest.approx(mirrored["val"], abs=1e-3)
    assert one["gradient_evaluations"] == mirrored["gradient_evaluations"] == TRAIN * 2
    # Within an epoch both leave off, and go on, at the same batch.
    assert_close("models/control_one", "models/control_mirrored")
    one, mirrored = metrics("control_one"), metrics("control_mirrored")
    assert one["val"] == pytest.approx(mirrored["val"], abs=1e-3)
    assert one["gradient_evaluations"] == mirrored["gradient_evaluations"] == TRAIN + 2 * 3
    start, trained = saved_weights(SELECTED), saved_weights("models/one")
    assert max(np.abs(trained[name] - start[name]).max() for name in start) > 1e-3
    assert metrics("whole_sam")["gradient_evaluations"] == 2 * TRAIN * 2
    assert math.isfinite(metrics("whole_sam")["val"]["loss"])
    assert "sam-finetune@3: resuming after epoch 1\n" in done.stdout
    assert "control@3: resuming after epoch 1.2\n" in done.stdout
    outputs = [f"models/{{}}/{file}" for file in (classifier.WEIGHTS, classifier.MODEL, classifier.VAL_LOGITS)]
    for name in (*outputs, "plots/{}.csv", "metrics/{}.json"):
        for training in ("sam", "control"):
            whole, resumed = (Path(name.format(f"{which}_{training}")) for which in ("whole", "resumed"))
            assert resumed.read_bytes() == whole.read_bytes(), resumed


# Two workers

CHUNKS = 91  # train images: three chunks, two of which are the first worker's. They leave a batch of one.
RECIPES: dict[str, dict[str, Any]] = {
    "images": {**PLAIN_RECIPE, "epochs": 2, "batch_size": 15},
    "views": {**PLAIN_RECIPE, "epochs": 3, "batch_size": 15, "views": 2},
}
SAM_RECIPE = {**PLAIN_RECIPE, "epochs": 6, "batch_size": 30}
WORKER = """
import sys
from flatmin.common import errors, params
from trainings import finetune, rename

def train():
    for name in sys.argv[1:]:
        settings = params.load(f"../{name}.json")
        finetune(settings, settings.sam if name == "sam" else None)
        rename("finetune", name)

errors.run(train)
"""
NETWORK = "10.77.31"


def start_workers(folder: Path, *trainings: str, namespaces: Sequence[str] = ()) -> list[subprocess.Popen[str]]:
    """Start two workers, each with a folder and a cache of its own: on loopback, or each in a network namespace."""
    hosts = [f"{NETWORK}.{index}" for index in (1, 2)] if namespaces else ["127.0.0.1"] * 2
    cluster = {"worker": [f"{host}:{port}" for host, port in zip(hosts, free_ports(2), strict=True)]}
    started = []
    for index in range(2):
        own = folder / f"worker_{index}"
        own.mkdir(exist_ok=True)
        for shared in ("data", SELECTED):
            (own / shared).parent.mkdir(exist_ok=True)
            if not (own / shared).exists():
                (own / shared).symlink_to(folder / shared)
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        environment = {
            "PYTHONPATH": PYTHONPATH,
            "FLATMIN_CACHE": str(own / "cache"),
            "TF_CONFIG": json.dumps(config),
        }
        with (own / "log").open("w") as log:
            within = ["ip", "netns", "exec", namespaces[index]] if namespaces else []
            command = [*within, sys.executable, "-u", "-c", WORKER, *trainings]
            started.append(
                subprocess.Popen(command, cwd=own, env=os.environ | environment, stdout=log, stderr=log, text=True)
            )
    return started


def wait(workers: Sequence[subprocess.Popen[str]], folder: Path) -> None:
    codes = [worker.wait(300) for worker in workers]
    logs = [(folder / f"worker_{index}/log").read_text()[-2000:] for index in range(2)]
    assert codes == [0, 0], logs


def ip(*arguments: str) -> bool:
    """Whether there is `ip` (Debian's iproute2) and it succeeds."""
    return shutil.which("ip") is not None and not subprocess.run(["ip", *arguments], capture_output=True).returncode


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    """Two network namespaces with a link between them, as two machines have; none where they may not be made."""
    names = [f"flatmin-{os.getpid()}-{index}" for index in (1, 2)]
    ends = [f"fm{os.getpid() % 10**6}-{index}" for index in (1, 2)]
    try:
        made = all(ip("netns", "add", name) for name in names)
        made = made and ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for index, (name, end) in enumerate(zip(names, ends, strict=True) if made else (), start=1):
            assert ip("link", "set", end, "netns", name)
            assert ip("-n", name, "address", "add", f"{NETWORK}.{index}/24", "dev", end)
            assert ip("-n", name, "link", "set", end, "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield names if made else []
    finally:
        for name in names:
            ip("netns", "delete", name)  # and its end of the link


def params_of(name: str, **runtime: Any) -> Params:
    if name == "sam":
        return small(runtime=runtime, **SAM_RECIPE)
    return small(augment=VARIED if name == "views" else {"engine": "none"}, runtime=runtime, **RECIPES[name])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, namespaces: list[str]) -> Path:
    """A folder where two workers have trained on images, on cached views and with SAM; and one alone on the former.

    In two network namespaces neither worker can reach the other but through the network; else they are on loopback.
    """
    folder = tmp_path_factory.mktemp("trained")
    write_study(folder, CHUNKS)
    for name in (*RECIPES, "sam"):
        (folder / f"{name}.json").write_text(params_of(name, strategy="multi_worker").model_dump_json())
    workers = start_workers(folder, *RECIPES, "sam", namespaces=namespaces)
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        for name in RECIPES:
            patch.setenv("FLATMIN_CACHE", str(folder / "cache"))
            finetune(params_of(name))
            rename("finetune", name)
    wait(workers, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_workers_give_what_one_gives_and_the_first_alone_writes(trained: Path, name: str) -> None:
    assert_close(str(trained / "models" / name), str(trained / "worker_0/models" / name))
    together, alone = metrics(name, trained / "worker_0"), metrics(name, trained)
    assert together["val"]["accuracy"] == alone["val"]["accuracy"]
    assert together["gradient_evaluations"] == alone["gradient_evaluations"] == CHUNKS * alone["epochs"]
    assert not (trained / "worker_1/models" / name).exists()
    assert not (trained / "worker_1/metrics").exists()
    assert not [path for index in range(2) for path in (trained / f"worker_{index}").rglob("*.npz")]


@pytest.mark.slow
def test_two_workers_cache_together_the_views_of_one(trained: Path) -> None:
    """Each computes the views of its own chunks, and val's."""
    own = [[np.load(path) for path in view_files(trained / f"worker_{index}/cache")] for index in range(2)]
    assert [sorted(len(array) for array in arrays) for arrays in own] == [[9, 59, 59], [9, 32, 32]]
    together = {row.tobytes() for arrays in own for array in arrays for row in array}
    assert together == {row.tobytes() for path in view_files(trained / "cache") for row in np.load(path)}


@pytest.mark.slow
def test_two_workers_one_of_which_is_killed_resume_to_the_same_bytes(trained: Path, workspace: Path) -> None:
    for shared in ("data", SELECTED, "sam.json"):
        (workspace / shared).parent.mkdir(exist_ok=True)
        (workspace / shared).symlink_to(trained / shared)
    logs = [workspace / f"worker_{index}/log" for index in range(2)]
    chief, other = start_workers(workspace, "sam")
    deadline = time.monotonic() + 200
    # Once the second has saved an epoch the first will, and cannot finish the next one alone.
    while time.monotonic() < deadline:
        states = list((workspace / "worker_1/cache").rglob("worker_1.npz"))
        if states and State(states[0].parent, 1).epochs() >= 3:
            break
        time.sleep(0.02)
    other.kill()
    other.wait()
    assert chief.wait(120) == 1
    assert "error: sam-finetune@3: expected all workers to the end, lost one; start" in logs[0].read_text()
    assert "AutoGraph" not in logs[0].read_text()
    # As if it had been killed before it saved its last epoch: they resume after the one before.
    (previous,) = (workspace / "worker_1/cache").rglob("worker_1_previous.npz")
    previous.replace(previous.with_name("worker_1.npz"))
    common = State(previous.parent, 1, 2).epochs()
    wait(start_workers(workspace, "sam"), workspace)
    assert all(f"sam-finetune@3: resuming after epoch {common}\n" in log.read_text() for log in logs)
    assert written("sam", workspace / "worker_0") == written("sam", trained / "worker_0")


def test_workers_of_one_device_are_one_that_writes() -> None:
    workers = Workers(tf.distribute.get_strategy())
    assert (workers.number, workers.count, workers.replicas, workers.writes_outputs) == (0, 1, 1, True)
    np.testing.assert_array_equal(workers.gather([1.5, 2.0]), [[1.5, 2.0]])
    workers.barrier()


class Gone(tf.distribute.MultiWorkerMirroredStrategy):
    """A strategy of several workers that was never set up."""

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("several", [False, True])
def test_explain_lost_worker_with_several_is_one_line(several: bool) -> None:
    """With one worker these errors are what they are."""
    workers = Workers(tf.distribute.get_strategy())
    error = tf.errors.UnavailableError(None, None, "{{function_node __inference}} Connection reset\nand a page")
    if several:
        workers._strategy = Gone()
        with pytest.raises(InputError, match=r"^sam: expected all workers .*, lost one; .* \(Connection reset\)$"):
            lose(workers, error)
    else:
        with pytest.raises(tf.errors.UnavailableError):
            lose(workers, error)


def lose(workers: Workers, error: Exception) -> None:
    with workers.explain_lost_worker("sam"):
        raise error
