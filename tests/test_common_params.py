"""The schema: what it accepts, its defaults, and the one line that it says about anything else."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import modify_yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from repository import ROOT, TINY

from flatmin.common import params
from flatmin.common.errors import InputError
from flatmin.common.params_errors import read_yaml

STUDIES = sorted((ROOT / "studies").glob("*/params.yaml"))


def changed(path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(TINY)
    *sections, key = path.split(".")
    target = values
    for section in sections:
        if not isinstance(target.get(section), dict):
            target[section] = {}
        target = target[section]
    target[key] = value
    return values


# The required keys alone, each schedule once, and early stopping.
RECIPE = {"optimizer": "adam", "learning_rate": 0.1, "batch_size": 8, "epochs": 3, "image_size": None}
REQUIRED: dict[str, Any] = {
    "seeds": [0],
    "runtime": {},
    "data": {"source": "folder", "name": "x", "splits": {"train": "train", "test": "test"}, "val_per_class": 1},
    "augment": {},
    "backbones": ["ResNet50"],
    "extract": {**RECIPE, "schedule": {"name": "plateau"}, "early_stopping": {}},
    "select": {"metric": "accuracy"},
    "audit": {},
    "finetune": {**RECIPE, "schedule": {"name": "cosine"}},
    "sam": {},
    "finalize": {},
    "evaluate": {},
}
# All other keys. A changed default changes the results of every params.yaml that leaves the key out.
DEFAULTS: dict[str, Any] = {
    "runtime": {
        "precision": "float32",
        "matmul": "float32",
        "deterministic": True,
        "strategy": "auto",
        "engine": "auto",
    },
    "data": {
        "seed": 42,
        "splits": {"val": None, "predict": None, "unused": None},
        "folds": None,
        "fold": None,
        "columns": {"image": None, "label": None, "split": None},
        "group": None,
        "links": "within",
        "val_fraction": None,
        "train_per_class": None,
        "image_size": "auto",
        "fit": "squash",
        "max_pixels": 120_000_000,
        "skip_broken": 0,
        "label_noise": 0.0,
        "shuffle_labels": False,
        "class_names": None,
    },
    "augment": {"engine": "imgaug", "n": 3, "m": 7, "p": 1.0, "flip": False, "crop": 0},
    "extract": {
        "schedule": {"factor": 0.2, "patience": 3, "min_delta": 0.001, "minimum": 1e-06},
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "class_weights": "none",
        "sampling": "none",
        "ema": None,
        "dropout": 0.2,
        "views": 0,
        "early_stopping": {"patience": 5, "min_delta": 0.001},
        "seed": 42,
        "weights": {},
        "levels": "last",
        "hidden_units": 0,
        "augment": True,
    },
    "select": {"tolerance": 0.0},
    "audit": {"hash_bits": 16, "cosine": 0.4, "small_class": 20},
    "finetune": {
        "schedule": {"warmup_epochs": 0.0},
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "class_weights": "none",
        "sampling": "none",
        "ema": None,
        "dropout": 0.2,
        "views": 0,
        "early_stopping": None,
        "fine_tune_at": None,
    },
    "sam": {
        "method": "sam",
        "rho": 0.05,
        "adaptive": False,
        "every": 1,
        "num_batch_splits": 1,
        "accumulate": 1,
        "sync_perturbation": False,
        "epochs": None,
        "alpha": None,
        "gamma": None,
        "rho_min": None,
        "rho_max": None,
        "rate_min": None,
        "rate_max": None,
        "sigma": None,
        "friendly_lambda": None,
    },
    "finalize": {"tolerance": 0.005},
    "evaluate": {
        "batch_size": 128,
        "mirrored": False,
        "ece_bins": 15,
        "sharpness": {"images": 64, "rho": 0.05, "adaptive_rho": 0.5, "steps": 15, "probes": 6},
    },
}


def without(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Remove the given keys that are no sections, at any depth."""
    return {
        key: without(value, given[key]) if key in given else value
        for key, value in values.items()
        if isinstance(given.get(key, {}), dict)
    }


