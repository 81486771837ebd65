"""What val tells of a sweep's settings: how many were tried, which is best, and which of the others may be as good."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grids
import numpy as np
from blocks import table
from dvc.api import DVCFileSystem
from grids import Pipeline, Run
from runs_table import cell, find

from flatmin.common import console, files, params
from flatmin.common.errors import InputError
from flatmin.evaluation import comparison

LEVEL = 0.95  # of all the intervals of one choice taken together
Seeds = tuple[int, ...]  # of a training, where it has its own; of data, of extract
Settings = dict[str, list[Run]]  # setting -> its runs, which differ in SEEDS


class Scores(NamedTuple):
    """What a classifier does on val: the images' names, and whether it classifies each correctly, bool [images]."""

    images: tuple[str, ...]
    correct: np.ndarray


def write(runs: Sequence[Run], path: Path) -> bool:
    """Print what val tells and write it as Markdown; False if nothing is compared, or DVC's cache lacks the logits."""
    pages = []
    for settings in group(runs, grids.read_pipeline()):
        if len(settings) == 1:
            continue
        try:
            scores = {setting: read_scores(some) for setting, some in settings.items()}
        except InputError as error:
            console.log(f"note: {path}: not written, since logits are gone: {error}")
            return False
        pages.append(describe(labels(settings), scores, judged(next(iter(settings.values()))[0])))
    if pages:
        with files.atomic_write(path) as temporary:
            temporary.write_text("# What val tells apart\n\n" + "\n".join(pages), encoding="utf-8")
    return bool(pages)


def judged(run: Run) -> str:
    """The stage whose classifiers val judges a run by: its last target that trains, or else sam-finetune."""
    stages = [stage for stage in (*reversed(run.targets), "sam-finetune", "select-best") if stage in run.stages]
    return next((stage for stage in stages if stage in (*grids.SEEDED, "select-best")), "")


def group(runs: Sequence[Run], pipeline: Pipeline) -> list[Settings]:
    """The settings of each choice: those of one stage on the same data."""
    groups: dict[str, Settings] = {}
    for run in runs:
        if stage := judged(run):
            settings = copy.deepcopy(dict(run.settings))
            settings["seeds"] = [0]
            settings["data"]["seed"] = settings["extract"]["seed"] = 0
            setting = grids.identity([stage], params.parse(settings), pipeline)
            choice = json.dumps([stage, settings["data"]], sort_keys=True)
            groups.setdefault(choice, {}).setdefault(setting, []).append(run)
    return list(groups.values())


def labels(settings: Settings) -> dict[str, str]:
    """The params in which each setting differs from the others, of those that a grid sets and the stage uses."""
    firsts = {setting: some[0] for setting, some in settings.items()}
    pipeline = grids.read_pipeline()
    stages = grids.needed_stages([judged(next(iter(firsts.values())))], pipeline)
    prefixes = tuple(f"{name}." for name in grids.used_params(stages, pipeline))
    keys = dict.fromkeys(key for run in firsts.values() for key in run.values if f"{key}.".startswith(prefixes))
    values = {key: {one: str(cell(grids.get_value(run.settings, key))) for one, run in firsts.items()} for key in keys}
    varying = [key for key in keys if key not in grids.SEEDS and len(set(values[key].values())) > 1]
    return {each: ", ".join(f"`{key}: {values[key][each] or 'default'}`" for key in varying) for each in firsts}


def read_scores(runs: Sequence[Run]) -> dict[Seeds, Scores]:
    """The scores of a setting's classifiers by their seeds, from the outputs of its experiments.

    Raises:
        InputError: an experiment, or what it kept in DVC's cache, is gone.
    """
    found: dict[Seeds, Scores] = {}
    for run in runs:
        ref, stage = find(run), judged(run)
        if not ref:
            raise InputError(f"{run.name}: expected its experiment in this checkout, found none")
        filesystem = DVCFileSystem(rev=grids.output("git", "rev-parse", ref).strip())
        drawn = (grids.get_value(run.settings, "data.seed") or 0, grids.get_value(run.settings, "extract.seed") or 0)
        folders: dict[Seeds, str] = {drawn: grids.METRICS[stage]}
        if stage in grids.SEEDED:
            folders = {(seed, *drawn): f"{grids.METRICS[stage]}/{seed}" for seed in run.settings["seeds"]}
        for seeds, folder in folders.items():
            found[seeds] = _read(filesystem, f"models/{folder}/val_logits.npy", run.name)
    return found


def _read(filesystem: DVCFileSystem, path: str, name: str) -> Scores:
    """Whether each val image gets its label from logits, float32 [images, classes]."""
    try:
        with filesystem.open("data/records/val/index.csv", "r", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        with filesystem.open(path, "rb") as file:
            logits = np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{name}: {path}: expected it in DVC's cache, found none ({error})") from None
    correct = logits.argmax(axis=1) == np.array([int(row["label"]) for row in rows])
    return Scores(tuple(row["name"] for row in rows), correct)


def describe(names: Mapping[str, str], settings: Mapping[str, Mapping[Seeds, Scores]], stage: str) -> str:
    """Markdown on one choice. names: a label for each setting.

    A setting is compared with the best over the seeds that both have. As many intervals as there are others cover the
    truth together, so with `LEVEL` the truly best one is among those that val cannot tell from the best it found.
    """
    means = {each: float(np.mean([one.correct.mean() for one in scores.values()])) for each, scores in settings.items()}
    best, *others = sorted(settings, key=lambda setting: -means[setting])
    level = 1 - (1 - LEVEL) / len(others)
    rows, close, covers = [], list[str](), set[str]()
    for setting in (best, *others):
        cells = ("", "best")
        if setting != best:
            cells = ("", "not compared: not the same val images")
            if found := compare(settings[best], settings[setting], level):
                mean, low, high = (100 * found[key] for key in ("accuracy", "low", "high"))
                cells = (f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]", "no" if low <= 0 <= high else "yes")
                covers.add(found["covers"])
        if cells[1] == "no":
            close.append(names[setting])
        rows.append((names[setting], len(settings[setting]), f"{means[setting]:.4f}", *cells))
    head = (
        f"{len(settings)} settings of {stage} were tried. Best on val: {names[best]}, {means[best]:.4f}. "
        f"Val cannot tell from it: {'; '.join(close) or 'none of the others'}."
    )
    console.log(f"val: {head}")
    note = (
        f"The intervals cover the truth together in {100 * LEVEL:.0f} % of sweeps (Bonferroni: {100 * level:.2f} % "
        f"each), over {' and '.join(sorted(covers)) or 'nothing'}, for this training set and this start. The best's "
        "own accuracy is optimistic, since val chose it."
    )
    columns = ("setting", "seeds", "val accuracy", "best less it, points", "told apart")
    return f"{head}\n\n{table(columns, rows)}\n{note}\n"


def compare(first: Mapping[Seeds, Scores], second: Mapping[Seeds, Scores], level: float) -> dict[str, Any] | None:
    """How much more accurate the first is, with an interval; None where they have no seeds and images in common."""
    seeds = [each for each in first if each in second]
    if len({scores[each].images for scores in (first, second) for each in seeds}) != 1:
        return None
    rows = [np.array([scores[each].correct for each in seeds]) for scores in (first, second)]
    return comparison.crossed_difference(rows[0], rows[1], level=level)
