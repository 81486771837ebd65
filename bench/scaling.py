"""How each stage's time, memory and disk grow, measured on small studies; and what that means for large ones.

`python bench/scaling.py` measures what bench/scaling.json lacks, point by point, and fits the lines; `--again` measures
all of it again and keeps the faster, since what else runs on a machine only ever slows a stage. `--table` prints the
tables of docs/sizing.md. The stages are the real ones, each in a process of its own, in a temporary folder.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from speed import CIFAR, has_cifar

from flatmin.common import console, errors, files
from flatmin.common.errors import InputError

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("scaling.json")
BACKBONE = "EfficientNetLite0"
SEED = "42"  # the trainings'
STAGES = {
    "extract-train": ["stages/extract_train.py", BACKBONE],
    "finetune": ["stages/finetune.py", SEED],
    "sam-finetune": ["stages/sam_finetune.py", SEED],
    "evaluate": ["stages/evaluate.py"],
}
# What later ones need besides, after which stage it can run. control takes about as long as sam-finetune.
UNMEASURED = {
    "extract-train": [["stages/select_best.py"]],
    "sam-finetune": [["stages/control.py", SEED], ["stages/finalize.py"]],
}
STORED = 72  # side in pixels of the images that the studies store
EXTRACT = 10  # extract-train's epochs for each of finetune's: they are too quick to be seen else
CORES = 2  # that a study may use, where it does not say otherwise
MEGA = 1e6

Point = dict[str, Any]
Line = dict[str, float]
Term = Callable[[Point], float]


@dataclass(frozen=True)
class Study:
    """So many train images, a fifth as many of val, as many of test; `size` in pixels is the network's input."""

    images: int
    size: int = 96
    views: int = 2
    epochs: int = 2


@dataclass(frozen=True)
class Pictures:
    """A folder of so many JPEGs, `side` pixels square."""

    images: int
    side: int


STUDIES = [
    Study(600, size=160),
    Study(600, views=6),
    Study(300),
    Study(1200),
    Study(600, epochs=6),
]
PREPARED = [Pictures(5000, 8), Pictures(40_000, 8), Pictures(3000, 72), Pictures(1500, 160), Pictures(1500, 320)]
AUGMENTED = [(72, 0), (160, 0), (320, 0), *((160, workers) for workers in range(1, CORES + 1))]
INDEXED = (200_000, 1_000_000)
BACKBONES = ("EfficientNetLite0", "MobileNetV2", "EfficientNetB0", "EfficientNetV2B0", "ResNet50", "DenseNet121")
SIZES = (160, 224)

# What a stage's time is made of, besides a constant.
TRAINING: dict[str, Term] = {
    "image_view": lambda point: point["images"] * point["views"],
    "image_view_megapixel": lambda point: point["images"] * point["views"] * point["size"] ** 2 / MEGA,
    "image_epoch_megapixel": lambda point: point["images"] * point["epochs"] * point["size"] ** 2 / MEGA,
}
TERMS: dict[str, dict[str, Term]] = {
    "prepare": {
        "image": lambda point: point["images"],
        "image_megapixel": lambda point: point["images"] * point["side"] ** 2 / MEGA,
    },
    # The classifier behind a frozen backbone sees pooled features, whatever the size of the image.
    "extract-train": {
        "image_view": TRAINING["image_view"],
        "image_view_megapixel": TRAINING["image_view_megapixel"],
        "image_epoch": lambda point: point["images"] * point["epochs"],
    },
    "finetune": TRAINING,
    # It finds the views that finetune left; reading them through once, to check them, takes too little to be seen.
    "sam-finetune": {"image_epoch_megapixel": TRAINING["image_epoch_megapixel"]},
    "evaluate": {
        "test_image": lambda point: point["images"] / 5,
        "test_image_megapixel": lambda point: point["images"] / 5 * point["size"] ** 2 / MEGA,
    },
    "augment": {  # a worker's, for each image; `side` is that of the stored one
        "picture": lambda point: 1.0,
        "picture_megapixel": lambda point: point["side"] ** 2 / MEGA,
    },
}


# Measuring


