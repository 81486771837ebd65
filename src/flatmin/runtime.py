"""How numbers are computed: devices, precision, seeds."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime


def configure(runtime: Runtime, seed: int) -> None:
    """Set the precision of matrix products, seeds and determinism of this process, before it computes anything."""
    set_matmul(runtime)
    keras.utils.set_random_seed(seed)
    if runtime.deterministic:
        tf.config.experimental.enable_op_determinism()


@contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Within the block Keras' global dtype policy is `name`."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def set_matmul(runtime: Runtime) -> None:
    """Set the precision in which oneDNN multiplies float32 tensors. It's read before the process's first product."""
    for variable in ("TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"):
        if runtime.matmul != "float32":
            os.environ[variable] = "BF16"
        else:
            os.environ.pop(variable, None)


def strategy(runtime: Runtime) -> tf.distribute.Strategy:
    """The strategy to train under. Made first of all, since several workers find each other only then.

    One device gets TensorFlow's default strategy, which adds nothing to a step.

    Raises:
        InputError: the strategy is `multi_worker`, and TF_CONFIG does not say which workers.
    """
    if runtime.strategy == "multi_worker":
        return _workers()
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    several_gpus = len(devices) > 1 and devices[0].device_type == "GPU"
    if runtime.strategy == "mirrored" or (runtime.strategy == "auto" and several_gpus):
        return _mirrored(tuple(device.name for device in devices))
    return tf.distribute.get_strategy()


@cache
def _mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    """One for the process: a second one's collectives would clash with the first one's."""
    return tf.distribute.MirroredStrategy(devices)


@cache
def _workers() -> tf.distribute.Strategy:
    config = os.environ.get("TF_CONFIG")
    expected = "TF_CONFIG: expected JSON with cluster.worker and task for runtime.strategy multi_worker"
    if not config:
        raise InputError(f"{expected}, found none")
    try:
        values = json.loads(config)
        addresses = _addresses(values["cluster"], values["task"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{expected}, received {config[:200]!r} ({error})") from None
    console.log(f"waiting for all of {len(addresses)} workers: {', '.join(addresses)}")
    return tf.distribute.MultiWorkerMirroredStrategy()


def _addresses(cluster: Mapping[str, Sequence[str]], task: Mapping[str, Any]) -> list[str]:
    """The addresses that all workers listen at, the chief's first; ValueError if this process is none of them."""
    jobs = {"chief": list(cluster.get("chief", ())), "worker": list(cluster["worker"])}
    index = task["index"]
    if type(index) is not int or task["type"] not in jobs or index not in range(len(jobs[task["type"]])):
        raise ValueError(f"task {task['type']} {index}")
    addresses = [*jobs["chief"], *jobs["worker"]]
    for address in addresses:
        if not re.fullmatch(r"[^\s/]+:\d+", address):
            raise ValueError(f"address {address!r}")
    return addresses


def worker(strategy: tf.distribute.Strategy) -> tuple[int, int]:
    """This process's number among the workers, 0 for the chief, and the number of workers."""
    resolver = strategy.cluster_resolver
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 0, 1
    cluster = resolver.cluster_spec()
    has_chief = "chief" in cluster.jobs
    workers = len(cluster.job_tasks("worker")) + has_chief
    return (0 if resolver.task_type == "chief" else int(resolver.task_id) + has_chief), workers


def writes_outputs(worker: int) -> bool:
    """Whether this worker writes models, metrics and plots: the chief, or every one if `$FLATMIN_WRITERS` is `all`.

    With `all` each worker needs a checkout of its own, in which `dvc repro` finds the outputs.
    """
    return worker == 0 or os.environ.get("FLATMIN_WRITERS") == "all"


def machine() -> list[str]:
    """The kind of machine: GPUs, or processor, cores, and what TensorFlow computes with there.

    Results are equal to the byte on the same kind only.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus]
    models = re.findall(r"^model name\s*: (.*)$", _cpuinfo(), re.MULTILINE)
    cores = f"{len(os.sched_getaffinity(0))} cores"
    half = [name for name, has in (("float16", has_float16()), ("bfloat16", has_bfloat16())) if has]
    onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "left to TensorFlow")
    return [*sorted(set(models) or {platform.machine()}), cores, *half, f"oneDNN {onednn}"]


def has_float16() -> bool:
    """Whether the processor has vector instructions for float16: AVX512_FP16, or Arm's equivalent."""
    return _has("avx512_fp16", "asimdhp")


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself: AMX, AVX512_BF16, or Arm's equivalent."""
    return _has("amx_bf16", "avx512_bf16", "bf16")


def _has(*features: str) -> bool:
    return bool(re.search(rf"^(flags|Features)\s*:.*\b({'|'.join(features)})\b", _cpuinfo(), re.MULTILINE))


def _cpuinfo() -> str:
    """Linux' description of the processor; empty on other systems."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return ""
