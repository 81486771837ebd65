"""The cost of a sharpness-aware step compared with a plain one: time and memory, as ratios from one run.

`make bench` writes bench/results.json and prints the table of docs/sam.md. Time: trained layers of EfficientNetLite0 at
the default study's size (96 px, batches of 50, AdamW), plain and sharpness-aware steps taking turns, the quickest turn
of each, since what else runs on a machine only ever slows a turn.
Memory: peak resident size of a process that trains dense layers whose weights outweigh everything else.
`--quick` measures the times alone, in fewer turns, for bench/results-quick.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flatmin.common import console, files

RESULTS = Path(__file__).with_name("results.json")
PLAIN = {"rho": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "sam": {},
    "sam, adaptive": {"adaptive": True},
    "sam, every=5": {"every": 5},
    "sam, num_batch_splits=5": {"num_batch_splits": 5},
    "gsam": {"method": "gsam"},
    "wsam": {"method": "wsam"},
    "looksam, every=5": {"method": "looksam", "every": 5},
    "friendly": {"method": "friendly"},
}
CYCLE = 5  # steps in a turn: a whole cycle of every=5
TURNS = 7
LAYERS, UNITS = 6, 3000  # 216 MB of weights


def make_step(model: Any, settings: dict[str, Any], batch: Any, optimizer: Any) -> Callable[[], Any]:
    import keras
    import tensorflow as tf

    from flatmin import sam

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer.build(model.trainable_variables)
    step = sam.Step(sam.Settings(**settings), model, optimizer)

    def forward(part: Any) -> tuple[Any, Any]:
        inputs, labels = part
        outputs = model(inputs, training=True)
        return loss(labels, outputs), outputs

    return tf.function(lambda: step(forward, batch)[0])


def times(variants: dict[str, dict[str, Any]], turns: int) -> dict[str, float]:
    """The time of each variant's steps over that of plain ones."""
    import keras
    import tensorflow as tf

    from flatmin.models import classifier

    keras.utils.set_random_seed(0)
    names = [str(index) for index in range(10)]
    network = classifier.create("EfficientNetLite0", names, image_size=96, dropout=0.2, seed=0, weights="none")
    frozen, trained = network.split("block3a_expand_conv")
    activations = frozen(tf.random.uniform((50, 96, 96, 3), maxval=255.0), training=False)
    trained(activations, training=False)
    batch = (activations, tf.range(50) % 10)
    steps = {
        name: make_step(trained, settings, batch, keras.optimizers.AdamW(1e-6))
        for name, settings in {"plain": PLAIN, **variants}.items()
    }
    for step in steps.values():
        step()  # traces, and leaves a counter at 1: a turn of five steps has one sharp step whatever its start
    quickest = dict.fromkeys(steps, float("inf"))
    for _ in console.progress(range(turns), "turns", unit="turn"):
        for name, step in steps.items():
            started = time.perf_counter()
            for _ in range(CYCLE):
                step()
            quickest[name] = min(quickest[name], time.perf_counter() - started)
    return {name: quickest[name] / quickest["plain"] for name in variants}


def peak_memory(settings: dict[str, Any]) -> None:
    """Print the peak resident size, in bytes, of this process after a few steps."""
    import keras
    import tensorflow as tf

    model = keras.Sequential([keras.Input((UNITS,)), *(keras.layers.Dense(UNITS) for _ in range(LAYERS))])
    batch = (tf.ones((4, UNITS)), tf.range(4))
    step = make_step(model, settings, batch, keras.optimizers.SGD(1e-6))
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def memory(settings: dict[str, Any]) -> int:
    command = [sys.executable, __file__, json.dumps(settings)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(quick: bool) -> None:
    """Measure, and add the results to what other scripts wrote in their file. Prints the table of docs/sam.md."""
    variants = {name: VARIANTS[name] for name in ("sam", "sam, every=5")} if quick else VARIANTS
    results: dict[str, Any] = {}
    if not quick:
        plain, weights = memory(PLAIN), 4 * LAYERS * UNITS * (UNITS + 1)
        copies = {name: (memory(settings) - plain) / weights for name, settings in variants.items()}
    with console.importing_tensorflow():
        ratios = times(variants, 2 if quick else TURNS)
    if not quick:
        found = {name: {"step_ratio": ratios[name], "memory_copies": copies[name]} for name in variants}
        results = {"sam_memory_copies": copies["sam"], "sam_variants": found}
        print("| step | time, plain = 1 | memory above plain, copies of the trained weights |\n|---|---|---|")
        for name in variants:
            print(f"| {name} | {ratios[name]:.2f} | {copies[name]:.2f} |")
    results |= {"sam_step_ratio": ratios["sam"], "sam_every_5_step_ratio": ratios["sam, every=5"]}
    path = RESULTS.with_name("results-quick.json") if quick else RESULTS
    files.write_json(path, (files.read_json(path) if path.exists() else {}) | results)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] != "--quick":
        peak_memory(json.loads(sys.argv[1]))
    else:
        main("--quick" in sys.argv)