def measure(again: bool) -> None:
    """Add the points that bench/scaling.json lacks, each as soon as it is there; then the lines.

    Raises:
        InputError: what is there was measured on another kind of machine, or on other images.
    """
    here = ask("machine")
    results = files.read_json(RESULTS) if RESULTS.exists() else dict(here)
    for name, value in here.items():
        if results.get(name) != value:
            raise InputError(
                f"{RESULTS}: {name}: expected {value!r}, as here, found {results.get(name)!r}; move it away"
            )
    points: dict[str, Point] = results.setdefault("points", {})

    def keep(name: str, point: Point) -> None:
        time_of = "processor_seconds" if "processor_seconds" in point else "seconds"
        if name not in points or point.get(time_of, 0.0) < points[name].get(time_of, 0.0):
            points[name] = point
        files.write_json(RESULTS, results)
        console.log(f"{name}: {json.dumps(point)}")

    results["boundaries"] = results.get("boundaries") or ask("boundaries")
    for pictures in PREPARED:
        name = key("prepare", pictures)
        if again or name not in points:
            keep(name, prepare(pictures))
    for side, workers in AUGMENTED:
        name = f"augment side={side} workers={workers}"
        if again or name not in points:
            keep(name, ask("augment", str(side), str(workers)))
    for images in INDEXED:
        name = f"index images={images}"
        if name not in points:
            keep(name, ask("index", str(images)))
    for study in STUDIES:
        if again or any(key(stage, study) not in points for stage in STAGES):
            for stage, point in train(study):
                keep(key(stage, study), point)
    files.write_json(RESULTS, results | {"lines": lines(points)})


def key(stage: str, settings: Study | Pictures) -> str:
    return " ".join([stage, *(f"{name}={value}" for name, value in asdict(settings).items())])


def ask(part: str, *arguments: str) -> dict[str, Any]:
    """What a part of this file answers in a process of its own: TensorFlow here would count in every child's memory."""
    command = [sys.executable, __file__, "--part", part, *arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment())
    return json.loads(answer.stdout.splitlines()[-1])


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "TF_CPP_MIN_LOG_LEVEL": "2"} | more


def prepare(pictures: Pictures) -> Point:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = draw(folder, pictures)
        copy_code(folder)
        write_params(folder, Study(1), splits(round(pictures.images / 1.4)))
        point = run(folder, "prepare", ["stages/prepare.py"])
        return {"stage": "prepare"} | asdict(pictures) | point | {"source_bytes": source}


def train(study: Study) -> Iterator[tuple[str, Point]]:
    """Each training stage and evaluate, one after the other as DVC would run them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, Pictures(math.ceil(study.images * 1.4), STORED))
        copy_code(folder)
        write_params(folder, study, splits(study.images))
        run(folder, "prepare", ["stages/prepare.py"])
        for stage, command in STAGES.items():
            epochs = {"epochs": study.epochs * (EXTRACT if stage == "extract-train" else 1)}
            yield stage, {"stage": stage} | asdict(study) | epochs | run(folder, stage, command)
            for needed in UNMEASURED.get(stage, ()):
                run(folder, Path(needed[0]).stem, needed)


def copy_code(folder: Path) -> None:
    """The code as it is now: what changed between two stages would have the views computed again."""
    for name in ("src", "stages"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy2(ROOT / "dvc.yaml", folder)  # which declares what a stage reads


def draw(folder: Path, pictures: Pictures) -> int:
    ask("draw", str(folder / "pictures"), str(pictures.images), str(pictures.side))
    return size_of(folder / "pictures")


def splits(images: int) -> dict[str, str]:
    fifth = images // 5
    return {
        "train": f"train[:{images}]",
        "val": f"train[{images}:{images + fifth}]",
        "test": f"train[{images + fifth}:]",
    }


def write_params(folder: Path, study: Study, splits: Mapping[str, str]) -> None:
    """The default study's params with the images and settings of this one."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    recipe = {"image_size": study.size, "views": study.views, "epochs": study.epochs, "batch_size": 50}
    params["seeds"] = [int(SEED)]
    params["data"] = {"source": "folder", "name": "pictures", "splits": dict(splits)}
    params["augment"] = {"engine": "imgaug", "n": 3, "m": 7, "flip": True}
    params["backbones"] = [BACKBONE]
    params["extract"] |= recipe | {"epochs": EXTRACT * study.epochs}
    params["finetune"] |= recipe | {"schedule": None, "fine_tune_at": None}
    params["evaluate"] |= {"sharpness": {"images": 16, "steps": 3, "probes": 1}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def run(folder: Path, stage: str, command: Sequence[str]) -> Point:
    """Seconds, peak memory in bytes of the largest process, bytes that appeared by folder; the machine's load before.

    Raises:
        InputError: the stage failed.
    """
    load = os.getloadavg()[0]
    before = sizes_of(folder)
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=environment(FLATMIN_CACHE=str(folder / "cache"), PYTHONPATH=str(folder / "src")),
            stdout=output,
            stderr=output,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise InputError(f"{stage}: expected it to succeed, received {output.read().decode()[-2000:]}")
    after = sizes_of(folder)
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "memory": usage.ru_maxrss * 1024,
        "disk": {name: after[name] - before.get(name, 0) for name in after if after[name] > before.get(name, 0)},
        "load": round(load, 2),
    }