@pytest.mark.parametrize(
    ("extract", "finetune", "largest"),
    [(None, None, 260), (96, None, 96), (96, 128, 128), ({"EfficientNetLite0": 300}, {"EfficientNetLite2": 64}, 300)],
)
def test_largest_image_size_is_over_backbones_and_stages(extract: Any, finetune: Any, largest: int) -> None:
    assert params.largest_image_size(["EfficientNetLite0", "EfficientNetLite2"], extract, finetune) == largest


def test_params_defaults_are_unchanged() -> None:
    assert without(params.parse(REQUIRED).model_dump(), REQUIRED) == DEFAULTS


def test_params_keys_all_have_a_description() -> None:
    own = [section for section in params.Section.__subclasses__() if section.__module__ == params.__name__]
    sections = [section for section in own if section is not params.Sam]
    sections += [section for training in sections for section in training.__subclasses__()]
    undescribed = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description and not isinstance(field.annotation, type(params.Section))
    ]
    assert undescribed == []


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_load_of_each_study_is_valid(path: Path) -> None:
    params.load(path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("colour", "red", "colour: expected no such key, received 'red'"),
        ("sam.method", "esam", "sam.method: expected 'sam', 'gsam', "),
        ("sam.every", 0, "sam.every: expected greater than or equal to 1, received 0"),
        ("sam.gamma", 0.5, "sam.gamma: expected no value with method sam, received 0.5"),
        ("sam.rho_min", 0.1, "sam.rho_min: expected no value with method sam, received 0.1"),
        ("sam", {"method": "wsam", "alpha": 1}, "sam.alpha: expected no value with method wsam, received 1"),
        ("sam", {"method": "wsam", "gamma": 1}, "sam.gamma: expected less than 1, received 1"),
        (
            "sam",
            {"method": "gsam", "rho_min": 0.2},
            "sam.rho_min: expected at most rho_max, which is 0.05, received 0.2",
        ),
        (
            "sam",
            {"sync_perturbation": True, "num_batch_splits": 2},
            "sam.sync_perturbation: expected false with num_batch_splits, received true",
        ),
        (
            "runtime",
            {"engine": "litert", "precision": "mixed_bfloat16"},
            "runtime.engine: expected auto or tensorflow with precision mixed_bfloat16, received litert",
        ),
        ("sam.radius", 1, "sam.radius: expected no such key, received 1"),
        ("sam.rho", -1, "sam.rho: expected greater than or equal to 0, received -1"),
        ("sam.rho", "big", "sam.rho: expected a valid number, received 'big'"),
        ("sam.rho", float("nan"), "sam.rho: expected a finite number, received nan"),
        ("sam.adaptive", 1, "sam.adaptive: expected a valid boolean, received 1"),
        ("seeds", [True], "seeds.0: expected a valid integer, received True"),
        ("seeds", [7, "8"], "seeds.1: expected a valid integer, received '8'"),
        ("seeds", 42, "seeds: expected a list, such as [42], received 42"),
        ("seeds", None, "seeds: expected a list, received None"),
        ("seeds", {7: 8}, "seeds: expected a list, received {7: 8}"),
        ("seeds", [], "seeds: expected a list of at least 1, received []"),
        ("seeds", [7, 8, 7], "seeds: expected distinct numbers, received 7 twice"),
        *(
            (
                "seed",
                value,
                "seed: expected seeds, a list, for finetune, control and sam-finetune, and data.seed and extract.seed "
                f"in its place, received {received}",
            )
            for value, received in ((42, "42"), (None, "None"), ("\n" * 100, "'"))
        ),
        ("extract.epochs", 0, "extract.epochs: expected greater than or equal to 1, received 0"),
        ("extract.epochs", 2.5, "extract.epochs: expected a valid integer, received 2.5"),
        ("extract.epochs", "2", "extract.epochs: expected a valid integer, received '2'"),
        ("extract.epochs", None, "extract.epochs: expected a valid integer, received None"),
        ("extract.learning_rate", 0, "extract.learning_rate: expected greater than 0, received 0"),
        ("extract.dropout", 1, "extract.dropout: expected less than 1, received 1"),
        ("seeds", [7, -1], "seeds.1: expected greater than or equal to 0, received -1"),
        ("data.seed", -1, "data.seed: expected greater than or equal to 0, received -1"),
        ("extract.seed", 2**31, "extract.seed: expected less than 2147483648, received 2147483648"),
        ("data.seed", [7], "data.seed: expected a valid integer, received [7]"),
        ("extract.seed", None, "extract.seed: expected a valid integer, received None"),
        ("finetune.seed", 7, "finetune.seed: expected no such key, received 7"),
        ("data.shuffle_labels", 1, "data.shuffle_labels: expected a valid boolean, received 1"),
        ("finalize.tolerance", 1.5, "finalize.tolerance: expected less than or equal to 1, received 1.5"),
        ("finalize.tolerance", -0.1, "finalize.tolerance: expected greater than or equal to 0, received -0.1"),
        ("sam.rho", True, "sam.rho: expected a valid number, received True"),
        ("sam.rho", 1e999, "sam.rho: expected a finite number, received inf"),
        pytest.param("sam.rho", 10**5000, "sam.rho: expected a valid number, received a very large int", id="large"),
        ("augment.m", 31, "augment.m: expected less than or equal to 30, received 31"),
        ("augment.n", 15, "augment.n: expected less than or equal to 14, received 15"),
        ("augment.crop", -1, "augment.crop: expected greater than or equal to 0, received -1"),
        ("data.splits.train", "", "data.splits.train: expected non-empty text, received ''"),
        ("data.splits.valid", "val", "data.splits.valid: expected no such key, received 'val'"),
        ("data.splits", "train", "data.splits: expected a mapping, received 'train'"),
        ("data.splits", {"train": "train"}, "data.splits.test: expected a value, found none"),
        ("data.splits.test", None, "data.splits.test: expected a value without folds, received null"),
        ("data.fold", 1, "data.fold: expected null without folds, received 1"),
        *(
            (
                "data",
                REQUIRED["data"] | {"folds": 3, "fold": fold},
                f"data.fold: expected a number below folds, which is 3, received {fold}",
            )
            for fold in (None, 3)
        ),
        (
            "data",
            REQUIRED["data"] | {"folds": 3, "fold": 2},
            "data.splits.test: expected null with folds, received 'test'",
        ),
        ("data.folds", 1, "data.folds: expected greater than or equal to 2, received 1"),
        ("data.class_names", ["a"], "data.class_names: expected a list of at least 2, received ['a']"),
        ("data.class_names", ["a", 3], "data.class_names.1: expected text in quotes, received 3"),
        ("data.class_names", ["a", "b", "a"], "data.class_names: expected distinct names, received 'a' twice"),
        ("sam", None, "sam: expected a mapping, received None"),
        ("sam", [0.05], "sam: expected a mapping, received [0.05]"),
        ("sam", {7: 1}, "sam.7: expected a text key, received 7"),
        ("sam.a\nb", 1, "sam.'a\\nb': expected no such key, received 1"),
        ("sam.rho", "a\nb", "sam.rho: expected a valid number, received 'a\\nb'"),
        ("extract.optimizer", "lion", "extract.optimizer: expected 'adam', 'adamw' or 'sgd', received 'lion'"),
        ("backbones", [], "backbones: expected a list of at least 1, received []"),
        ("backbones", ["ResNet51"], "backbones.0: expected one of ResNet50, "),
        ("backbones", "ResNet50", "backbones: expected a list, such as ['ResNet50'], received 'ResNet50'"),
        ("backbones", ["ResNet50", 3], "backbones.1: expected text in quotes, received 3"),
        ("backbones", ["ResNet50", "ResNet50"], "backbones: expected distinct names, received 'ResNet50' twice"),
        ("data.columns", {"split": "x"}, "data.columns.split: expected null with source bundled, received 'x'"),
        ("data.columns.path", "x", "data.columns.path: expected no such key, received 'x'"),
        ("data.links", "all", "data.links: expected 'refuse', 'within' or 'follow', received 'all'"),
        ("data.val_fraction", 0.1, "data: expected exactly one of splits.val, val_fraction and val_per_class"),
        (
            "finetune.schedule",
            {"name": "cosine", "warmup_epochs": 9},
            "finetune.schedule.warmup_epochs: expected less than epochs, which is 2, received 9",
        ),
        (
            "extract",
            {"optimizer": "adam", "learning_rate": 0.1, "batch_size": 8, "epochs": 3, "image_size": None}
            | {"views": 2, "augment": False},
            "extract.views: expected at most 1 without augment, received 2",
        ),
        (
            "data",
            TINY["data"] | {"label_noise": 0.1, "shuffle_labels": True},
            "data.label_noise: expected 0 with shuffle_labels, received 0.1",
        ),
        ("data.label_noise", 1, "data.label_noise: expected less than 1, received 1"),
        ("data.group", "person", "data.group: expected null with source bundled, received 'person'"),
        (
            "data",
            REQUIRED["data"] | {"group": "p"},
            "data.val_per_class: expected null with group, which val_fraction follows, received 1",
        ),
        (
            "data",
            REQUIRED["data"] | {"group": "(p", "val_per_class": None, "val_fraction": 0.1},
            "data.group: expected a regular expression, received '(p': missing ), unterminated subpattern",
        ),
        ("select", {}, "select.metric: expected a value, found none"),
        ("select.metric", "f1", "select.metric: expected 'accuracy' or 'balanced_accuracy', received 'f1'"),
        ("extract.sampling", True, "extract.sampling: expected 'none' or 'balanced', received True"),
        (
            "finetune",
            {**RECIPE, "sampling": "balanced", "class_weights": "balanced"},
            "finetune.sampling: expected none with class_weights balanced, received balanced",
        ),
        ("audit.cosine", 0, "audit.cosine: expected greater than 0, received 0"),
        ("audit.hash_bits", 64, "audit.hash_bits: expected less than or equal to 63, received 64"),
        ("finetune.schedule", {"name": "plateau", "factor": 3}, "finetune.schedule.factor: expected less than 1"),
        ("finetune.schedule", {"name": "plateau", "plateau": 3}, "finetune.schedule.plateau: expected no such key"),
        (
            "finetune.schedule",
            {"name": "step"},
            "finetune.schedule.name: expected 'plateau' or 'cosine', received 'step'",
        ),
        ("finetune.schedule", {"name": [1]}, "finetune.schedule.name: expected 'plateau' or 'cosine', received [1]"),
        ("finetune.schedule", {}, "finetune.schedule.name: expected a value, found none"),
        ("finetune.schedule", "cosine", "finetune.schedule: expected a mapping, received 'cosine'"),
        ("data.image_size", 4, "data.image_size: expected greater than or equal to 8, received 4"),
        ("data.image_size", "big", "data.image_size: expected 'auto' or 'original', received 'big'"),
        ("data.image_size", None, "data.image_size: expected auto, original or an integer, received None"),
        ("data.fit", "stretch", "data.fit: expected 'squash', 'crop' or 'pad', received 'stretch'"),
        ("data.max_pixels", 2 * 10**8, "data.max_pixels: expected less than or equal to 178956970, received 200000000"),
        ("finetune.image_size", 4, "finetune.image_size: expected greater than or equal to 8, received 4"),
        *(
            (
                "finetune.image_size",
                value,
                f"finetune.image_size: expected an integer, or a mapping from backbones to integers, received {value}",
            )
            for value in (True, 32.0, [32])
        ),
        ("finetune.image_size", {"ResNet50": "x"}, "finetune.image_size.ResNet50: expected a valid integer, received"),
        ("finetune.image_size", {"ResNet50": 4}, "finetune.image_size.ResNet50: expected greater than or equal to 8"),
        ("finetune.image_size", {"ResNet51": 32}, "finetune.image_size.ResNet51: expected one of ResNet50"),
        ("finetune.image_size", {3: 32}, "finetune.image_size.3: expected text in quotes, received 3"),
        ("finetune.fine_tune_at", -1, "finetune.fine_tune_at: expected greater than or equal to 0, received -1"),
        ("finetune.fine_tune_at", "", "finetune.fine_tune_at: expected non-empty text, received ''"),
        *(
            (
                "finetune.fine_tune_at",
                value,
                "finetune.fine_tune_at: expected a layer's index or name, or a mapping from backbones to these, "
                f"received {value}",
            )
            for value in (False, 1.5, ["top"])
        ),
        (
            "finetune.fine_tune_at",
            {"ResNet50": None},
            "finetune.fine_tune_at.ResNet50: expected a layer's index or name, received None",
        ),
        ("finetune.fine_tune_at", {"dict": 3}, "finetune.fine_tune_at.dict: expected one of ResNet50"),
        ("extract.weights", "imagenet", "extract.weights: expected a mapping, received 'imagenet'"),
        ("extract.weights", {"ResNet51": "none"}, "extract.weights.ResNet51: expected one of ResNet50"),
    ],
)
def test_parse_of_wrong_value_says_key_expected_and_received(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        params.parse(changed(path, value))
    assert str(caught.value).startswith(f"params.yaml: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", sorted(TINY))
def test_parse_without_section_is_refused(section: str) -> None:
    values = {name: value for name, value in TINY.items() if name != section}
    with pytest.raises(InputError, match=f"{section}: expected a value, found none"):
        params.parse(values)


@pytest.mark.parametrize("text", ["1e-05", "1E-5", "+1e-05", "0.00001", ".00001", "1.e-5"])
def test_load_of_number_as_dvc_writes_it_is_a_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(TINY).replace("rho: 0.05", f"rho: {text}"))
    assert params.load(tmp_path / "params.yaml").sam.rho == 1e-5


