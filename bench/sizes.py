"""What a study takes: seconds, memory and disk of each stage for a few data sets, and the bytes of cached activations.

    PYTHONPATH=src python bench/sizes.py     # bench/sizes.json, about half an hour on two cores and 8 GB of disk

The pictures are made here: JPEGs with a camera's grain, half of them turned by their EXIF orientation. Memory is the
largest sum over a stage's processes, shared pages counted once.
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image, ImageChops

from flatmin.common import console, errors, files

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("sizes.json")
# Title -> number of pictures (70 % of them train), their height and width, the network's input in pixels.
STUDIES = {
    "400 images of 72 pixels": (400, (72, 72), 96),
    "1,600 images of 72 pixels": (1600, (72, 72), 96),
    "2,000 photographs of 12 megapixels": (2000, (3024, 4032), 224),
}
ABOUT = (
    "EfficientNetLite0, one seed, two views and two epochs. Images of 72 pixels are seen at 96, photographs at 224. "
    "Memory is the largest sum over a stage's processes."
)
BACKBONES = ("EfficientNetLite0", "MobileNetV2", "EfficientNetB0", "EfficientNetV2B0", "ResNet50", "DenseNet121")


def draw(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write pictures of two classes: noise in large blocks, with a sensor's grain."""
    height, width = size
    levels = np.random.default_rng(0).normal(128, 4, (height, width)).clip(0, 255).astype(np.uint8)
    grain = Image.merge("RGB", [Image.fromarray(levels)] * 3)

    def write(index: int) -> None:
        shape = (math.ceil(height / 40), math.ceil(width / 40), 3)
        blocks = np.random.default_rng(index).integers(0, 256, shape, np.uint8)
        large = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
        picture = ImageChops.add(large, ImageChops.offset(grain, index * 37, 0), offset=-128)
        exif = Image.Exif()
        exif[0x0112] = 6 if index % 4 < 2 else 1
        path = folder / ("cat" if index % 2 else "dog") / f"{index:05d}.jpg"
        with files.atomic_write(path) as temporary:
            picture.save(temporary, "JPEG", quality=90, exif=exif)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(count)))


def study(folder: Path, pictures: Path, image_size: int) -> None:
    """Clone the checkout, with the default study's params on the pictures: two views, two epochs, one seed."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    splits = {"train": "train[:70%]", "val": "train[70%:85%]", "test": "train[85%:]"}
    params["data"] = {"source": "folder", "name": str(pictures), "splits": splits}
    params |= {"backbones": ["EfficientNetLite0"], "seeds": [42]}
    params["augment"] = {"engine": "imgaug", "n": 2, "m": 6, "flip": True}
    recipe = {"epochs": 2, "views": 2, "image_size": image_size, "batch_size": 32, "schedule": None}
    params["extract"] |= recipe
    params["finetune"] |= recipe | {"fine_tune_at": None}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def measure(command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run a command; seconds, and the largest memory of its processes together in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=environment)
    largest = [0]

    def watch() -> None:
        while process.poll() is None:
            largest[0] = max(largest[0], _memory(process.pid))
            time.sleep(0.1)

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
    """The size of all files in these folders, in bytes."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def stages(count: int, pixels: tuple[int, int], image_size: int) -> dict[str, dict[str, float]]:
    """Each stage's seconds, memory and disk, DVC's included; without what is copied to its cache."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clone, cache = folder / "study", folder / "cache"
        draw(folder / "pictures", count, pixels)
        study(clone, folder / "pictures", image_size)
        environment = os.environ | {"PYTHONPATH": "src", "FLATMIN_CACHE": str(cache)}
        before = size(clone / "data", clone / "models", cache)
        for stage in yaml.safe_load((clone / "dvc.yaml").read_text(encoding="utf-8"))["stages"]:
            measured = measure(["dvc", "repro", "--quiet", "--single-item", stage], clone, environment)
            after = size(clone / "data", clone / "models", cache)
            found[stage] = measured | {"disk": after - before}
            before = after
    return found


def views() -> dict[str, Any]:
    """Bytes of an image's cached activations at each backbone's default split point, two for each value."""
    from flatmin.models import classifier, registry

    found: dict[str, Any] = {}
    for name in BACKBONES:
        for side in (160, 224):
            network = classifier.create(name, ["a", "b"], image_size=side, dropout=0.2, seed=0, weights="none")
            frozen, _ = network.split(registry.find(name).fine_tune_at)
            found.setdefault(name, {})[str(side)] = {
                "split": registry.find(name).fine_tune_at,
                "pooled_bytes": 2 * int(network.base.output.shape[-1]),
                "bytes": sum(2 * math.prod(tensor.shape[1:]) for tensor in frozen.outputs),
            }
    return found


def main() -> None:
    studies = [{"title": title, "stages": stages(*settings)} for title, settings in STUDIES.items()]
    with console.importing_tensorflow():
        from flatmin import runtime

        found = {"about": ABOUT, "machine": runtime.machine(), "studies": studies, "views": views()}
    files.write_json(RESULTS, found)


if __name__ == "__main__":
    errors.run(main)