def sizes_of(folder: Path) -> dict[str, int]:
    return {name: size_of(folder / name) for name in ("data/records", "models", "cache/views", "predictions")}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def lines(points: Mapping[str, Point]) -> dict[str, Line]:
    """For each stage the constant and the slopes by least squares, none below zero: in seconds of one core, which
    other work on the machine changes least, and in bytes of memory.

    error: the largest distance of a point from the line, as a fraction of the point.
    """
    import numpy as np
    from scipy.optimize import nnls

    def fit(found: Sequence[Point], terms: Mapping[str, Term], value: str, constant: bool = True) -> Line:
        all_terms = ({"constant": lambda _: 1.0} if constant else {}) | dict(terms)
        matrix = np.array([[term(point) for term in all_terms.values()] for point in found], float)
        values = np.array([point[value] for point in found], float)
        scale = matrix.max(axis=0)
        solved, _ = nnls(matrix / scale, values)
        error = float(np.abs(matrix / scale @ solved / values - 1).max())
        return dict(zip(all_terms, (solved / scale).tolist(), strict=True)) | {"error": error}

    of_stage: dict[str, list[Point]] = {}
    for point in points.values():
        if not point.get("workers"):
            of_stage.setdefault(point["stage"], []).append(point)
    found = {
        stage: fit(of_stage[stage], terms, "processor_seconds", constant=stage != "augment")
        for stage, terms in TERMS.items()
    }
    least = min(point["side"] for point in of_stage["prepare"])  # whose pixels take next to no memory
    small = [point for point in of_stage["prepare"] if point["side"] == least]
    for stage, of_images in (("prepare", small), ("index", of_stage["index"])):
        found[f"{stage} memory"] = fit(of_images, {"image": lambda point: point["images"]}, "memory")
    return found


# Tables


SMALL, LARGE, HUGE = 50_000, 1_300_000, 100_000_000
NEED = {"size": 160, "views": 4, "epochs": 10}
LATER = 1.2  # images of train and val, for each of train
ALL = 1.4
CLASSES = 1000
MODELS = ("extract", "finetune", "sam")  # that evaluate scored when the points were measured
LIMIT = 50e9  # bytes, the default of $FLATMIN_CACHE_LIMIT
# What can't be measured here: assumptions, with their sources in docs/sizing.md.
SOURCE_BYTES = 115_000
SOURCE_SIDE = 400
GPU_RATES = {1: 938.0, 8: 7248.0}
CORES_OF_GPU = 8
UNITS = {
    "image": "n",
    "image_megapixel": "n p",
    "picture": "n v",
    "picture_megapixel": "n v s",
    "test_image": "t",
    "test_image_megapixel": "t p",
    "image_view": "n v",
    "image_view_megapixel": "n v p",
    "image_epoch": "n e",
    "image_epoch_megapixel": "n e p",
}


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """Markdown tables by name, from the contents of bench/scaling.json."""
    fitted = lines(results["points"])
    return {
        "measured": measured(results["points"], fitted),
        "workers": speed_by_workers(results["points"]),
        "views": bytes_of_views(results["boundaries"]),
        "needs": needs(results, fitted),
        "gpus": gpus(results["boundaries"], fitted),
        "limits": limits(results, fitted),
    }


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def measured(points: Mapping[str, Point], fitted: Mapping[str, Line]) -> str:
    rows = []
    for stage, terms in TERMS.items():
        line = fitted[stage]
        first = f"{line['constant']:.1f} s" if "constant" in line else ""
        parts = [first, *(f"{1000 * line[term]:.2f} ms {UNITS[term]}" for term in terms if line[term])]
        studies = (Study(300), Study(1200), Study(600, size=160)) if stage in STAGES else ()
        names = [key(stage, study) for study in studies]
        peaks = [amount(points[name]["memory"]) if name in points else "-" for name in names]
        rows.append([stage, " + ".join(filter(None, parts)), f"{line['error']:.0%}", ", ".join(peaks)])
    rows[0][-1] = f"{amount(fitted['prepare memory']['constant'])} + {fitted['prepare memory']['image']:.0f} B n"
    rows.append(["names and labels, in every later stage", "", "", f"{fitted['index memory']['image']:.0f} B n"])
    return markdown(
        ["stage", "seconds of one core", "largest error", "peak memory: 300, 1,200 images, 600 at 160 px"], rows
    )


