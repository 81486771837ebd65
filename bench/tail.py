"""How quickly a tail trains on CPU: as Keras has it, with each part of the rewrite, and with other ideas.

`python bench/tail.py` prints a table and adds the key `tail` to bench/results.json: images a second, forward and
backward, of EfficientNetLite0 at 128 px in batches of 128. Variants take turns, and the quickest turn of each counts,
since what else runs on a machine only ever slows a turn. What TensorFlow reads as it starts has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from sam_cost import RESULTS, add

SIZE, BATCH, TURNS, STEPS = 128, 128, 3, 4
CUTS: dict[str, str | int] = {
    "whole network": 0,
    "behind block 5": "block4a_expand_conv",
    "behind block 8": "block5a_expand_conv",
}
PARTS = {
    "fold": {"fold": True, "depthwise": False},
    "depthwise": {"fold": False, "depthwise": True},
    "both": {"fold": True, "depthwise": True},
    "both, bfloat16 products": {"fold": True, "depthwise": True, "half": True},
}
# The cut of the ideas beside the rewrite, each tried on top of it and compared with `both`.
SHORT = "behind block 8"
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "oneDNN's BF16 mode": {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "TF_SET_ONEDNN_FPMATH_MODE": "BF16"},
    "without oneDNN": {"TF_ENABLE_ONEDNN_OPTS": "0"},
}


def tails(cut: str) -> tuple[dict[str, Any], Any]:
    """The plain tail and the rewritten ones behind a cut, built; and a batch of what is at the boundary."""
    import keras
    import tensorflow as tf

    from flatmin.models import classifier, cpu_kernels

    keras.utils.set_random_seed(0)
    network = classifier.create("EfficientNetLite0", [str(index) for index in range(100)], SIZE, 0.2, 0, "none")
    trunk, plain = network.cut(CUTS[cut])
    boundary = trunk(tf.random.uniform((BATCH, SIZE, SIZE, 3), maxval=255.0), training=False)
    variants = {"plain": plain} | {name: cpu_kernels.faster(plain, **options) for name, options in PARTS.items()}
    for tail in variants.values():
        tail(boundary)
    return variants, boundary


def gradients(tail: Any, boundary: Any) -> Any:
    """Of a batch's mean loss to the tail's weights."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        logits = tail(boundary, training=True)
        labels = tf.range(BATCH) % logits.shape[1]
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    return tape.gradient(loss, [variable.value for variable in tail.trainable_variables])


def ideas(tail: Any, boundary: Any) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Name -> steps in a call, and the call."""
    import tensorflow as tf

    half = tf.cast(boundary, "float16")

    def several() -> Any:
        def body(index: Any, sums: Any) -> Any:
            other = boundary * (1.0 + 1e-6 * tf.cast(index, "float32"))  # or the loop would compute it once
            return index + 1, [a + b for a, b in zip(sums, gradients(tail, other), strict=True)]

        zeros = [tf.zeros(variable.shape) for variable in tail.trainable_variables]
        return tf.while_loop(lambda index, _: index < STEPS, body, (tf.constant(0), zeros), parallel_iterations=1)

    return {
        "float16 until the device": (1, tf.function(lambda: gradients(tail, tf.cast(half, "float32")))),
        f"{STEPS} steps a call": (STEPS, tf.function(several)),
        "without the layout optimizer": (1, tf.function(lambda: gradients(tail, boundary))),
    }


def rates(cut: str, names: list[str], with_ideas: bool) -> dict[str, float]:
    """Images a second of the variants named, and of the ideas."""
    import tensorflow as tf

    variants, boundary = tails(cut)
    calls = {
        name: (1, tf.function(lambda tail=variants[name]: gradients(tail, boundary), autograph=False)) for name in names
    }
    if with_ideas:
        calls |= ideas(variants["both"], boundary)
    for name, (_, call) in calls.items():
        tf.config.optimizer.set_experimental_options({"layout_optimizer": name != "without the layout optimizer"})
        call()  # traces and optimizes
    quickest = dict.fromkeys(calls, float("inf"))
    for _ in range(TURNS):
        for name, (steps, call) in calls.items():
            started = time.perf_counter()
            call()
            quickest[name] = min(quickest[name], (time.perf_counter() - started) / steps)
    return {name: round(BATCH / seconds, 1) for name, seconds in quickest.items()}


def process(environment: dict[str, str], cut: str, names: list[str], with_ideas: bool = False) -> dict[str, float]:
    """`rates` in a process of its own."""
    command = [sys.executable, __file__, json.dumps([cut, names, with_ideas])]
    made = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    return json.loads(made.stdout.splitlines()[-1])


def main() -> None:
    """Measure all, write the results and print the table."""
    found = {cut: process({}, cut, ["plain", *PARTS], cut == SHORT) for cut in CUTS}
    for name, environment in ENVIRONMENTS.items():
        made = process(environment, SHORT, ["plain", "both", "both, bfloat16 products"])
        found[SHORT] |= {f"{name}, {variant}": rate for variant, rate in made.items()}
    speedups = {cut: round(of["both"] / of["plain"], 2) for cut, of in found.items()}
    add(RESULTS, {"tail": {"images_per_second": found, "speedup": speedups}})
    print("| tail | variant | images a second | plain = 1 |\n|---|---|---|---|")
    for cut, of in found.items():
        for name, rate in of.items():
            print(f"| {cut} | {name} | {rate:.0f} | {rate / of['plain']:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(rates(*json.loads(sys.argv[1]))))
    else:
        main()
