"""How numbers are computed: devices, precision, seeds."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from flatmin.common import console
from flatmin.common.errors import InputError
from flatmin.common.params import Runtime


def configure(runtime: Runtime, seed: int) -> None:
    """Set precision, seeds and determinism for this process, before it computes anything."""
    set_math(runtime)
    keras.utils.set_random_seed(seed)
    if runtime.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.config.set_dtype_policy(runtime.precision)


def set_math(runtime: Runtime) -> None:
    """What oneDNN multiplies float32 tensors in, before the process's first product."""
    for variable in ("TF_SET_ONEDNN_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE"):
        if runtime.matmul != "float32":
            os.environ[variable] = "BF16"
        else:
            os.environ.pop(variable, None)


def strategy(runtime: Runtime) -> tf.distribute.Strategy:
    """The strategy to train under, made before all else: several workers find each other only then.

    That of one device is TensorFlow's default one, which adds nothing to a step.

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
    """One for the process: the collectives of a second one would take numbers that the first one's have."""
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
    """Where all workers listen, the chief's first; ValueError where this is none of them."""
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
    """This process's number among the workers, and how many they are; 0, the chief's, is the one that writes."""
    resolver = strategy.cluster_resolver
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return 0, 1
    cluster = resolver.cluster_spec()
    has_chief = "chief" in cluster.jobs
    workers = len(cluster.job_tasks("worker")) + has_chief
    return (0 if resolver.task_type == "chief" else int(resolver.task_id) + has_chief), workers


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
    """Whether the processor computes in float16 itself, many numbers at a time: AVX512_FP16, or Arm's like."""
    return _has("avx512_fp16", "asimdhp")


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices itself: AMX, AVX512_BF16, or Arm's like."""
    return _has("amx_bf16", "avx512_bf16", "bf16")


def _has(*features: str) -> bool:
    return bool(re.search(rf"^(flags|Features)\s*:.*\b({'|'.join(features)})\b", _cpuinfo(), re.MULTILINE))


def _cpuinfo() -> str:
    """What Linux says of the processor; nothing where there is no Linux."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return ""