def speed_by_workers(points: Mapping[str, Point]) -> str:
    found = {number: points[f"augment side={side} workers={number}"] for side, number in AUGMENTED if number}
    rates = (f"{1 / point['seconds']:.0f} images a second with workers={number}" for number, point in found.items())
    return f"Augmentation at 160 px: {', '.join(rates)}."


def bytes_of_views(boundaries: Mapping[str, Any]) -> str:
    rows = []
    for name, sizes in boundaries.items():
        large = sizes["224"]
        fitting = LIMIT / (large["bytes"] * (NEED["views"] + LATER - 1))
        of_sizes = [f"{sizes[str(size)]['bytes']:,}" for size in SIZES]
        rows.append([name, f"`{large['split']}`", f"{large['pooled_bytes']:,}", *of_sizes, f"{fitting:,.0f}"])
    header = [
        "backbone",
        "split of finetune",
        "extract",
        *(f"finetune, {size} px" for size in SIZES),
        "images in 50 GB",
    ]
    return markdown(header, rows)


def needs(results: Mapping[str, Any], fitted: Mapping[str, Line]) -> str:
    rows = []
    found = {images: need(images, results, fitted) for images in (SMALL, LARGE, HUGE)}
    for stage in found[SMALL]:
        of_stage = [of_images[stage] for of_images in found.values()]
        cells = [(duration(of["seconds"]), amount(of["memory"]), amount(of["disk"])) for of in of_stage]
        rows.append([stage, *map(", ".join, cells)])
    machines = [f"{math.ceil(of_images['sam-finetune']['seconds'] / 86400):,}" for of_images in found.values()]
    rows.append(["machines that end sam-finetune in a day", *machines])
    return markdown(["stage: time, memory, disk", "50 thousand", "1.3 million", "100 million"], rows)


def need(images: int, results: Mapping[str, Any], fitted: Mapping[str, Line]) -> dict[str, dict[str, float]]:
    """Seconds, bytes of memory and of disk by stage, for so many train images on the machine measured."""
    recipe = NEED | {"images": images, "side": SOURCE_SIDE}
    larger = fitted["augment"]["picture_megapixel"] * (SOURCE_SIDE**2 - STORED**2) / MEGA * images * NEED["views"]
    memory, disk = memory_and_disk(images, results, fitted)
    found = {}
    for stage in ("prepare", *STAGES):
        point = recipe | {"images": ALL * images} if stage == "prepare" else recipe
        point = point | {"epochs": 2 * NEED["epochs"]} if stage == "extract-train" else point
        seconds = fitted[stage]["constant"] + sum(fitted[stage][name] * of(point) for name, of in TERMS[stage].items())
        seconds += larger if stage in ("extract-train", "finetune") else 0.0
        seconds /= 1 if stage == "prepare" else CORES
        found[stage] = {"seconds": seconds, "memory": memory[stage], "disk": disk[stage]}
    return found


