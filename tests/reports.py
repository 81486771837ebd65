"""The files of a made-up study, from which the report is written in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fixtures import tiny_params
from PIL import Image

from flatmin.common import files, params
from flatmin.report.study import METHODS, Inputs, Study

BACKBONES = ["EfficientNetLite0", "MobileNet025"]


class Made:
    """Writes the study to a folder.

    Args:
        names: of the classes. images: of test.
        labelled: whether test has labels.
        gain, low, high: SAM's difference, a fraction, and its interval.
        duplicates: the number of pictures of test that are in train.
        near: the number of near duplicates of test in train, of contradictions among them and of label suspects.
        groups: by role, their number.
        limits: mistakes, pairs of classes, pictures of a pair, classes shown, and pictures of each.
        noise: whether pictures are noise of the largest size, which makes them as large as can be.
    """

    def __init__(
        self,
        folder: Path,
        *,
        names: list[str],
        seeds: tuple[int, ...] = (7, 8, 9),
        images: int = 60,
        labelled: bool = True,
        gain: float = -0.011,
        low: float = -0.027,
        high: float = 0.005,
        duplicates: int = 0,
        near: int = 0,
        groups: dict[str, int] | None = None,
        limits: tuple[int, int, int, int, int] = (3, 2, 2, 30, 1),
        noise: bool = False,
    ) -> None:
        self.folder, self.names, self.seeds, self.images, self.labelled = folder, names, seeds, images, labelled
        self.gain, self.low, self.high, self.duplicates, self.limits = gain, low, high, duplicates, limits
        self.noise, self.random, self.pictures = noise, np.random.default_rng(0), 0
        self.near, self.groups = near, groups
        self._data()
        self._trainings()
        self._evaluated()
        self._shown()
        self._audit()
        self._lock()

    def study(self) -> Study:
        settings = tiny_params(seeds=list(self.seeds), backbones=BACKBONES)
        folder = str(self.folder)
        inputs = Inputs(
            dataset=f"{folder}/dataset.json",
            prepare=f"{folder}/metrics/prepare.json",
            select=f"{folder}/metrics/select.json",
            audit=f"{folder}/metrics/audit.json",
            final=f"{folder}/metrics/final.json",
            evaluate=f"{folder}/metrics/evaluate.json",
            trainings={method: f"{folder}/metrics/{method}" for method in ("extract", *METHODS)},
            curves={method: f"{folder}/plots/{method}" for method in ("extract", *METHODS)},
            augment=f"{folder}/plots/augment.png",
            confusion=f"{folder}/plots/confusion.csv",
            audited=f"{folder}/audit",
            evaluation=f"{folder}/evaluation",
            lock=f"{folder}/dvc.lock",
        )
        return Study(params.parse(settings), inputs)

    def _data(self) -> None:
        def role(each: int, labelled: bool = True) -> dict[str, Any]:
            count = each * len(self.names)
            sizes = dict.fromkeys(self.names, each if labelled else 0)
            return {"count": count, "unlabelled": 0 if labelled else count, "classes": sizes, "wrong_labels": 0}

        pairs = [[f"train/{index}.png", f"test/{index}.png"] for index in range(self.duplicates)]
        roles = {"train": role(5), "val": role(3), "test": role(6, self.labelled)}
        dataset = {
            "class_names": self.names,
            "roles": roles,
            "duplicates": {"train_test": {"count": self.duplicates, "names": pairs}},
            "broken": ["a/b.png (truncated)"],
            "ignored": {"suffix": {"txt": 2}},
            "empty": [],
            "first_frames": 1,
            "dark": {"count": 0, "names": []},
            "groups": self.groups,
            "digest": "0123abcd",
        }
        files.write_json(self.folder / "dataset.json", dataset)
        prepared = {"name": "pictures", "smallest_difference": {"test": 0.02, "val": 0.034}}
        files.write_json(self.folder / "metrics/prepare.json", prepared)
        files.write_json(self.folder / "metrics/select.json", {"backbone": BACKBONES[0], "best_val_accuracy": 0.83})
        (self.folder / "plots").mkdir()
        Image.new("RGB", (80, 80), "gray").save(self.folder / "plots/augment.png")

    def _trainings(self) -> None:
        final: dict[str, Any] = {}
        for place, method in enumerate(("extract", *METHODS)):
            evaluations = (100, 200, 400, 400)[place]
            val = {"accuracy": 0.8 + place / 50, "loss": 0.5}
            for item in BACKBONES if method == "extract" else self.seeds:
                values = {
                    "val": val,
                    "gradient_evaluations": evaluations,
                    "multiply_adds": 10**6 * len(str(item)),
                    "epochs": 4,
                    "best_epoch": 3,
                }
                files.write_json(self.folder / f"metrics/{method}/{item}.json", values)
                curve = [[epoch, 0.1, 1 / epoch, 0.5, "", 1 / epoch, 1 - 0.5 / epoch] for epoch in range(1, 5)]
                header = ["epoch", "learning_rate", "loss", "accuracy", "accuracy_wrong", "val_loss", "val_accuracy"]
                files.write_csv(self.folder / f"plots/{method}/{item}.csv", header, curve)
            final[method] = {"gradient_evaluations": evaluations, "temperature": 0.5, "val": val}
        final["released"] = {"method": "sam", "seed": self.seeds[0], "temperature": 0.5, "val": final["sam"]["val"]}
        files.write_json(self.folder / "metrics/final.json", final)

    def _evaluated(self) -> None:
        test = dict.fromkeys(("accuracy", "macro_f1", "loss", "calibrated_loss", "ece", "calibrated_ece"), 0.9)
        sharpness = dict.fromkeys(("loss", "eigenvalue_1", "trace", "gradient_rise", "adaptive_rise"), 1.5)
        found: dict[str, Any] = {
            "sharpness": {"equal_loss": self.labelled, "not_compared": "" if self.labelled else "sam and control"}
        }
        parts = {"without_near_duplicates": self.images - self.near} if self.near else {}
        scored = {"test": test, **dict.fromkeys(parts, test)} if self.labelled else {}
        for method in METHODS:
            seeds = {str(seed): {**scored, "sharpness": sharpness} for seed in self.seeds}
            found[method] = {**scored, "sharpness": sharpness, "seeds": seeds}
        if self.labelled:
            found["extract"] = found["final"] = scored
            found["test_images"] = {"all": self.images, **parts}
            each = {"accuracy": self.gain, "low": self.low, "high": self.high, "p_value": 0.2}
            for other in ("control", "finetune"):
                found[f"sam_minus_{other}"] = {
                    "accuracy": self.gain,
                    "low": self.low,
                    "high": self.high,
                    "covers": "seeds and images" if len(self.seeds) > 1 else "images",
                    "discordance": 0.036,
                    "images": self.images,
                    "smallest_difference": 0.017,
                    "seeds": {str(seed): each for seed in self.seeds},
                    **{part: {"accuracy": 0.004, "low": -0.02, "high": 0.03, "images": 3} for part in parts},
                }
        files.write_json(self.folder / "metrics/evaluate.json", found)
        actual = [self.names[index % len(self.names)] for index in range(self.images if self.labelled else 0)]
        rows = ((name, self.names[0] if index % 7 == 0 else name) for index, name in enumerate(actual))
        files.write_csv(self.folder / "plots/confusion.csv", ["actual", "predicted"], rows)
        if self.labelled:
            self._tables()
        lines = [
            [method, direction, position / 10, 1 + position**2]
            for method in METHODS
            for direction in ("eigenvector", "random")
            for position in range(-3, 4)
        ]
        header = ["method", "direction", "position", "loss"]
        files.write_csv(self.folder / "evaluation/sharpness.csv", header, lines)

    def _tables(self) -> None:
        header = ["class", "images", "precision", "recall", "f1"]
        rows = ([name, 6, 0.9, 0.8, 0.85] for name in self.names)
        files.write_csv(self.folder / "evaluation/classes.csv", header, rows)
        bins = [[calibrated, index, 20, 0.2 * index, 0.15 * index] for calibrated in (0, 1) for index in range(1, 5)]
        header = ["calibrated", "bin", "images", "confidence", "accuracy"]
        files.write_csv(self.folder / "evaluation/reliability.csv", header, bins)
        models = ["extract", *(f"{method}@{seed}" for method in METHODS for seed in self.seeds), "final"]
        covered = [[model, share / 50, 0.5, 1 - share / 500] for model in models for share in range(1, 51)]
        header = ["model", "coverage", "threshold", "accuracy"]
        files.write_csv(self.folder / "evaluation/coverage.csv", header, covered)

    def _picture(self, side: int, of: str = "evaluation") -> str:
        """Write a picture; return its name."""
        (self.folder / of / "pictures").mkdir(parents=True, exist_ok=True)
        self.pictures += 1
        name = f"{self.pictures}.jpg" if self.noise else f"{self.pictures}.png"
        pixels = self.random.integers(0, 256, (side, side, 3), np.uint8) if self.noise else np.full((8, 8, 3), 90, "u1")
        Image.fromarray(pixels).save(self.folder / of / "pictures" / name, quality=82)
        return name

    def _shown(self) -> None:
        mistakes, pairs, in_pair, classes, each = self.limits
        first, second = self.names[:2]
        described = {"name": "images/<i>1</i>.png", "actual": first, "predicted": second}
        shown: dict[str, Any] = {
            "network": {
                "backbone": BACKBONES[0],
                "image_size": 32,
                "fine_tune_at": None,
                "multiply_adds": 10**6,
                "parameters": 10**6,
                "trained_parameters": 10**5,
                "bytes": 10**6,
            },
            "mistakes": [
                {
                    **described,
                    "probability": 0.98,
                    "probability_of_actual": 0.01,
                    "picture": self._picture(160),
                    "activation": self._picture(160),
                }
                for _ in range(mistakes if self.labelled else 0)
            ],
            "confused": [
                {**described, "count": 3, "of": 6, "pictures": [self._picture(160) for _ in range(in_pair)]}
                for _ in range(pairs if self.labelled else 0)
            ],
            "examples": {
                role: {
                    name: [self._picture(96) for _ in range(each if role != "test" or self.labelled else 0)]
                    for name in self.names[:classes]
                }
                for role in ("train", "val", "test")
            },
            "duplicates": {
                "train_test": [[self._picture(160), self._picture(160)] for _ in range(min(6, self.duplicates))]
            },
        }
        if self.labelled:
            shown["wrong"] = 9
        files.write_json(self.folder / "evaluation/shown.json", shown)

    def _audit(self) -> None:
        def picture(role: str, index: int, label: str | None) -> dict[str, Any]:
            return {"role": role, "name": f"{role}/{index}.png", "label": label, "picture": self._picture(96, "audit")}

        first, second = self.names[:2]
        pairs, contradictions = (
            [
                {"cosine": 0.91, "bits": 3, "pictures": [picture("train", index, first), picture("test", index, label)]}
                for index in range(self.near)
            ]
            for label in (first if self.labelled else None, second)
        )
        suspects = [picture("train", index, first) | {"guess": second, "margin": 0.5} for index in range(self.near)]
        shown = {"pairs": pairs, "contradictions": contradictions, "suspects": suspects}
        files.write_json(self.folder / "audit/shown.json", shown)
        counts = {"train": 0, "val": 0, "test": 0, "train_val": 0, "train_test": self.near, "val_test": 0}
        found = {
            "near_duplicates": counts,
            "contradictions": counts,
            "suspects": {"train": self.near, "val": 0, "out_of_fold_accuracy": 0.75},
            "classes": {"smallest": 5, "largest": 5, "imbalance": 1.0, "small": len(self.names)},
        }
        files.write_json(self.folder / "metrics/audit.json", found)

    def _lock(self) -> None:
        stages = {
            "prepare": {
                "deps": [{"path": "src/flatmin/data", "md5": "a" * 32 + ".dir", "size": 100}],
                "outs": [{"path": "data/records/train", "md5": "b" * 32 + ".dir", "size": 2000}],
            },
            "finetune@7": {"outs": [{"path": "models/finetune/7", "md5": "c" * 32 + ".dir", "size": 3000}]},
        }
        (self.folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
