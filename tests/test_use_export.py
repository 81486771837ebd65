"""Exports of a small classifier, each answered by its own runtime; test_use_onnx.py has the one that needs more."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from exports import COUNTS, SIZE, STORED, TEMPERATURE, TEST_SCORES, check_round_trip, run_card, write_study
from PIL import Image
from repository import ROOT
from trainings import NAMES

from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.common.params_errors import read_yaml
from flatmin.images import Fit, Stored
from flatmin.models import classifier
from flatmin.models.classifier import Classifier
from flatmin.use import card, convert, export, formats, parity

MODEL, LITERT = Path("models/final"), formats.FORMATS["litert"].file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        write_study()
    return folder


@pytest.fixture
def study(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's folder, to change, as the working directory."""
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "study"))
    return tmp_path / "study"


@pytest.fixture(scope="module")
def exported(finished: Path) -> Path:
    """The study's export to LiteRT."""
    with contextlib.chdir(finished):
        export.export(MODEL, "litert", finished / "exported")
    return finished / "exported"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["keras", "savedmodel", "litert"])
def test_exported_file_and_its_card_answer_as_the_classifier(study: Path, name: formats.Name) -> None:
    found = check_round_trip(name, study / "out")
    assert found["differ"] == 0
    assert found["log_probability_difference"] < 1e-3
    assert found["exported"] == found["trained"]
    assert found["trained"]["low"] < found["trained"]["accuracy"] <= found["trained"]["high"]
    assert found["trained"]["accuracy"] > 0.9


@pytest.mark.slow
def test_int8_file_is_a_third_of_the_size_and_answers_much_as_the_classifier(study: Path) -> None:
    found = check_round_trip("litert-int8", study / "out")
    assert found["differ_share"] <= 0.02
    _, probability = run_card(study / "out", study / f"images/test/{NAMES[2]}/2.png")
    assert abs(256 * probability - round(256 * probability)) > 1e-3  # the softmax is not in 8 bits
    assert found["bytes"] < 0.5 * (study / "models/final/classifier.weights.h5").stat().st_size


