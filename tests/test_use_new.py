"""`flatmin new` and `flatmin check`: what they say of data, and that the params which they write are good."""

from __future__ import annotations

import csv
import itertools
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fixtures import picture_folder, tiny_params
from pictures import cats_and_dogs, encode, picture, write_picture
from repository import ROOT

from flatmin.common import files, params
from flatmin.common.errors import InputError
from flatmin.common.params import Data
from flatmin.common.params_errors import read_yaml
from flatmin.data import writer
from flatmin.data.images import read_picture
from flatmin.data.sources.base import Example
from flatmin.inputs import workers
from flatmin.use import check, estimate, new, recipe, survey


def section(path: Path, **columns: str) -> dict[str, Any]:
    source = "table" if path.suffix == ".csv" else "folder"
    return {"source": source, "name": str(path), "columns": columns}


def data_of(path: Path) -> Data:
    values = section(path)
    return recipe.data_section(values, survey.split_sizes(Data.model_validate(values)))


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    for seed, row in enumerate(rows):
        write_picture(path.parent / row["image"], seed)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": 5, "val": 2, "test": 2}, {"train": 10, "val": 4, "test": 4}),
        ({"train": 5, "validation": 2}, {"train": 7, "val": 4, "test": 3}),
        ({"train": 5, "test": 3}, {"train": 8, "val": 2, "test": 6}),
        ({"train": 10}, {"train": 12, "val": 2, "test": 6}),
    ],
)
def test_splits_that_lack_are_taken_out_of_train(
    tmp_path: Path, splits: dict[str, int], expected: dict[str, int]
) -> None:
    found = survey.survey(data_of(cats_and_dogs(tmp_path, **splits)))
    assert {role: found.total(role) for role in found.counts} == expected


def test_survey_counts_are_those_of_the_records(tmp_path: Path) -> None:
    folder = cats_and_dogs(tmp_path / "pictures", train=9, test=3)
    for index in range(6):
        write_picture(folder / f"train/dog/more{index}.png", 900 + index)
        write_picture(folder / f"predict/{index}.png", 950 + index)
    data = data_of(folder)
    found = survey.survey(data)
    writer.write(data, tmp_path / "records")
    roles = files.read_json(tmp_path / "records/dataset.json")["roles"]
    for role, info in roles.items():
        assert dict(zip(found.class_names, found.counts[role].tolist(), strict=True)) == info["classes"]
        assert (found.total(role), found.unknown[role]) == (info["count"], info["unlabelled"])
    assert set(roles) == set(found.counts) == {"train", "val", "test", "predict"}


def test_survey_reads_no_picture(tmp_path: Path) -> None:
    folder = cats_and_dogs(tmp_path, train=10)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    data = data_of(folder).model_copy(update={"skip_broken": 99})
    assert survey.survey(data).total("train") == 12


def test_survey_names_what_is_odd(tmp_path: Path) -> None:
    folder = cats_and_dogs(tmp_path, train=9, val=1, test=1)
    for index in range(30):
        write_picture(folder / f"train/dog/more{index}.png", 900 + index)
    write_picture(folder / "test/dog/more.png", 990)
    shutil.rmtree(folder / "val/dog")
    (folder / "train/cat/notes.txt").write_text("")
    (folder / "train/horse").mkdir()
    odd = "\n".join(survey.survey(data_of(folder)).odd)
    for part in (
        "1 file was not read: 1 .txt",
        "folders without images: train/horse",
        "classes are uneven: 39 train images of dog, 9 of cat",
        "fewer than 10 train images of cat",
        "no val image of dog",
    ):
        assert part in odd
    assert "no test picture" not in odd


def test_survey_of_many_classes_shows_the_largest_and_the_smallest(tmp_path: Path) -> None:
    rows = [
        {"image": f"{label:02d}-{index}.png", "label": f"class{label:02d}"}
        for label in range(30)
        for index in range(4 + label)
    ]
    data = data_of(write_table(tmp_path / "table.csv", rows))
    table = survey.survey(data).table()
    train = sorted(survey.survey(data).counts["train"].tolist(), reverse=True)
    shown = [int(line.split()[1]) for line in table[1:-1] if "..." not in line]
    assert shown == train[:5] + train[-5:]
    assert [line.split()[0] for line in table if "class" not in line] == ["...", "all"]