NAMES = [
    "NO",
    "no",
    "yes",
    "on",
    "Off",
    "y",
    "1:30",
    "190:20:30.15",
    "1_000",
    "012",
    "0o14",
    "1e5",
    "~",
    "null",
    "=",
    "<<",
]


def test_load_of_names_keeps_them_when_dvc_writes_the_file_again(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    names = ", ".join(f'"{name}"' for name in NAMES)
    path.write_text(f"{yaml.safe_dump(TINY)}class_names: [{names}]\n")
    for _ in range(2):
        assert read_yaml(path)["class_names"] == NAMES
        with modify_yaml(path) as values:  # as `-S sam.rho=0.1` does
            values["sam"]["rho"] = 0.1
    assert '"NO"' not in path.read_text()


def test_parse_of_text_for_number_is_refused() -> None:
    with pytest.raises(InputError, match=r"sam\.rho: expected a valid number, received '1e-05'"):
        params.parse(changed("sam.rho", "1e-05"))


@pytest.mark.parametrize("value", [32, {"ResNet50": 32}, {}, None])
def test_parse_of_image_size_takes_one_or_one_per_backbone(value: Any) -> None:
    assert params.parse(changed("finetune.image_size", value)).finetune.image_size == value


@pytest.mark.parametrize("value", [0, "top", {"ResNet50": "top", "MobileNet": 3}, {}, None])
def test_parse_of_fine_tune_at_takes_one_or_one_per_backbone(value: Any) -> None:
    assert params.parse(changed("finetune.fine_tune_at", value)).finetune.fine_tune_at == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [1]\nseeds: [2]\n", r"seeds: expected once, received twice \(line 2\)"),
        ("sam:\n  rho: 1\n  rho: 1\n", r"rho: expected once, received twice \(line 3\)"),
        ("a:\n- {b: 1, 'b': 2}\n", r"b: expected once, received twice \(line 2\)"),
        ("seed: [1\n", "expected YAML"),
        ("", "the file: expected a mapping, received None"),
        ("- 1\n", r"the file: expected a mapping, received \[1\]"),
        ("seed: 2024-13-45\n", "expected YAML"),
        ("seed: !!int x\n", "expected YAML"),
        ("seed: !!bool x\n", "expected YAML"),
        pytest.param("seed: " + "1" * 5000, "expected YAML", id="long"),
        ("seed: !!python/object:os.system x\n", "expected YAML"),
        pytest.param("[" * 5000, "expected YAML", id="deep", marks=pytest.mark.slow),
        ("seed: &a {seed: *a}\n", "expected "),
        ("? [a]\n: 1\n", "expected "),
        ("seed: \0\n", "expected YAML"),
        ("seed: 1\n---\nseed: 2\n", "expected YAML"),
    ],
)
def test_load_of_wrong_file_says_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        params.load(tmp_path / "params.yaml")
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"{tmp_path / 'params.yaml'}: ")


