"""What photographs of 12 megapixels take by stage: bench/photos.json, and a table of it.

    PYTHONPATH=src python bench/photos.py [COUNT] [--folder FOLDER]

Makes COUNT photographs (2,000 by default; about 3 MB each) of two classes in FOLDER, half of them held upright and so
turned by their EXIF orientation, and runs prepare, augment-preview, extract-train and finetune on them in a clone of
the last commit, each with two views. Memory is the largest sum over a stage's processes, shared pages counted once.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image

from flatmin.common import console, errors, files

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("photos.json")
HEIGHT, WIDTH = 3024, 4032
EVERY = 0.1  # seconds between two looks at memory
STAGES = {
    "prepare": (),
    "augment_preview": (),
    "extract_train": ("EfficientNetLite0",),
    "select_best": (),
    "finetune": ("42",),
}
RECIPE = {"epochs": 2, "views": 2, "image_size": 224, "batch_size": 32, "schedule": None}


def make(folder: Path, count: int) -> None:
    """Write the photographs that the folder lacks: noise in large blocks, with a sensor's grain, in JPEG."""
    random = np.random.default_rng(0)
    grain = random.normal(0, 4, (HEIGHT, WIDTH, 1)).astype(np.float32)
    for index in console.progress(range(count), "photographs", count, "photo"):
        blocks = random.integers(0, 256, (76, 101, 3), np.uint8)
        path = folder / ("cat" if index % 2 else "dog") / f"{index:05d}.jpg"
        if path.exists():
            continue
        large = Image.fromarray(blocks).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels = (np.asarray(large) + np.roll(grain, index * 37, axis=1)).clip(0, 255).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if index % 4 < 2 else 1
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "JPEG", quality=90, exif=exif)
        with files.atomic_write(path) as temporary:
            temporary.write_bytes(encoded.getvalue())


def measure(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run a command; seconds, and the largest memory of its processes together in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=environment)
    largest = [0]

    def watch() -> None:
        while process.poll() is None:
            largest[0] = max(largest[0], _memory(process.pid))
            time.sleep(EVERY)

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    watcher.join()
    if status:
        raise errors.InputError(f"{' '.join(command)}: expected it to succeed, received exit status {status}")
    return {"seconds": round(time.monotonic() - started, 1), "memory": largest[0]}


def _memory(process: int) -> int:
    """Bytes of a process and its children, shared pages counted once."""
    total = 0
    try:
        parent = psutil.Process(process)
        for each in (parent, *parent.children(recursive=True)):
            total += each.memory_full_info().pss
    except psutil.Error:
        pass  # it has just ended
    return total


def size(*folders: Path) -> int:
    """The total size of all files in these folders and below, in bytes."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def study(photographs: Path, folder: Path) -> None:
    """Clone the checkout, with params that read the photographs."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    splits = {"train": "train[:70%]", "val": "train[70%:85%]", "test": "train[85%:]"}
    params["data"] = {"source": "folder", "name": str(photographs), "splits": splits}
    params |= {"backbones": ["EfficientNetLite0"], "seeds": [42]}
    params["augment"] = {"engine": "imgaug", "n": 2, "m": 6, "flip": True}
    params["extract"] |= RECIPE
    params["finetune"] |= RECIPE
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def run(count: int, photographs: Path) -> None:
    make(photographs, count)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=photographs.parent) as scratch:
        clone, cache = Path(scratch, "study"), Path(scratch, "cache")
        study(photographs, clone)
        environment = os.environ | {"PYTHONPATH": "src", "FLATMIN_CACHE": str(cache)}
        before = 0
        for stage, items in STAGES.items():
            command = [sys.executable, f"stages/{stage}.py", *items]
            measured = measure(command, clone, environment)
            after = size(clone / "data", clone / "models", cache)
            found[stage] = measured | {"disk": after - before}
            before = after
    cores = len(os.sched_getaffinity(0))
    files.write_json(RESULTS, {"count": count, "cores": cores, "photographs": size(photographs), "stages": found})


def table(results: dict[str, Any]) -> str:
    """The table of docs/sizing.md."""
    lines = ["| stage | seconds | memory, MB | disk, MB |", "| --- | --- | --- | --- |"]
    for stage in STAGES:
        found = results["stages"][stage]
        megabytes = [f"{found[key] / 10**6:,.0f}" for key in ("memory", "disk")]
        lines.append(f"| {stage.replace('_', '-')} | {found['seconds']:.0f} | {' | '.join(megabytes)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/photographs")
    arguments = parser.parse_args()
    run(arguments.count, arguments.folder.resolve())
    console.log(table(files.read_json(RESULTS)))


if __name__ == "__main__":
    errors.run(main)