@pytest.mark.parametrize(("splits", "told"), [(None, True), ("mixed", True), ("whole", False)])
def test_column_of_groups_that_cross_splits_is_named(tmp_path: Path, splits: str | None, told: bool) -> None:
    rows = [
        {"image": f"{index}.png", "label": "ab"[index % 2], "patient": f"p{index // 6}", "number": f"{index}"}
        for index in range(60)
    ]
    for index, row in enumerate(rows):
        if splits:
            row["split"] = ("train", "val", "test")[(index if splits == "mixed" else index // 6) % 3]
    found = survey.survey(data_of(write_table(tmp_path / "table.csv", rows))).odd
    assert [line.startswith("column 'patient' has 10 values in 60 rows") for line in found if "column" in line] == (
        [True] if told else []
    )
    data = data_of(tmp_path / "table.csv").model_copy(update={"group": "patient"})
    if splits == "mixed":
        with pytest.raises(InputError, match=r"^data.group: expected each group in one role, received 'p0' in "):
            survey.survey(data)
        return
    grouped = survey.survey(data)
    assert not [line for line in grouped.odd if "column" in line]
    writer.write(data, tmp_path / "records")
    roles = files.read_json(tmp_path / "records/dataset.json")["roles"]
    assert {role: each["count"] for role, each in roles.items()} == {role: grouped.total(role) for role in roles}


@pytest.mark.parametrize(
    ("prepare", "part"),
    [
        (lambda folder: shutil.rmtree(folder / "train/dog"), "expected at least two classes"),
        (lambda folder: [path.unlink() for path in (folder / "train/dog").glob("*1*.png")], ""),
        (
            lambda folder: [path.unlink() for path in (folder / "train/dog").glob("0[1-9].png")],
            "expected to leave images of class 'dog' for training",
        ),
    ],
)
def test_survey_refuses_what_prepare_would(tmp_path: Path, prepare: Any, part: str) -> None:
    folder = cats_and_dogs(tmp_path, train=10, test=2)
    if "two classes" in part:
        shutil.rmtree(folder / "test")
    prepare(folder)
    if not part:
        survey.survey(data_of(folder))
        return
    with pytest.raises(InputError, match=part):
        survey.survey(data_of(folder))


def test_sizes_grow_with_the_pictures_and_steps_stay_sensible() -> None:
    for side, expected in ((8, 96), (72, 96), (100, 128), (224, 224), (4000, 224)):
        assert recipe.sizes(300, side, False).image_size == expected
    assert recipe.sizes(10_000, 4000, False).image_size == 160
    assert recipe.sizes(10_000, 4000, True).image_size == 224
    counts = (30, 300, 3_000, 30_000, 300_000)
    found = [recipe.sizes(train, 72, False) for train in counts]
    for fewer, more in itertools.pairwise(found):
        assert fewer.epochs >= more.epochs
        assert fewer.batch_size <= more.batch_size
        assert fewer.views >= more.views
    for train in (200, 300, 1_000, 5_000, 30_000, 300_000):
        chosen = recipe.sizes(train, 72, False)
        assert 200 < train * chosen.epochs / chosen.batch_size < 15_000


@pytest.mark.parametrize("name", ["plain", 'odd "name" # {x}: é', "two\nlines"])
def test_written_params_are_valid_whatever_the_folder_is_called(tmp_path: Path, name: str) -> None:
    folder = cats_and_dogs(tmp_path / name, train=10)
    data = data_of(folder)
    text = recipe.text(
        data, recipe.sizes(12, 8, False), ["EfficientNetLite0"], path=tmp_path / "p.yaml", counts="2", side=8, fit="pad"
    )
    (tmp_path / "p.yaml").write_text(text)
    settings = params.load(tmp_path / "p.yaml")
    assert settings.data == data.model_copy(update={"fit": "pad"})
    assert settings.seeds == [42, 43, 44]


def test_check_prints_counts_oddities_and_power_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cats_and_dogs(tmp_path / "pictures", train=9, val=2, test=3)
    data = {"source": "folder", "name": str(tmp_path / "pictures")}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params() | {"data": data}))
    before = sorted(tmp_path.rglob("*"))
    check.check(str(tmp_path / "params.yaml"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/params.yaml: valid, seeds 7"
    assert lines[1] == f"folder {tmp_path}/pictures: 2 classes, 28 images"
    assert [line.split() for line in lines[2:6]] == [
        ["class", "train", "val", "test"],
        ["cat", "9", "2", "3"],
        ["dog", "9", "2", "3"],
        ["all", "18", "4", "6"],
    ]
    assert lines[6] == "note: fewer than 10 train images of cat, dog"
    assert lines[7].startswith("smallest difference that can be shown: none with 6 test images")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["new", "a"], 2, "'--folder' / '--csv': expected one of them"),
        (["new", "a", "--folder", "p", "--csv", "c"], 2, "'--folder' / '--csv': expected one of them"),
        (["new", "a", "--folder", "p", "--label", "x"], 2, "'--label': expected with --csv only"),
        (["new", "../a", "--folder", "p"], 1, "NAME: expected letters, digits"),
        (["new", "a", "--folder", "p"], 1, "studies/a: expected to be in a checkout of Flatmin"),
        (["new", "a", "--folder", "none", "--to", "new.yaml"], 1, "data.name: expected a folder, received"),
        (["new", "a", "--folder", "p", "--to", "old.yaml"], 1, "old.yaml: expected no such file yet, found one"),
        (["check", "none.yaml"], 1, "none.yaml"),
    ],
)
def test_unusable_input_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, part: str
) -> None:
    from flatmin import cli

    cats_and_dogs(tmp_path / "p", train=4)
    (tmp_path / "old.yaml").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with chdir(tmp_path), pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (code, 1)
    assert part in error
    assert sorted(tmp_path.rglob("*")) == before