def test_load_of_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.yaml: expected a file, found none"):
        params.load(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match="expected a readable file, received: Is a directory"):
        params.load(tmp_path)
    (tmp_path / "params.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected YAML"):
        params.load(tmp_path / "params.yaml")


def test_load_of_exponentially_nested_aliases_is_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    text = yaml.safe_dump(TINY).replace("rho: 0.05", "rho: *a29") + "\n"
    (tmp_path / "params.yaml").write_text("\n".join(lines) + "\n" + text)
    with pytest.raises(InputError, match=r"sam\.rho: expected a valid number"):
        params.load(tmp_path / "params.yaml")


def test_load_with_yaml_merge_key_merges_sections(tmp_path: Path) -> None:
    recipe = yaml.safe_dump({"finalize": TINY["finalize"]}).replace("finalize:", "finalize: &one")
    rest = yaml.safe_dump({**{key: value for key, value in TINY.items() if key != "finalize"}, "sam": None})
    text = recipe + rest.replace("sam: null", "sam: {<<: *one, rho: 0.1}")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(InputError, match=r"sam\.tolerance: expected no such key, received 0\.0"):
        params.load(tmp_path / "params.yaml")
    text = text.replace("  tolerance: 0.0", "  {}", 1).replace("rho: 0.1", "rho: 1e-05")
    (tmp_path / "params.yaml").write_text(text)
    assert params.load(tmp_path / "params.yaml").sam.rho == 1e-5


