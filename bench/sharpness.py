"""What measures of sharpness cost, and whether cheaper ones rank the study's minima alike: bench/sharpness.json.

    python bench/sharpness.py    # in a checkout in which `dvc repro` has run; minutes

Each setting measures every minimum of finetune, control and sam; its ranks are compared with those of the first one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from flatmin.common import console, errors, files, params

SETTINGS = [  # images, steps, probes; the first one is what the others are compared with
    (64, 15, 6),
    (32, 10, 3),
    (32, 6, 2),
    (16, 10, 3),
]
MEASURES = ("eigenvalue_1", "trace", "gradient_rise", "adaptive_rise")


def main() -> None:
    with console.importing_tensorflow():
        from scipy.stats import spearmanr

        from flatmin import runtime
        from flatmin.evaluation.minima import measure_sharpness
        from flatmin.inputs.records import Records

    settings = params.load()
    folders = {
        name: {seed: f"models/{name}/{seed}" for seed in settings.seeds} for name in ("finetune", "control", "sam")
    }
    runtime.configure(settings.runtime.model_copy(update={"matmul": "float32"}), 0)
    found: list[dict[str, Any]] = []
    first: dict[str, list[float]] = {}
    for images, steps, probes in SETTINGS:
        changes = {"images": images, "steps": steps, "probes": probes}
        evaluate = settings.evaluate.model_copy(
            update={"sharpness": settings.evaluate.sharpness.model_copy(update=changes)}
        )
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            measured = measure_sharpness(Records("data/records"), folders, evaluate, 0, f"{folder}/plot.png")
        seconds = time.monotonic() - started
        values = {key: [each[key] for method in measured.values() for each in method.values()] for key in MEASURES}
        first = first or values
        ranks = {key: float(spearmanr(first[key], values[key]).statistic) for key in MEASURES}
        found.append({**changes, "seconds": round(seconds, 1), "rank_correlation": ranks})
        console.log(f"{changes}: {seconds:.1f} s, rank correlations {ranks}")
    minima = sum(map(len, folders.values()))
    files.write_json("bench/sharpness.json", {"minima": minima, "settings": found})


if __name__ == "__main__":
    errors.run(main)
