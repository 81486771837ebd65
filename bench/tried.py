"""Run a study from pictures to the report, and compare what it takes with what `flatmin new` says: bench/tried.json.

    TFDS_DATA_DIR=... PYTHONPATH=src python bench/tried.py folder      # or table, stamps, digits

`folder` and `table` are ten classes of CIFAR-100's official validation pictures, uneven; they need TFDS_DATA_DIR with
visual_domain_decathlon/cifar100. `stamps` are photographs of Debian's package tuxpaint-stamps-default, by its folders.
`digits` is the default study. Each with fewer epochs, views and seeds than is written. `make docs` shows the results.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from flatmin.common import console, errors, files, params
from flatmin.common.errors import InputError
from flatmin.report.study import METHODS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("tried.json")
STAMPS = Path("/usr/share/tuxpaint/stamps")
# Label -> class and number of pictures.
CIFAR = {0: ("apple", 90), 8: ("bicycle", 75), 13: ("bus", 66), 21: ("chimpanzee", 60), 31: ("elephant", 54)}
CIFAR |= {52: ("oak_tree", 45), 53: ("orange", 40), 71: ("sea", 36), 82: ("sunflower", 30), 92: ("tulip", 24)}
CLASSES = ("animals/birds", "animals/mammals", "food/fruit", "food/vegetables", "household", "plants/flowers")
FEWER = {"seeds": [42], "backbones": ["EfficientNetLite0"]}
TRAININGS = {"extract": {"epochs": 6, "views": 2}, "finetune": {"epochs": 3, "views": 2}}


def write_cifar(folder: Path) -> list[tuple[str, str]]:
    """Write the pictures as class folders; return path and class of each."""
    from flatmin.data import sources

    splits = params.Splits(train="train", val="validation", test="test")
    name = "visual_domain_decathlon/cifar100"
    source = sources.open_source(params.Data(source="tfds", name=name, splits=splits))
    rows: list[tuple[str, str]] = []
    left = {label: count for label, (_, count) in CIFAR.items()}
    for example in source.examples("validation"):
        if left.get(example.label, 0):
            left[example.label] -= 1
            name, _ = CIFAR[example.label]
            path = folder / name / f"{left[example.label]:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(example.encoded())
            rows.append((str(path), name))
    return rows


def folder(into: Path) -> list[str]:
    write_cifar(into)
    return ["--folder", str(into)]


def table(into: Path) -> list[str]:
    rows = write_cifar(into / "pictures")
    with (into / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "what"), *rows])
    return ["--csv", str(into / "table.csv"), "--image", "path", "--label", "what"]


def stamps(into: Path) -> list[str]:
    if not STAMPS.is_dir():
        raise InputError(f"{STAMPS}: expected the pictures of the package tuxpaint-stamps-default, found none")
    for name in CLASSES:
        for path in (STAMPS / name).rglob("*.png"):
            if "cartoon" not in path.parts:
                copy = into / Path(name).name / path.relative_to(STAMPS / name).as_posix().replace("/", "-")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
    return ["--folder", str(into)]


SETS: dict[str, Callable[[Path], list[str]] | None] = {
    "folder": folder,
    "table": table,
    "stamps": stamps,
    "digits": None,
}


def write_params(name: str, checkout: Path, pictures: Path) -> Path:
    """Write the study's params in the checkout, by `flatmin new` where the pictures are not the default study's."""
    written = checkout / "params.yaml"
    if make := SETS[name]:
        pictures.mkdir()
        command = [sys.executable, "-m", "flatmin.cli", "new", name, *make(pictures)]
        subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": "src"}, check=True)
        written = checkout / f"studies/{name}/params.yaml"
    values = yaml.safe_load(written.read_text(encoding="utf-8")) | FEWER
    for section, changes in TRAININGS.items():
        values[section] |= changes
    path = checkout / "params.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def say(path: Path, imported: float) -> tuple[int, dict[str, float], float]:
    """The number of pictures, and what is said that the study takes: seconds of each stage, and bytes.

    imported: the seconds that importing TensorFlow took.
    """
    from flatmin.use import new, survey

    settings = params.load(path)
    found = survey.survey(settings.data)
    said = new.expected(settings, found, imported)
    return sum(found.total(role) for role in found.counts), said.seconds, said.bytes


def run(checkout: Path, cache: Path) -> dict[str, float]:
    """Run the study. Seconds of each stage, all of its runs together, what DVC does around them included."""
    environment = os.environ | {"PYTHONPATH": "src", "FLATMIN_CACHE": str(cache)}
    took: dict[str, float] = {}
    stage, since = "dvc", time.perf_counter()
    with subprocess.Popen(
        ["dvc", "repro"], cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True
    ) as running:
        for line in running.stdout or ():
            if found := re.match(r"Running stage '([a-z-]+)", line):
                now = time.perf_counter()
                took[stage] = took.get(stage, 0) + now - since
                stage, since = found[1], now
    took[stage] = took.get(stage, 0) + time.perf_counter() - since
    if running.returncode:
        raise InputError(f"dvc repro: expected exit code 0, received {running.returncode}")
    return took


def disk(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def tried(name: str, checkout: Path, folder: Path, imported: float) -> dict[str, Any]:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    path = write_params(name, checkout, folder / "pictures")
    load = os.getloadavg()[0]
    pictures, said, size = say(path, imported)
    for old in ("metrics", "plots"):
        shutil.rmtree(checkout / old)
    (checkout / "dvc.lock").unlink()
    took = run(checkout, folder / "cache")
    scores: Mapping[str, Any] = files.read_json(checkout / "metrics/evaluate.json")
    return {
        "pictures": pictures,
        "seconds": {stage: {"said": round(said[stage], 1), "took": round(took[stage], 1)} for stage in said},
        "said": {"minutes": sum(said.values()) / 60, "gigabytes": size / 1e9},
        "took": {
            "minutes": sum(took.values()) / 60,
            "gigabytes": disk(folder / "cache", *(checkout / part for part in (".dvc/cache", "data", "models"))) / 1e9,
        },
        "waiting": {"before": load, "after": os.getloadavg()[0]},  # processes that want a core, over a minute
        "accuracy": {method: scores[method]["test"]["accuracy"] for method in ("extract", *METHODS)},
        "sam_minus_control": {key: scores["sam_minus_control"][key] for key in ("accuracy", "low", "high", "images")},
    }


def main(name: str = "") -> None:
    if name not in SETS:
        raise InputError(f"expected one of {', '.join(SETS)}, received {name!r}")
    started = time.perf_counter()
    with console.importing_tensorflow():
        import flatmin.use.new  # noqa: F401
    imported = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        found = tried(name, Path(folder, "checkout"), Path(folder), imported)
    results = files.read_json(RESULTS) if RESULTS.exists() else {}
    files.write_json(RESULTS, results | {name: found})


if __name__ == "__main__":
    errors.run(main, *sys.argv[1:])
