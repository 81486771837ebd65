"""Flatmin and the usual pipelines side by side: time, accuracy, memory, and what the parts of a run take.

    python bench/speed.py            # bench/results.json, an hour and a half on two cores
    python bench/speed.py --quick    # bench/results-quick.json, under ten minutes

Both sides train the same network on the same records in processes of their own, in turns, each with all of the
machine's threads; Flatmin with an empty `$FLATMIN_CACHE`. Time runs from the first record opened to the last epoch's
metrics: the network is built, converted and traced within it, and starting Python and importing is reported apart.
Each measurement is kept under `runs` as soon as it is made, so that a bench that was killed resumes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from flatmin.common import console, files

HERE = Path(__file__).parent
ROOT = HERE.parent
BACKBONE = "EfficientNetLite0"
CIFAR = "visual_domain_decathlon/cifar100"
EPOCHS = {"extract": 20, "finetune": 10}
EPOCH_LINE = re.compile(r"(?P<name>.*) (?P<epoch>\d+)/\d+: loss .*val accuracy (?P<accuracy>[\d.]+)")
VIEW_LINE = re.compile(r"(view \d+/\d+|val activations): .*\((?P<seconds>[\d.]+) s\)")

Run = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    train, val: images of the timed trainings. compared, compared_val: of those whose accuracies are compared, whole and
    for each of the seeds; 0 leaves them out. small: train images of the memory's two stages, the second with four times
    as many. chunks: of 32 images, augmented for the rate. turns: of the engines that run frozen layers.
    """

    train: int
    val: int
    compared: int
    compared_val: int
    seeds: Sequence[int]
    same_math: bool
    small: int
    turns: int


FULL = Plan(
    train=12_000,
    val=500,
    compared=3000,
    compared_val=2000,
    seeds=(0, 1, 2),
    same_math=True,
    small=1000,
    turns=5,
)
DIGITS = {"train": 1000, "compared": 1000, "compared_val": 500, "small": 250}  # at most, as there are no more
QUICK = Plan(train=2000, val=500, compared=0, compared_val=0, seeds=(), same_math=False, small=500, turns=2)
BASELINE_EPOCHS = 2  # timed; the others cost the same
# runtime.matmul: Flatmin's setting for speed, and the pipelines as they are found; then each in the other's.
SIDES = {
    "flatmin": "half",
    "original": "float32",
    "keras": "float32",
    "flatmin-float32": "float32",
    "original-half": "half",
    "torch": "float32",
}
TIMED = "timed"  # what stands in the name of a run in place of a seed


def has_cifar() -> bool:
    """Whether `$TFDS_DATA_DIR` has CIFAR-100, stored at 72 pixels."""
    folder = os.environ.get("TFDS_DATA_DIR")
    return bool(folder) and (Path(folder) / CIFAR).is_dir()


