"""`flatmin predict` and `flatmin explain`: what a released classifier says of pictures in files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from commands import flatmin
from fixtures import tiny_classifier
from networks import spread
from pictures import encode, picture, with_orientation
from PIL import Image
from repository import ROOT

from flatmin import images
from flatmin.common import files
from flatmin.common.errors import InputError
from flatmin.common.params import Data, Evaluate, Runtime, Sharpness
from flatmin.data import writer
from flatmin.evaluation.evaluate import Models, Outputs, evaluate
from flatmin.inputs import workers
from flatmin.inputs.pixels import Task
from flatmin.inputs.records import Records
from flatmin.models import classifier, registry
from flatmin.models.classifier import Classifier
from flatmin.use import explain, pictures, predict

TEMPERATURE = 1.7


def of_class(label: int, seed: int, mode: str = "RGB", width: int = 60, height: int = 44) -> Image.Image:
    """Draw noise on a gradient whose direction is the class's, so that a wrong turn or fit shows."""
    ramp = np.linspace(0, 170, width if label else height)
    ramp = np.broadcast_to(ramp if label else ramp[:, None], (height, width))[..., None]
    noise = np.random.default_rng(seed).integers(0, 80, (height, width, 3))
    return Image.fromarray((ramp + noise).astype(np.uint8)).convert(mode)


def write_all(folder: Path) -> Path:
    """Write a data set with the kinds of pictures that people have: turned, deep, grey, long, transparent, small."""
    for role, count in (("train", 4), ("val", 2), ("test", 8)):
        for label, name in enumerate(("cat", "dog")):
            (folder / role / name).mkdir(parents=True)
            for seed in range(count):
                path, turned = folder / role / name / f"{seed}", with_orientation(seed % 8 + 1)
                of_class(label, 100 * label + seed).save(path.with_suffix(".jpg"), exif=turned, quality=95)
    for name, image in (
        ("grey.png", of_class(0, 7, "L")),
        ("deep.png", Image.fromarray((np.arange(60 * 44, dtype=np.uint16) * 20).reshape(44, 60))),
        ("palette.gif", of_class(0, 8, "P")),
        ("transparent.webp", of_class(0, 9, "RGBA")),
        ("long.jpg", of_class(0, 10, width=200)),
        ("cmyk.jpg", of_class(0, 11, "CMYK")),
        ("small.bmp", of_class(0, 12, width=9, height=11)),
        ("large.tif", of_class(0, 13, width=300, height=250)),
        ("exactly.png", of_class(0, 14, width=32, height=32)),
    ):
        image.save(folder / "test/cat" / name)
    return folder