def memory_and_disk(
    images: int, results: Mapping[str, Any], fitted: Mapping[str, Line]
) -> tuple[dict[str, float], dict[str, float]]:
    boundary, points = results["boundaries"][BACKBONE][str(NEED["size"])], results["points"]
    index, tests = fitted["index memory"]["image"], (ALL - LATER) * images
    memory = {stage: points[key(stage, Study(600, size=NEED["size"]))]["memory"] for stage in STAGES}
    for stage in ("extract-train", "finetune", "sam-finetune"):
        memory[stage] += (index * LATER + 16) * images  # an epoch's order, and where a share's examples are
    memory["evaluate"] += (index + 4 * (len(MODELS) + 1) * CLASSES) * tests  # one model's logits are there twice
    prepared = fitted["prepare memory"]
    memory["prepare"] = prepared["constant"] + prepared["image"] * ALL * images
    kept = (NEED["views"] + LATER - 1) * images
    disk = {
        "prepare": 2 * SOURCE_BYTES * ALL * images,  # DVC's cache has them too
        "extract-train": boundary["pooled_bytes"] * kept,
        "finetune": boundary["bytes"] * kept,
        "sam-finetune": 0,  # shares finetune's
        "evaluate": points[key("evaluate", Study(1200))]["disk"]["predictions"] / (1200 // 5) * tests,
    }
    return memory, disk


def gpus(boundaries: Mapping[str, Any], fitted: Mapping[str, Line]) -> str:
    """The example of docs/sizing.md: 1.3 million images at 224 px, ResNet50 from its default split point on."""
    boundary = boundaries["ResNet50"]["224"]
    frozen, views, epochs = boundary["frozen_share"], NEED["views"], NEED["epochs"]
    augment = fitted["augment"]["picture"] + fitted["augment"]["picture_megapixel"] * SOURCE_SIDE**2 / MEGA
    kept = LARGE * (views + LATER - 1)
    columns = {}
    for number, rate in GPU_RATES.items():
        step = LARGE * epochs * (1 - frozen) / rate
        scoring = step * (LATER - 1) / 3
        columns[number] = {
            f"augment, {CORES_OF_GPU} cores a GPU": duration(LARGE * views * augment / (CORES_OF_GPU * number)),
            "frozen layers over the views": duration(kept * frozen / (3 * rate)),
            "finetune's trained layers": duration(step + scoring),
            "sam-finetune's trained layers": duration(2 * step + scoring),
            "disk for views": amount(kept * boundary["bytes"]),
            "read while the trained layers train": f"{amount(rate / (1 - frozen) * boundary['bytes'])}/s",
        }
    rows = [[name, *(column[name] for column in columns.values())] for name in columns[1]]
    rates = [f"{number} GPU{'s' * (number > 1)}, R = {rate:,.0f}" for number, rate in GPU_RATES.items()]
    return markdown([f"f = {frozen:.2f}, a = {1000 * augment:.1f} ms", *rates], rows)


def limits(results: Mapping[str, Any], fitted: Mapping[str, Line]) -> str:
    """Up to how many images it goes, by the lines."""
    prepare, memory = fitted["prepare"], fitted["prepare memory"]
    of_evaluate, _ = memory_and_disk(0, results, fitted)
    of_test = fitted["index memory"]["image"] + 4 * (len(MODELS) + 1) * CLASSES
    a_day = (86400 - prepare["constant"]) / (prepare["image"] + prepare["image_megapixel"] * SOURCE_SIDE**2 / MEGA)
    prepared = (16e9 - memory["constant"]) / memory["image"]
    tested = (16e9 - of_evaluate["evaluate"]) / of_test
    return (
        f"By these lines prepare takes a day for {a_day / MEGA:.0f} million images and 16 GB for {prepared / MEGA:.0f} "
        f"million; evaluate takes 16 GB for {tested / MEGA:.2f} million of test."
    )


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}" if seconds < 1000 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s"


def amount(count: float) -> str:
    for unit, length in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.3g} {unit}"
    return f"{count:.0f} B"


# Parts that need TensorFlow, each in a process of its own


def of_machine() -> dict[str, Any]:
    from flatmin import runtime

    return {"machine": runtime.machine(), "images": "CIFAR-100" if has_cifar() else "digits"}


def source_images() -> Iterator[tuple[bytes, int]]:
    """Encoded images and labels, the same ones again and again."""
    from flatmin.common.params import Data, Splits
    from flatmin.data import sources

    splits = Splits(train="train", val="train", test="train")
    if has_cifar():
        data = Data(source="tfds", name=CIFAR, seed=0, splits=splits)
    else:
        data = Data(source="bundled", name="digits", seed=0, splits=splits)
    source = sources.open_source(data)
    while True:
        for example in source.examples("train"):
            yield example.image, example.label


def resized(image: bytes, side: int) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(image)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def of_draw(folder: str, images: str, side: str) -> dict[str, Any]:
    """Write JPEGs, as many for each class, in a folder for each."""
    classes = 100 if has_cifar() else 10
    each = [math.ceil((int(images) - label) / classes) for label in range(classes)]
    drawn = [0] * classes
    for image, label in source_images():
        if drawn[label] < each[label]:
            path = Path(folder) / f"class_{label:03d}" / f"picture_{drawn[label]:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            resized(image, int(side)).save(path, quality=90)
            drawn[label] += 1
        if sum(drawn) == int(images):
            return {}
    raise AssertionError("the images never end")