def parse(**changes: Any) -> params.Params:
    return params.parse(tiny_params(**changes))


def test_estimate_knows_every_stage() -> None:
    assert set(estimate.FIXED) == {"dvc", *read_yaml(ROOT / "dvc.yaml")["stages"]}


def test_estimate_is_the_sum_of_its_parts() -> None:
    """By hand, for one second an image of each kind, and no fixed time."""
    timings = estimate.Timings(0.0, 2.0 * workers.cores(), 1.0, 1.0, 3.0, 1.0, 1.0, 0, 10, 1000)
    counts = {role: np.array([n]) for role, n in (("train", 100), ("val", 10), ("test", 20))}
    found = survey.Survey(None, counts, dict.fromkeys(counts, 0), [])  # type: ignore[arg-type]
    settings = parse(
        seeds=[1, 2],
        extract={"epochs": 3, "views": 2},
        finetune={"epochs": 4, "views": 3},
        evaluate={"sharpness": {"images": 8, "steps": 5, "probes": 2}},
    )
    timings = replace(timings, multiply_adds=round(estimate._mean_cost(settings, replace(timings, multiply_adds=1))))
    sample = estimate.Sample([(Example(b"", 0, "a"), read_picture(encode(picture(0))))], [], 0.5)
    seconds = estimate.estimate(settings, found, sample, timings).seconds
    assert seconds["prepare"] == 130 * 0.5
    assert seconds["extract-train"] == pytest.approx((2 * 100 + 10) * 3 + 3 * 100 * estimate.HEAD)
    assert seconds["audit"] == 130
    assert seconds["finetune"] == pytest.approx((2 * 3 * 100 + 10) * 3 + 2 * 4 * (100 + 10))
    assert seconds["sam-finetune"] == pytest.approx(2 * 4 * (300 + 10))
    assert seconds["control"] == pytest.approx(2 * 4 * (200 + 10))
    assert seconds["evaluate"] == pytest.approx(7 * 20 + 6 * 8 * estimate._gradients(settings))


@pytest.mark.slow
def test_new_in_process_measures_what_the_estimate_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = picture_folder(tmp_path / "pictures", per_class=12)
    (folder / "class0/broken.png").write_bytes(b"no picture")
    measure, measured = estimate.measure, []

    def measure_and_keep(*arguments: Any) -> estimate.Timings:
        measured.append(measure(*arguments))
        return measured[0]

    monkeypatch.setattr(estimate, "measure", measure_and_keep)
    with chdir(tmp_path):
        new.new("study", section(folder), Path("params.yaml"), 1.0)
    out = capsys.readouterr().out
    assert "note: 1 of 26 images cannot be read, such as class0/broken.png (" in out
    assert "note: images are small: half of 25" in out
    (timings,) = measured
    assert timings.start > 1
    for each in (timings.augment, timings.frozen, timings.validation, timings.scoring):
        assert 0 < each < 1
    assert timings.step < timings.sam_step