@pytest.fixture(scope="module")
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, records of them at the stored size `auto`, and a classifier of 32 pixels."""
    folder = tmp_path_factory.mktemp(request.param)
    write_all(folder / "pictures")
    with chdir(folder):
        data = Data(source="folder", name="pictures", fit=request.param)
        writer.write(data, "data/records", largest=48)
        records = Records("data/records")
        test = Task(records.stored("test", range(records.count("test"))), 32, records.fit("test")).run()
        save("models/final", test, fit=records.fit("test"), stored=records.stored_size("test"))
    return folder


def save(folder: str | Path, of: np.ndarray, **changes: Any) -> None:
    """Save a classifier of random weights which says one class of half of the pixels `of`, uint8 [n, 32, 32, 3]."""
    model = tiny_classifier(**changes)
    spread(model.base)
    random = np.random.default_rng(3)
    for variable in model.head.trainable_variables:
        variable.assign(random.normal(scale=2, size=variable.shape))
    logits = model.network(of.astype(np.float32)).numpy()
    (bias,) = (variable for variable in model.head.trainable_variables if len(variable.shape) == 1)
    bias.assign(bias - np.median(logits - logits[:, :1], axis=0))
    replace(model, description=replace(model.description, temperature=TEMPERATURE)).save(folder)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier and two pictures. Tests add files of their own names only."""
    folder = tmp_path_factory.mktemp("workspace")
    of_class(0, 1).save(folder / "one.png")
    of_class(1, 2).save(folder / "two.jpg")
    description = tiny_classifier().description
    seen = [description.input_of(of_class(label, label)) for label in (0, 1, 1)]
    save(folder / "models/final", np.stack([*seen, seen[0] // 2]))
    return folder


@pytest.mark.parametrize("study", ["crop", "squash", "pad"], indirect=True)
def test_pictures_are_read_as_the_records_give_them(study: Path) -> None:
    records = Records(study / "data/records")
    with chdir(study):
        description = predict.load(Path("models/final")).description
    stored = records.stored("test", range(records.count("test")))
    expected = Task(stored, description.image_size, records.fit("test")).run()
    paths = [str(study / "pictures" / name) for name in records.names("test")]
    for path, wanted, got in zip(paths, expected, pictures.read_all(paths, description), strict=True):
        assert got.pixels is not None
        np.testing.assert_array_equal(got.pixels, wanted, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("study", ["crop"], indirect=True)
def test_predictions_of_test_pictures_are_those_of_evaluate(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study, tmp_path, dirs_exist_ok=True)
    with chdir(tmp_path):
        seeded = {method: {7: f"models/{method}/7"} for method in ("finetune", "control", "sam")}
        for each in ("models/select", *(folders[7] for folders in seeded.values())):
            shutil.copytree("models/final", each)
        temperature = {"temperature": TEMPERATURE}
        final = {method: {"seeds": {"7": temperature}} for method in seeded}
        files.write_json("metrics/final.json", final | {"extract": temperature, "released": temperature})
        settings = Evaluate(sharpness=Sharpness(images=2, steps=5, probes=1))
        models = Models("models/select", seeded, "models/final", "metrics/final.json")
        outputs = Outputs(
            "predictions", "evaluation", "metrics/evaluate.json", "confusion.csv", "class.csv", "sharpness.png"
        )
        files.write_csv("audit/pairs.csv", ["role"], ())
        evaluate(
            runtime=Runtime(),
            settings=settings,
            records="data/records",
            audit="audit",
            models=models,
            outputs=outputs,
        )
    expected = {row["name"]: int(row["final"]) for row in files.read_csv(tmp_path / "predictions/test.csv")}
    assert len(set(expected.values())) == 2
    capsys.readouterr()
    with chdir(tmp_path):
        lines, _, error = run(capsys, "pictures/test", model=Path("models/final"))
    assert not error
    found = {row["image"]: row["class"] for row in csv.DictReader(lines)}
    assert found == {f"pictures/{name}": ("cat", "dog")[label] for name, label in expected.items()}


@pytest.fixture(scope="module")
def released(workspace: Path) -> Classifier:
    return predict.load(workspace / "models/final")


@pytest.fixture
def model(workspace: Path, released: Classifier, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the workspace's classifier, which is loaded once for all tests that take this."""
    monkeypatch.setattr(predict, "load", lambda folder: released)
    return workspace / "models/final"


def test_probabilities_are_calibrated_softmax(released: Classifier) -> None:
    model = released
    pixels = np.stack([model.description.input_of(of_class(label, label)) for label in (0, 1)])
    logits = model.network(pixels.astype(np.float32)).numpy() / TEMPERATURE
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predict.probabilities(model, pixels), expected, rtol=1e-4)


def run(capsys: pytest.CaptureFixture[str], *names: str | Path, **changes: Any) -> tuple[list[str], str, str]:
    """Predict in this process: the lines, what standard error got, and the error."""
    settings: dict[str, Any] = {"form": "csv", "top": 1, "abstain_below": 0.0} | changes
    error = ""
    try:
        predict.predict([str(name) for name in names], settings.pop("model"), **settings)
    except InputError as raised:
        error = str(raised)
    out, err = capsys.readouterr()
    return out.splitlines(), err, error


def test_predict_top_lists_classes_from_the_most_probable_on(
    workspace: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, _, error = run(capsys, workspace / "one.png", model=model, top=2, form="jsonl")
    (found,) = map(json.loads, lines)
    assert not error
    assert found["image"] == str(workspace / "one.png")
    assert {each["class"] for each in found["top"]} == {"cat", "dog"}
    first, second = (each["probability"] for each in found["top"])
    assert first >= second
    assert first + second == pytest.approx(1, abs=1e-5)
    assert (found["class"], found["probability"]) == (found["top"][0]["class"], first)
    (_, row), _, _ = run(capsys, workspace / "one.png", model=model, top=2)
    cells = [found["class"], str(first)]
    assert row.split(",")[1:] == [*cells, *cells, found["top"][1]["class"], str(second)]


@pytest.mark.parametrize("form", ["table", "csv", "jsonl"])
def test_predict_abstains_below_the_given_probability_only(
    workspace: Path, model: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    names = workspace / "one.png", workspace / "two.jpg"
    lines, _, _ = run(capsys, *names, model=model, form="jsonl")
    probabilities = [json.loads(line)["probability"] for line in lines]
    assert probabilities[0] != probabilities[1]
    lines, _, _ = run(capsys, *names, model=model, form=form, abstain_below=sum(probabilities) / 2)
    shown = {"table": "(none)", "csv": ",,", "jsonl": '"class": null'}[form]
    low = int(np.argmin(probabilities))
    assert [shown in line for line in lines[-2:]] == [index == low for index in (0, 1)]


def test_predict_broken_pictures_are_named_and_skipped_and_exit_with_1(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(encode(picture(1))[:-40])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "good.png").write_bytes((workspace / "one.png").read_bytes())
    (tmp_path / "notes.txt").write_text("no picture")
    done = flatmin("predict", tmp_path, tmp_path / "none.png", "--format", "csv", cwd=workspace)
    assert done.returncode == 1
    assert [line.split(",")[0] for line in done.stdout.splitlines()] == ["image", f"{tmp_path}/good.png"]
    first, *broken, error = done.stderr.splitlines()
    assert first == f"{tmp_path}: 1 file was not read: 1 .txt"
    assert [line.partition(": ")[0] for line in broken] == [
        f"{tmp_path}/{name}" for name in ("cut.png", "empty.jpg", "none.png")
    ]
    assert broken[2].endswith(": No such file or directory")
    assert error == "error: expected images that can be read, received 3 of 4 broken"


@pytest.mark.slow
def test_predict_paths_from_standard_input_keep_their_order_and_odd_names(
    workspace: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [b"a b.png", "ä,\u2028.png".encode(), b"\xff.png"]
    for index, name in enumerate(odd):
        (tmp_path / os.fsdecode(name)).write_bytes(encode(of_class(index % 2, index)))
    given = b"\n".join([*odd, b"", str(workspace / "one.png").encode()])
    done = flatmin("predict", "-", "--model", model, "--format", "csv", cwd=tmp_path, given=given)
    assert (done.returncode, done.stderr) == (0, "")
    found = [row[0] for row in csv.reader(done.stdout.split("\n")) if row]
    assert found == ["image", *map(os.fsdecode, odd), str(workspace / "one.png")]
    lines, _, _ = run(capsys, *(tmp_path / os.fsdecode(name) for name in odd), model=model, form="table")
    assert lines[2].endswith(r"/\xe4,\u2028.png'")


def test_predict_holds_a_bounded_number_of_pictures(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def paths() -> Any:
        for index in range(1000):
            taken.append(index)
            yield str(workspace / "one.png")

    monkeypatch.setattr(workers, "cores", lambda: 2)
    read = pictures.read_all(paths(), predict.load(workspace / "models/final").description)
    for _ in range(10):
        next(read)
    assert len(taken) < 30


@pytest.mark.slow
def test_predict_ends_quietly_when_its_reader_does(workspace: Path, tmp_path: Path) -> None:
    for index in range(40):
        shutil.copy(workspace / "one.png", tmp_path / f"{index:02d}.png")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "flatmin.cli", "predict", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    try:
        done = subprocess.run(
            command, cwd=workspace, env=environment, stdout=write, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"top": 3}, "--top: expected at most 2, the model's classes, received 3"),
        ({"names": ["nothing"]}, "nothing: expected images, received none"),
        ({"model": Path("other")}, "other/model.json: expected a file that an earlier stage wrote, found none"),
    ],
)
def test_predict_unusable_input_is_refused_before_any_line(
    workspace: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], part: str
) -> None:
    (workspace / "nothing").mkdir(exist_ok=True)
    with chdir(workspace):
        names = changes.get("names", ["one.png"])
        settings = {"model": Path("models/final")} | {key: value for key, value in changes.items() if key != "names"}
        lines, _, error = run(capsys, *names, **settings)
    assert (lines, error) == ([], part)


def test_predict_of_a_training_says_that_it_is_not_calibrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_classifier().save(tmp_path / "7")
    of_class(0, 0).save(tmp_path / "a.png")
    lines, err, error = run(capsys, tmp_path / "a.png", model=tmp_path / "7")
    assert (len(lines), error) == (2, "")
    assert err == f"{tmp_path}/7: not calibrated, since finalize did not release it\n"


def test_picture_that_pillow_warns_of_is_read_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    encoded = encode(picture())
    animation = struct.pack(">I4sIII", 8, b"acTL", 0, 0, zlib.crc32(b"acTL" + bytes(8)))  # of no frames
    header_end = encoded.index(b"IDAT") - 4
    (tmp_path / "odd.png").write_bytes(encoded[:header_end] + animation + encoded[header_end:])
    with warnings.catch_warnings(record=True) as warned:
        images.read((tmp_path / "odd.png").read_bytes())
    assert "Invalid APNG" in str(warned[0].message), "else this shows nothing"
    description = classifier.Description("MobileNet025", 32, ["a", "b"], 0.5, 1, "none", None, "tf", 0)
    (read,) = pictures.read_all([str(tmp_path / "odd.png")], description)
    assert read.reason == ""
    assert not recwarn.list


def test_large_picture_is_read_and_one_beyond_pillows_limit_is_broken(tmp_path: Path) -> None:
    description = tiny_classifier().description
    Image.new("1", (5000, 4000), 1).save(tmp_path / "large.png")
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    large, huge = (pictures.read(str(tmp_path / f"{name}.png"), description) for name in ("large", "huge"))
    assert large.pixels is not None
    assert (large.pixels == 255).all()
    assert huge.pixels is None
    assert "200000000 pixels" in huge.reason
    assert images.LARGEST < 200_000_000


@pytest.fixture
def half(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture that is red on its left and blue on its right, for a network that knows cats are red."""
    pixels = keras.Input((64, 64, 3))
    maps = keras.layers.Conv2D(2, 1, use_bias=False)(keras.layers.AveragePooling2D(8)(pixels))
    base = keras.Model(pixels, maps)
    base.layers[-1].set_weights([np.array([[[[1, 0], [0, 0], [0, 1]]]], np.float32)])
    features = classifier.pooled(base, "last")
    head = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, use_bias=False)])
    head.set_weights([np.eye(2, dtype=np.float32)])
    outer = keras.Input((64, 64, 3))
    network = keras.Model(outer, head(features(registry.preprocess("EfficientNetLite0", outer))))
    description = replace(classifier.describe(workspace / "models/final"), image_size=64)
    model = classifier.Classifier(description, base, features, head, network)
    monkeypatch.setattr(predict, "load", lambda folder: model)
    drawn = np.zeros((64, 64, 3), np.uint8)
    drawn[:, :32, 0] = drawn[:, 32:, 2] = 255
    Image.fromarray(drawn).save(tmp_path / "half.png")
    return tmp_path


@pytest.mark.parametrize(("class_name", "first"), [("cat", True), ("dog", False)])
def test_explain_colours_the_half_that_speaks_for_the_class(half: Path, class_name: str, first: bool) -> None:
    explain.explain(str(half / "half.png"), Path("models/final"), class_name, half / "why.png")
    with Image.open(half / "why.png") as written:
        seen, shown = np.split(np.asarray(written).astype(int), 2, axis=1)
    assert seen[:, :200, 0].min() > 250
    coloured = np.ptp(shown, axis=2) > 20  # grey, where nothing speaks for the class
    left, right = coloured[:, :150].mean(), coloured[:, -150:].mean()
    assert (left, right) == ((1, 0) if first else (0, 1))


def test_explain_names_the_class_and_its_probability(
    workspace: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dog.png"
    explain.explain(str(workspace / "one.png"), model, "dog", out)
    told = capsys.readouterr().out
    (line,), _, _ = run(capsys, workspace / "one.png", model=model, form="jsonl", top=2)
    probability = {each["class"]: each["probability"] for each in json.loads(line)["top"]}
    assert told.startswith(f"{out}: what speaks for dog, probability {probability['dog']:.4f}")
    with Image.open(out) as written:
        assert written.size == (896, 448)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"class_name": "cow"}, "--class: expected one of cat, dog, received 'cow'"),
        ({"out": Path("why.jpg")}, "--out: expected a name that ends in .png, received 'why.jpg'"),
        ({"out": Path("half.png")}, "--out: expected another file than the image, received 'half.png'"),
        ({"image": "notes.txt"}, "notes.txt: expected an image that can be read, received: it is of no format"),
        ({"image": "none.png"}, "none.png: expected an image that can be read, received: No such file or directory"),
    ],
)
def test_explain_unusable_input_is_refused_and_writes_nothing(half: Path, changes: dict[str, Any], part: str) -> None:
    values: dict[str, Any] = {
        "image": "half.png",
        "model": Path("models/final"),
        "class_name": None,
        "out": Path("new.png"),
    }
    (half / "notes.txt").write_text("no picture")
    with chdir(half):
        with pytest.raises(InputError) as raised:
            explain.explain(**values | changes)
        assert not Path("new.png").exists()
    assert part in str(raised.value)