def of_augment(side: str, workers: str) -> dict[str, Any]:
    """Time to read, augment (RandAugment, n=3) and resize an image: in this many workers, or in this process with 0."""
    from threadpoolctl import threadpool_limits

    from flatmin.common.params import Augment, Data
    from flatmin.data import writer
    from flatmin.inputs.augment import AUGMENT_CHUNK, Augmentation, positions
    from flatmin.inputs.pixels import Task
    from flatmin.inputs.records import Records
    from flatmin.inputs.workers import Augmenter

    settings = Augment(n=3, m=7, flip=True)
    chunks = range(16)
    count = len(chunks) * AUGMENT_CHUNK
    point: Point = {"stage": "augment", "side": int(side), "workers": int(workers)}
    with tempfile.TemporaryDirectory() as folder:
        of_draw(f"{folder}/pictures", str(count + count // 5 + 100), side)
        data = {"source": "folder", "name": f"{folder}/pictures", "splits": splits(count)}
        writer.write(Data.model_validate(data), f"{folder}/records")
        records = Records(f"{folder}/records")
        if not int(workers):
            threadpool_limits(1)  # as a worker has it
            tasks = [
                Task(
                    records.stored("train", positions(chunk, count)),
                    STORED,
                    records.fit("train"),
                    Augmentation(settings, 0, 1, chunk),
                )
                for chunk in chunks
            ]
            tasks[0].run()  # imports imgaug
            started = time.process_time()
            for task in tasks:
                task.run()
            return point | {"processor_seconds": (time.process_time() - started) / count}
        with Augmenter(settings, 0, int(workers)) as augmenter:
            deque(augmenter.chunks(records, STORED, 0, chunks), 0)  # starts the workers
            started = time.perf_counter()
            deque(augmenter.chunks(records, STORED, 1, chunks), 0)
            return point | {"seconds": (time.perf_counter() - started) / count}


def of_index(images: str) -> dict[str, Any]:
    """Peak memory of a process that reads names and labels of so many train images, as every later stage does."""
    from flatmin.images import OWN_SIZE
    from flatmin.inputs.records import INDEX, ROLE, Records

    with tempfile.TemporaryDirectory() as folder:
        role = Path(folder) / "train"
        columns = ("name", "label", "shard", "offset", "bytes", "crc32", "orientation", "height", "width")
        rows = (
            (f"class_{index % 1000:03d}/picture_{index:09d}.jpg", index % 1000, "0.tfrecord", index, 1, 1, 1, 1, 1)
            for index in range(int(images))
        )
        files.write_csv(role / INDEX, columns, rows)
        info = {"class_names": [str(label) for label in range(1000)], "count": int(images), "mean_pixels": 1.0}
        index = {"bytes": (role / INDEX).stat().st_size, "sha256": files.sha256(role / INDEX)}
        info |= {"fit": "squash", "stored": OWN_SIZE._asdict(), "files": {INDEX: index}, "digest": ""}
        files.write_json(role / ROLE, info)
        Records(folder).labels("train")
    # getrusage's peak would be the parent's where that is larger: Linux carries it over into a child.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    memory = int(status["VmHWM"].split()[0]) * 1024
    return {"stage": "index", "images": int(images), "memory": memory}


def of_boundaries() -> dict[str, Any]:
    """Bytes of an image's view at each backbone's default split point, and the share of multiply-adds before it."""
    from flatmin.models import build, classifier, registry

    found: dict[str, Any] = {}
    for name in BACKBONES:
        for size in SIZES:
            network = classifier.create(name, ["a", "b"], image_size=size, dropout=0.2, seed=0, weights="none")
            frozen, _ = network.split(registry.find(name).fine_tune_at)
            bytes_of_view = sum(2 * math.prod(tensor.shape[1:]) for tensor in frozen.outputs)
            share = build.multiply_adds(frozen) / network.description.multiply_adds
            found.setdefault(name, {})[str(size)] = {
                "split": registry.find(name).fine_tune_at,
                "pooled_bytes": 2 * int(network.base.output.shape[-1]),
                "bytes": bytes_of_view,
                "frozen_share": share,
            }
    return found


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": of_machine,
    "draw": of_draw,
    "augment": of_augment,
    "index": of_index,
    "boundaries": of_boundaries,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--again", action="store_true", help="measure all again, keep the faster")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/sizing.md, measure nothing")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        with console.importing_tensorflow():
            answer = PARTS[arguments.part[0]](*arguments.part[1:])
        print(json.dumps(answer))
    elif arguments.table:
        print("\n\n".join(tables(files.read_json(RESULTS)).values()))
    else:
        measure(arguments.again)


if __name__ == "__main__":
    errors.run(main)