def data(train: int, val: int) -> dict[str, Any]:
    """The `data` section, with equally many train images of each class: CIFAR-100, else the digits, as large."""
    if has_cifar():
        splits = {
            "train": f"train[:{min(4 * train, 40_000)}]",
            "val": f"validation[:{val}]",
            "test": "validation[-100:]",
        }
        return {"source": "tfds", "name": CIFAR, "splits": splits, "train_per_class": train // 100}
    splits = {"train": "train[:1200]", "val": f"train[1200:{1200 + val}]", "test": "train[-90:]"}
    return {"source": "bundled", "name": "digits", "image_size": 72, "splits": splits, "train_per_class": train // 10}


def settings(train: int, val: int, seed: int, epochs: Mapping[str, int] = EPOCHS, views: int = 4) -> dict[str, Any]:
    """All of params.yaml. The images are seed 0's, whatever the trainings' seed and in whatever run of the bench."""
    recipe = {"optimizer": "adam", "batch_size": 128, "views": views, "image_size": 128}
    return {
        "seeds": [seed],
        "runtime": {},
        "data": data(train, val) | {"seed": 0},
        "augment": {"engine": "imgaug", "n": 3, "m": 7, "flip": True},
        "backbones": [BACKBONE],
        # The original study's rates.
        "extract": recipe | {"seed": seed, "learning_rate": 1e-3, "epochs": epochs["extract"]},
        "select": {"metric": "accuracy"},
        "audit": {},
        "finetune": recipe | {"learning_rate": 1e-4, "epochs": epochs["finetune"]},
        "sam": {},
        "finalize": {},
        "evaluate": {},
    }


class Folder:
    """A working directory for stages, with a `$FLATMIN_CACHE` of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cache = path / "cache"

    def prepare(self, params: dict[str, Any]) -> None:
        """Write params.yaml and, where there are none yet, the records."""
        self.path.mkdir(exist_ok=True)
        shutil.copy2(ROOT / "dvc.yaml", self.path)  # which declares what a stage reads
        (self.path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        if not (self.path / "data/records").exists():
            self.run(ROOT / "stages/prepare.py")

    def forget(self) -> None:
        """Empty the cache."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def run(self, *command: Any) -> Run:
        """Run one of the scripts here or a stage, and time it by the lines that it prints.

        Returns:
            import_seconds: from the process's start to its line `ready`. epoch_seconds: from there to the end of each
            epoch. val_accuracy: each epoch's. views_seconds: of each view. process_seconds: all. peak_bytes: of memory,
            by the process or one of its own, whichever has more.
        """
        others = os.environ.get("PYTHONPATH")  # where PyTorch may lie
        paths = os.pathsep.join(filter(None, [str(ROOT / "src"), others]))
        # One thread of NumPy's BLAS, as Flatmin's own workers have: more would spin and slow the other pipelines down.
        variables = {"FLATMIN_CACHE": str(self.cache), "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
        started = time.monotonic()
        ready, lines = 0.0, []
        found: Run = {"epoch_seconds": [], "val_accuracy": [], "views_seconds": []}
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=self.path,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with process.stdout:
            for line in process.stdout:
                now = time.monotonic()
                lines.append(line)
                if line == "ready\n":
                    ready = now
                    found["import_seconds"] = round(ready - started, 2)
                elif epoch := EPOCH_LINE.match(line):
                    found["epoch_seconds"].append(round(now - ready, 2))
                    found["val_accuracy"].append(float(epoch["accuracy"]))
                elif view := VIEW_LINE.match(line):
                    found["views_seconds"].append(float(view["seconds"]))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{command} exited {process.returncode}:\n{''.join(lines[-30:])}")
        found["process_seconds"] = round(time.monotonic() - started, 2)
        return found | {"peak_bytes": usage.ru_maxrss * 1024}


class Bench:
    """What was measured so far, in a JSON file."""

    def __init__(self, path: Path, plan: Plan) -> None:
        """Resume with the file's runs if plan, machine and code are the same and the bench did not complete."""
        from flatmin import runtime

        self.path = path
        before = files.read_json(path) if path.exists() else {}
        about = {
            "plan": asdict(plan) | {"seeds": list(plan.seeds)},
            "machine": runtime.machine(),
            "data": data(1, 1)["name"],
            "code": files.digest(path.read_bytes() for path in sorted([*HERE.glob("*.py"), *ROOT.glob("src/**/*.py")])),
        }
        is_same = all(before.get(key) == value for key, value in about.items()) and not before.get("is_complete")
        self.runs: dict[str, Any] = before.get("runs", {}) if is_same else {}
        self.about = about | {"is_complete": False}

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, or gave in a run before."""
        if name not in self.runs:
            console.log(f"bench: {name}")
            value = measure()
            self.runs[name] = value
            self.write({})
        return self.runs[name]

    def write(self, results: Mapping[str, Any]) -> None:
        """Add to the file, which other scripts write to as well."""
        before = files.read_json(self.path) if self.path.exists() else {}
        files.write_json(self.path, before | self.about | {"runs": self.runs} | results)


def seconds(run: Run, epochs: int) -> float:
    """Of so many epochs: the first with all that comes before it, and the others at the mean of those measured."""
    first, last = run["epoch_seconds"][0], run["epoch_seconds"][-1]
    others = len(run["epoch_seconds"]) - 1
    return first + (epochs - 1) * (last - first) / others


def compare(
    bench: Bench, folder: Folder, plan: tuple[int, int], seed: int, title: str, pairs: Sequence[tuple[str, str]]
) -> None:
    """Run pairs of a side and a stage, as `title`: a seed, for their accuracies, or TIMED.

    plan: how many train and val images.
    """

    def run(side: str, stage: str, seed: int = seed) -> Run:
        folder.prepare(settings(*plan, seed) | {"runtime": {"matmul": SIDES[side]}})
        pipeline = side.partition("-")[0]
        if pipeline == "flatmin":
            folder.forget()
            return folder.run(HERE / "stage.py", stage, *([BACKBONE] if stage == "extract" else []))
        epochs = BASELINE_EPOCHS if title == TIMED else EPOCHS[stage]
        if pipeline == "torch":
            return folder.run(HERE / "torch_baseline.py", epochs)
        return folder.run(HERE / "baselines.py", pipeline, stage, epochs)

    def measured(side: str, stage: str) -> Run:
        """To fine-tune, all start from what Flatmin's extract gave for seed 0."""
        if stage == "finetune" and not (folder.path / "models/select").exists():
            run("flatmin", "extract", seed=0)
            shutil.copytree(folder.path / "models/extract" / BACKBONE, folder.path / "models/select")
        return run(side, stage)

    for side, stage in pairs:
        bench.once(f"{side} {stage} {title}", lambda side=side, stage=stage: measured(side, stage))


def peak_memory(plan: Plan, folder: Path, times: int) -> int:
    """Bytes, of an extract stage of two views of so many times the small plan's images."""
    place = Folder(folder / f"memory_{times}")
    place.prepare(settings(plan.small * times, 100, 0, {"extract": 2, "finetune": 2}, views=2))
    return int(place.run(HERE / "stage.py", "extract", BACKBONE)["peak_bytes"])


def engine_rates(turns: int) -> dict[str, float]:
    """Return images a second of the frozen backbone by engine, the fastest of their turns."""
    import numpy as np

    from flatmin.common.params import Runtime
    from flatmin.features import engine
    from flatmin.models import classifier

    model = classifier.create(BACKBONE, ["a", "b"], image_size=128, dropout=0.0, seed=0, weights="imagenet")
    frozen, _ = model.split(None)
    sample = np.random.default_rng(0).uniform(0, 255, (64, 128, 128, 3)).astype(np.float32)
    engines = {}
    chosen = {
        "litert": Runtime(engine="litert"),
        "litert half": Runtime(engine="litert", matmul="half"),
        "tensorflow": Runtime(engine="tensorflow"),
    }
    for name, runtime in chosen.items():
        engines[name] = engine.choose(frozen, model.frozen_identity(None), runtime, lambda: sample)
        engines[name](sample)
    quickest = dict.fromkeys(engines, float("inf"))
    for _ in range(turns):
        for name, run in engines.items():
            started = time.perf_counter()
            for _ in range(5):
                run(sample)
            quickest[name] = min(quickest[name], time.perf_counter() - started)
    return {name: round(5 * len(sample) / taken, 1) for name, taken in quickest.items()}


def difference(bench: Bench, plan: Plan, stage: str, less: str = "original") -> dict[str, Any] | None:
    """Flatmin's best val accuracy less another side's in points, over the seeds; None where they are left out."""
    if not plan.compared:
        return None
    best = [
        [100 * max(bench.runs[f"{side} {stage} {seed}"]["val_accuracy"]) for side in ("flatmin", less)]
        for seed in plan.seeds
    ]
    points = [ours - theirs for ours, theirs in best]
    error = statistics.stdev(points) / len(points) ** 0.5
    return {"mean": round(statistics.mean(points), 2), "standard_error": round(error, 2), "seeds": len(points)}


def speedup(runs: Mapping[str, Run], stage: str, side: str, ours: str = "flatmin") -> float:
    """One side's time over another's."""
    theirs, our = (seconds(runs[f"{name} {stage} {TIMED}"], EPOCHS[stage]) for name in (side, ours))
    return round(theirs / our, 2)


def same_math(runs: Mapping[str, Run]) -> dict[str, dict[str, float]]:
    """The speedups with both sides in the same arithmetic, where that was measured."""
    sides = {"float32": ("original", "flatmin-float32"), "half": ("original-half", "flatmin")}
    return {name: {stage: speedup(runs, stage, *pair) for stage in EPOCHS} for name, pair in sides.items()}


def measure(bench: Bench, plan: Plan, folder: Path) -> dict[str, Any]:
    """All keys but those of the sharpness-aware step."""
    place = Folder(folder / "timed")
    both = [(side, stage) for stage in EPOCHS for side in ("flatmin", "original")]
    own = [("flatmin-float32", stage) for stage in EPOCHS]
    others = [*own, *(("original-half", stage) for stage in EPOCHS)]
    torch = [("torch", "extract")] if importlib.util.find_spec("torch") else []
    pairs = [*both, ("keras", "extract"), *torch, *(others if plan.same_math else [])]
    compare(bench, place, (plan.train, plan.val), 0, TIMED, pairs)
    memory = [bench.once(f"peak memory {times}x", lambda t=times: peak_memory(plan, folder, t)) for times in (1, 4)]
    with console.importing_tensorflow():
        rates = bench.once("engines", lambda: engine_rates(plan.turns))
    for seed in plan.seeds:  # last, since what else runs on the machine matters to times alone
        compare(bench, Folder(folder / "compared"), (plan.compared, plan.compared_val), seed, str(seed), [*both, *own])
    return {
        "extract_speedup": speedup(bench.runs, "extract", "original"),
        "keras_speedup": speedup(bench.runs, "extract", "keras"),
        "finetune_speedup": speedup(bench.runs, "finetune", "original"),
        "same_math_speedups": same_math(bench.runs) if plan.same_math else None,
        "torch_speedup": speedup(bench.runs, "extract", "torch") if torch else None,
        "extract_accuracy_difference": difference(bench, plan, "extract"),
        "finetune_accuracy_difference": difference(bench, plan, "finetune"),
        "half_accuracy_differences": {stage: difference(bench, plan, stage, "flatmin-float32") for stage in EPOCHS},
        "peak_memory_growth": round(memory[1] / memory[0], 3),
        "litert_speedup": round(rates["litert"] / rates["tensorflow"], 2),
        "litert_half_speedup": round(rates["litert half"] / rates["tensorflow"], 2),
    }


def main() -> None:
    """Measure what is missing and write the results."""
    parser = argparse.ArgumentParser(description="Flatmin and the usual pipelines side by side.")
    parser.add_argument("--quick", action="store_true", help="less of everything, into bench/results-quick.json")
    is_quick = parser.parse_args().quick
    plan, name = (QUICK, "results-quick.json") if is_quick else (FULL, "results.json")
    if not has_cifar():
        plan = replace(plan, **{field: min(getattr(plan, field), most) for field, most in DIGITS.items()})
    with console.importing_tensorflow():
        bench = Bench(HERE / name, plan)
    with tempfile.TemporaryDirectory(prefix="flatmin-bench-") as folder:
        os.environ["FLATMIN_CACHE"] = str(Path(folder) / "cache")
        results = measure(bench, plan, Path(folder))
    bench.about["is_complete"] = True
    bench.write(results)


if __name__ == "__main__":
    main()
