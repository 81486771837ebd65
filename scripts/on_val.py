"""What val tells of a sweep's settings: how many were tried, which is best, and which of the others may be as good."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from dvc.api import DVCFileSystem
from grids import METRICS, SEEDED, SEEDS, Pipeline, Run, identity, needed_stages, read_pipeline, used_params
from provenance import output
from runs_table import cell, find, value

from flatmin.common import console, files, params
from flatmin.common.errors import InputError
from flatmin.evaluation import comparison

LEVEL = 0.95  # of all the intervals of one choice taken together
Seeds = tuple[int, ...]  # of a training, where it has its own; of data, of extract
Groups = dict[str, dict[str, list[Run]]]  # what is chosen from -> setting -> its runs, which differ in SEEDS


class Scores(NamedTuple):
    """What a classifier does on val: the images' names, and whether it classifies each correctly, bool [images]."""

    images: tuple[str, ...]
    correct: np.ndarray


def write(runs: Sequence[Run], path: Path) -> bool:
    """Print what val tells and write it as Markdown; False if nothing is compared, or DVC's cache lacks the logits."""
    pages = []
    for settings in group(runs, read_pipeline()).values():
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
    return next((stage for stage in stages if stage in (*SEEDED, "select-best")), "")


def group(runs: Sequence[Run], pipeline: Pipeline) -> Groups:
    """Runs by what is chosen from, the settings of one stage on the same data, and by setting."""
    groups: Groups = {}
    for run in runs:
        if stage := judged(run):
            settings = copy.deepcopy(dict(run.settings))
            settings["seeds"] = [0]
            settings["data"]["seed"] = settings["extract"]["seed"] = 0
            setting = identity([stage], params.parse(settings), pipeline)
            choice = json.dumps([stage, settings["data"]], sort_keys=True)
            groups.setdefault(choice, {}).setdefault(setting, []).append(run)
    return groups


def labels(settings: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """The params in which each setting differs from the others, of those that a grid sets and the stage uses."""
    firsts = {setting: some[0] for setting, some in settings.items()}
    stage, pipeline = judged(next(iter(firsts.values()))), read_pipeline()
    used = used_params(needed_stages([stage], pipeline), pipeline)
    prefixes = tuple(f"{name}." for name in used)
    keys = dict.fromkeys(key for run in firsts.values() for key in run.values if f"{key}.".startswith(prefixes))
    values = {key: {each: str(cell(value(run.settings, key))) for each, run in firsts.items()} for key in keys}
    varying = [key for key in keys if key not in SEEDS and len(set(values[key].values())) > 1]
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
        drawn = (value(run.settings, "data.seed") or 0, value(run.settings, "extract.seed") or 0)
        folder = f"models/{METRICS[stage]}"
        for seeds in [(seed, *drawn) for seed in run.settings["seeds"]] if stage in SEEDED else [drawn]:
            where = f"{folder}/{seeds[0]}" if stage in SEEDED else folder
            found[seeds] = _read(output("git", "rev-parse", ref).strip(), f"{where}/val_logits.npy", run.name)
    return found


def _read(commit: str, path: str, name: str) -> Scores:
    """Whether each val image gets its label from logits, float32 [images, classes]."""
    filesystem = DVCFileSystem(rev=commit)
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
    accuracies = {
        setting: float(np.mean([each.correct.mean() for each in scores.values()]))
        for setting, scores in settings.items()
    }
    ranked = sorted(settings, key=lambda setting: -accuracies[setting])
    best, level = ranked[0], 1 - (1 - LEVEL) / (len(ranked) - 1)
    rows, close, covers = [], list[str](), set[str]()
    for setting in ranked:
        found = compare(settings[best], settings[setting], level) if setting != best else None
        cells = ["", "best"] if setting == best else ["", "not compared: not the same val images"]
        if found:
            cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * found[key] for key in ("accuracy", "low", "high")))]
            cells.append("no" if found["low"] <= 0 <= found["high"] else "yes")
            covers.add(found["covers"])
        if found and cells[1] == "no":
            close.append(names[setting])
        rows.append((names[setting], len(settings[setting]), f"{accuracies[setting]:.4f}", *cells))
    head = (
        f"{len(ranked)} settings of {stage} were tried. Best on val: {names[best]}, {accuracies[best]:.4f}. "
        f"Val cannot tell from it: {'; '.join(close) or 'none of the others'}."
    )
    console.log(f"val: {head}")
    columns = ("setting", "seeds", "val accuracy", "best less it, points", "told apart")
    table = [columns, ["---"] * len(columns), *rows]
    lines = [f"| {' | '.join(map(str, line))} |" for line in table]
    note = (
        f"The intervals cover the truth together in {LEVEL:.0%} of sweeps (Bonferroni: {level:.2%} each), over "
        f"{' and '.join(sorted(covers)) or 'nothing'}, for this training set and this start. The best's own accuracy "
        "is optimistic, since val chose it."
    ).replace("%", " %")
    return "\n".join([head, "", *lines, "", note, ""])


def compare(first: Mapping[Seeds, Scores], second: Mapping[Seeds, Scores], level: float) -> dict[str, Any] | None:
    """How much more accurate the first is, with an interval; None where they have no seeds and images in common."""
    seeds = [each for each in first if each in second]
    if len({scores[each].images for scores in (first, second) for each in seeds}) != 1:
        return None
    rows = [np.array([scores[each].correct for each in seeds]) for scores in (first, second)]
    return comparison.crossed_difference(rows[0], rows[1], level=level)
