"""The audit stage on two photos cut into tiles, some of them copied and changed, by a real backbone."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml
from fixtures import tiny_params
from PIL import Image, ImageEnhance, ImageOps
from repository import ROOT
from sklearn.datasets import load_sample_images
from trainings import run_stage

from flatmin.common import params
from flatmin.data import writer
from flatmin.inputs.records import Records
from flatmin.models import classifier

SIDE = 96
CLASSES = ["temple", "flower"]
WRONG = (9, 34)  # tiles of train with the other class's label


def recompressed(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


def cropped(picture: Image.Image) -> Image.Image:
    """Without 5 % of its width and height."""
    cut = 0.025 * SIDE
    return picture.resize(picture.size, Image.Resampling.BICUBIC, (cut, cut, SIDE - cut, SIDE - cut))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "rescaled": lambda picture: picture.resize((60, 60), Image.Resampling.BICUBIC),
    "recompressed": recompressed,
    "cropped": cropped,
    "brightened": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "mirrored": ImageOps.mirror,
}


def tiles() -> list[tuple[str, Image.Image]]:
    """Parts of the two photos that scikit-learn has, each with its class."""
    found = []
    for name, photo in zip(CLASSES, load_sample_images().images, strict=True):
        for top in range(SIDE, photo.shape[0] - SIDE, SIDE):  # without the sky, which has nothing to compare
            for left in range(0, photo.shape[1] - SIDE, SIDE):
                found.append((name, Image.fromarray(photo[top : top + SIDE, left : left + SIDE])))
    return found


def write(folder: Path, split: str, class_name: str, name: str, picture: Image.Image) -> None:
    path = folder / "images" / split / class_name / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the stage ran.

    Two thirds of the tiles are in train, the others in val and test. Test has changed copies of some tiles of train, in
    turn by each of CHANGES, and tile 6 with the other class; train has WRONG.
    """
    folder = tmp_path_factory.mktemp("audited")
    other = dict(zip(CLASSES, reversed(CLASSES), strict=True))
    for index, (name, picture) in enumerate(tiles()):
        split = ("train", "train", "val" if index % 2 else "test")[index % 3]
        write(folder, split, other[name] if index in WRONG else name, f"{index}", picture)
        if index % 3 == 0:
            change = list(CHANGES)[index // 3 % len(CHANGES)]
            write(folder, "test", other[name] if index == 6 else name, f"{index}-{change}", CHANGES[change](picture))
    settings = params.parse(tiny_params() | {"data": {"source": "folder", "name": "images", "image_size": "original"}})
    with chdir(folder), pytest.MonkeyPatch.context() as patched:
        patched.setenv("FLATMIN_CACHE", str(folder / "cache"))
        writer.write(settings.data, "data/records")
        classifier.create("EfficientNetLite0", CLASSES, image_size=SIDE, dropout=0.0, seed=0, weights="imagenet").save(
            "models/select"
        )
        run_stage("audit", settings)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def names(folder: Path, role: str) -> list[str]:
    return [Path(row["name"]).stem for row in rows(folder / "data/records" / role / "index.csv")]


def found_metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics/audit.json").read_text())


@pytest.mark.slow
def test_audit_finds_changed_copies_across_roles_and_no_others(audited: Path) -> None:
    train, test = names(audited, "train"), names(audited, "test")
    copies = {name for name in test if "-" in name}
    pairs = {
        (train[int(row["like_position"])], test[int(row["position"])])
        for row in rows(audited / "audit/pairs.csv")
        if (row["role"], row["like_role"]) == ("test", "train")
    }
    wrong = {pair for pair in pairs if pair[1].partition("-")[0] != pair[0]}
    missed = copies - {second for _, second in pairs}
    assert not wrong
    assert not missed, "thresholds that miss a change"
    assert found_metrics(audited)["near_duplicates"]["train_test"] == len(copies)


@pytest.mark.slow
def test_audit_names_contradictions_and_wrong_labels(audited: Path) -> None:
    test = names(audited, "test")
    contradicting = {
        (row["role"], test[int(row["position"])])
        for row in rows(audited / "audit/pairs.csv")
        if row["contradicts"] == "1" and row["role"] == "test"
    }
    # Tile 9's label is wrong in train, tile 6's in test.
    assert {name.partition("-")[0] for _, name in contradicting} == {"9", "6"}
    assert found_metrics(audited)["contradictions"]["train_test"] == 2
    suspects = {(row["role"], Path(row["name"]).stem) for row in rows(audited / "audit/suspects.csv")}
    assert {("train", str(index)) for index in WRONG} <= suspects
    assert len(suspects) <= 5
    assert found_metrics(audited)["suspects"]["train"] + found_metrics(audited)["suspects"]["val"] == len(suspects)


@pytest.mark.slow
def test_audit_shows_pictures_that_are_there(audited: Path) -> None:
    shown = json.loads((audited / "audit/shown.json").read_text())
    pictures = [each["picture"] for pair in shown["pairs"] + shown["contradictions"] for each in pair["pictures"]]
    pictures += [each["picture"] for each in shown["suspects"]]
    assert {path.name for path in (audited / "audit/pictures").iterdir()} == set(pictures)
    assert [each["role"] for each in shown["pairs"][0]["pictures"]] == ["train", "test"]
    assert shown["suspects"][0]["guess"] != shown["suspects"][0]["label"]


@pytest.mark.slow
def test_audit_again_gives_the_same_bytes_and_computes_no_activations(
    audited: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATMIN_CACHE", str(audited / "cache"))
    written = [path for path in sorted(audited.rglob("audit*/**/*")) if path.is_file()]
    before = [path.read_bytes() for path in written]
    metrics = (audited / "metrics/audit.json").read_bytes()
    with chdir(audited):
        settings = params.parse(tiny_params() | {"data": {"source": "folder", "name": "images"}})
        run_stage("audit", settings)
    assert [path.read_bytes() for path in written] == before
    assert (audited / "metrics/audit.json").read_bytes() == metrics
    assert "activations" not in capsys.readouterr().out


def test_dvc_yaml_only_evaluate_and_report_depend_on_audit() -> None:
    """No training and no choice does, and beside evaluate it is the one stage that reads test."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    users = {name for name, stage in stages.items() if {"audit", "metrics/audit.json"} & set(stage["deps"])}
    assert users <= {"evaluate", "report"}
    assert {name for name, stage in stages.items() if "data/records/test" in stage["deps"]} == {"audit", "evaluate"}
    assert not any(dep.startswith("models/") and dep != "models/select" for dep in stages["audit"]["deps"])


@pytest.mark.slow
def test_audit_with_pictures_to_predict_finds_the_same_among_the_others(
    audited: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATMIN_CACHE", str(audited / "cache"))
    for part in ("images", "models", "metrics", "audit"):
        shutil.copytree(audited / part, tmp_path / part)
    for index, (_, picture) in enumerate(tiles()[::2]):
        (tmp_path / "images/predict").mkdir(exist_ok=True)
        ImageOps.invert(picture).save(tmp_path / f"images/predict/{index}.png")
    before, suspects = rows(tmp_path / "audit/pairs.csv"), (tmp_path / "audit/suspects.csv").read_bytes()
    settings = params.parse(tiny_params() | {"data": {"source": "folder", "name": "images", "image_size": "original"}})
    with chdir(tmp_path):
        writer.write(settings.data, "data/records")
        assert Records("data/records").count("predict") == len(tiles()[::2])
        run_stage("audit", settings)
    assert [row for row in rows(tmp_path / "audit/pairs.csv") if row["role"] != "predict"] == before
    assert (tmp_path / "audit/suspects.csv").read_bytes() == suspects