@pytest.mark.parametrize("enlarge", [True, False])
@pytest.mark.parametrize("fit", get_args(Fit))
def test_program_of_the_card_fits_a_picture_as_the_study_does(fit: Fit, enlarge: bool) -> None:
    stored = Stored(STORED, enlarge)
    description = classifier.Description(
        "MobileNet025",
        SIZE,
        ["a", "b"],
        0,
        1,
        "none",
        None,
        "tf",
        0,
        fit=fit,
        stored_side=STORED,
        stored_enlarge=enlarge,
    )
    for size in ((20, 31), (90, 40), (32, 32), (1, 500)):
        picture = Image.fromarray(np.random.default_rng(size).integers(0, 256, (*size, 3), np.uint8))
        named = {"picture": picture, "Image": Image}
        exec("\n".join([*card._stored_size(stored), *card._square(fit, SIZE)]), named)  # noqa: S102
        np.testing.assert_array_equal(np.asarray(named["picture"]), description.input_of(picture))


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the file that is written holds a head whose first class wins more often."""
    write, made = convert.write, list[bytes]()

    def write_broken(model: Classifier, name: formats.Name, path: Path, sample: Any) -> None:
        if not made:
            layer = model.head.get_layer("logits")
            before = layer.get_weights()
            layer.set_weights([before[0], before[1] + np.array([9, 0, 0], np.float32)])
            write(model, name, path, sample)
            layer.set_weights(before)
            made.append(path.read_bytes())
        path.write_bytes(made[0])

    monkeypatch.setattr(convert, "write", write_broken)


@pytest.mark.slow
def test_file_that_answers_otherwise_is_refused_and_nothing_is_left(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(monkeypatch)
    with pytest.raises(
        InputError, match=r"^litert: expected at most 0.5 % of val's answers to differ .* of 60; nothing"
    ):
        export.export(MODEL, "litert", study / "exports/litert")
    assert list((study / "exports").iterdir()) == []
    export.export(MODEL, "litert", study / "exports/litert", force=True)
    assert "exported since --force is given" in capsys.readouterr().out
    found = json.loads((study / "exports/litert/parity.json").read_text())
    assert found["differ"] > 10
    assert found["difference"]["accuracy"] == pytest.approx(
        found["exported"]["accuracy"] - found["trained"]["accuracy"]
    )
    assert found["difference"]["p_value"] < 0.01
    assert "this one was forced" in (study / "exports/litert/README.md").read_text()


def test_runtime_that_refuses_the_file_is_one_line_and_nothing_is_left(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "write", lambda *arguments, **options: arguments[2].write_bytes(b"no model"))
    with pytest.raises(InputError, match=r"^litert: expected ai_edge_litert to run the file, received .*Flatbuffer"):
        export.export(MODEL, "litert", study / "exports/litert")
    assert list((study / "exports").iterdir()) == []


@pytest.mark.slow
def test_earlier_export_is_replaced_and_any_other_folder_is_refused(
    study: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(exported, study / "out")
    (out / "old").touch()
    monkeypatch.setattr(convert, "write", lambda *arguments: shutil.copy(exported / LITERT, arguments[2]))
    export.export(MODEL, "litert", out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "classes.json", LITERT, "parity.json"]
    with pytest.raises(
        InputError, match=r"^--out: expected a new folder or one of an earlier export, received .*models"
    ):
        export.export(MODEL, "litert", study / "models")
    assert (study / "models/final/model.json").is_file()


@pytest.mark.slow
def test_card_has_front_matter_scores_counts_and_the_proof(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["pipeline_tag"] == "image-classification"
    assert front["license"] == "unknown"
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "images", "type": "images", "split": "test"}
    assert result["metrics"][0]["value"] == TEST_SCORES["accuracy"]
    assert "| test accuracy | 0.8125 |" in text
    assert f"| train | {COUNTS['train']} | 12 to 12 |" in text
    assert "trained by the method `sam`, seed 3" in text
    assert "\n".join(parity.table(json.loads((exported / "parity.json").read_text()))) in text
    assert json.loads((exported / "classes.json").read_text()) == {"class_names": list(NAMES)}


@pytest.mark.slow
def test_card_leaves_out_metrics_of_another_model(study: Path, exported: Path) -> None:
    released = files.read_json("metrics/final.json")["released"] | {"temperature": TEMPERATURE / 2}
    files.write_json("metrics/final.json", {"released": released})
    made = card.Made(classifier.describe(MODEL), "litert", files.read_json(exported / "parity.json"))
    text = card.text(made, Path("metrics"))
    assert "metrics/final.json is missing or of another model" in text
    assert "0.8125" not in text
    assert yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"][0]["dataset"]["split"] == "val"


def test_classifier_that_was_not_released_is_refused(study: Path) -> None:
    description = files.read_json("models/final/model.json")
    files.write_json("models/final/model.json", description | {"temperature": None})
    with pytest.raises(InputError, match=r"^models/final: expected a classifier with a temperature"):
        export.export(MODEL, "litert", study / "out")


def test_records_of_other_classes_are_refused(study: Path) -> None:
    description = files.read_json("models/final/model.json")
    files.write_json("models/final/model.json", description | {"class_names": ["a", "b", "c"]})
    assert classifier.describe(MODEL).class_names == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"^data/records: expected the model's classes a, b, c \(3\), received blue, "):
        export.export(MODEL, "litert", study / "out")


def test_records_of_another_fit_are_refused(study: Path) -> None:
    description = files.read_json("models/final/model.json")
    files.write_json("models/final/model.json", description | {"fit": "crop"})
    with pytest.raises(
        InputError, match=r"^data/records: expected val as the model was trained, fit crop, stored side 24"
    ):
        export.export(MODEL, "litert", study / "out")


def test_committed_proofs_are_of_the_released_model_and_within_their_limits() -> None:
    """After a run of the default study with other results, `make exports` writes them anew."""
    found = files.read_json(ROOT / "bench/exports.json")
    outs = read_yaml(ROOT / "dvc.lock")["stages"]["finalize"]["outs"]
    assert found["model"]["md5"] in [out["md5"] for out in outs]
    assert set(found["formats"]) == set(formats.FORMATS)
    assert all(proof["differ_share"] <= proof["limit"] for proof in found["formats"].values())


def test_compare_counts_answers_and_floors_small_probabilities() -> None:
    logits = np.log(np.array([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.9, 0.1]]))
    exported = np.array([[0.7, 0.3], [0.4, 0.6], [0.2, 0.8], [1.0, 0.0]], np.float32)
    found = parity.compare(logits, exported, np.array([0, 1, 1, 0]))
    assert (found["differ"], found["differ_share"]) == (1, 0.25)
    assert found["log_probability_difference"] == pytest.approx(np.log(0.1 / parity.FLOOR))
    assert (found["trained"]["accuracy"], found["exported"]["accuracy"]) == (0.75, 1.0)
    assert found["difference"]["accuracy"] == 0.25
    assert found["difference"]["p_value"] == 1.0