def paths(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += paths(value, f"{prefix}{key}.")
    return keys


OTHER_KEYS = [
    "seed",
    "data.shuffle_labels",
    "data.class_names",
    "data.val_fraction",
    "data.skip_broken",
    "extract.early_stopping",
    "extract.ema",
    "finetune.schedule",
    "finetune.schedule.name",
    "finetune.image_size.ResNet50",
    "finetune.image_size.dict",
    "extract.weights.int",
    "evaluate.ece_bins",
    "runtime.strategy",
    "sam.radius",
    "sam.\u2028\n",
    "colour",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1e-05", "\ud800", "ResNet50", "plateau", datetime.date(2024, 1, 1), b"x"])
)
KEYS = st.text(max_size=6) | st.integers() | st.none() | st.sampled_from(["name", "ResNet50", "train", "factor", "\n"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


def printable(path: str) -> str:
    return ".".join(part if part.isprintable() else repr(part) for part in path.split("."))


@pytest.mark.slow
@settings(deadline=None, max_examples=500)
@given(st.sampled_from(paths(TINY) + OTHER_KEYS), VALUES)
def test_parse_of_any_value_for_any_key_is_accepted_or_says_one_line(path: str, value: Any) -> None:
    try:
        assert isinstance(params.parse(changed(path, value)), params.Params)
    except InputError as error:
        message = str(error)
        assert len(message.splitlines()) == 1
        at_key = message.startswith((f"params.yaml: {printable(path)}: ", f"params.yaml: {printable(path)}."))
        at_both = path.startswith("data.") and message.startswith("params.yaml: data: expected exactly one of")
        assert at_key or at_both
        assert ": expected " in message
        assert ", received " in message or ", found none" in message
        assert not any(inner in message.split(": expected ")[0] for inner in ("constrained", "function-", "dict["))


@pytest.mark.slow
@settings(deadline=None)
@given(VALUES)
def test_parse_of_any_other_value_says_one_line(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        params.parse(value)
    assert str(caught.value).startswith("params.yaml: ")
    assert len(str(caught.value).splitlines()) == 1


@settings(deadline=None)
@given(st.text(alphabet="ab:-[]{},&*<!?|>'\"#%@` \n\t019.", max_size=30) | st.text(max_size=20))
def test_load_of_any_text_says_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        params.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_parse_of_sam_epochs_within_warmup_is_refused() -> None:
    values = copy.deepcopy(TINY)
    values["finetune"] |= {"epochs": 9, "schedule": {"name": "cosine", "warmup_epochs": 2}}
    values["sam"] = {"epochs": 2}
    with pytest.raises(
        InputError, match=r"^params.yaml: sam.epochs: expected more than finetune.schedule.warmup_epochs, which is 2,"
    ):
        params.parse(values, "params.yaml")


@pytest.mark.parametrize("section", ["extract", "finetune"])
def test_parse_of_several_views_without_augmentation_is_refused(section: str) -> None:
    values = copy.deepcopy(TINY)
    values["augment"] = {"engine": "none"}
    values["extract"]["views"] = values["finetune"]["views"] = 1
    assert params.parse(values)
    values[section]["views"] = 2
    with pytest.raises(InputError, match=rf"^params.yaml: {section}.views: expected at most 1 with augment"):
        params.parse(values)
