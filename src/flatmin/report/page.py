"""Assembles the report: sections in the order of the page, each from what stages wrote."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from flatmin.common import files
from flatmin.common.identity import RESULTS_VERSION
from flatmin.common.params import ROLES
from flatmin.report import charts, words
from flatmin.report.study import METHODS, Study, changed_params, data_uri, mean_by_method

FOLDER = Path(__file__).parent
PACKAGES = ("tensorflow", "keras", "numpy", "scipy", "scikit-learn", "pillow", "matplotlib", "dvc")
AS_NUMBERS = 20  # classes up to which the confusion matrix is a table of numbers
COMPARED = ("control", "finetune")  # with SAM
MANY = 50  # rows from which a table is folded


def write(study: Study, path: Path | str) -> str:
    """Write the report; return the verdict."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": words.count, "percent": words.percent, "points": words.points}
    environment.globals |= {"names": words.NAMES, "plural": words.plural, "within": words.within, "many": MANY}
    page = environment.get_template("page.html").render(
        style=environment.from_string("{% include 'style.css' %}").render(),
        picture=study.picture,
        picture_of_audit=study.picture_of_audit,
        **context(study),
    )
    with files.atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return words.verdict(study)


def context(study: Study) -> dict[str, Any]:
    """All that the template shows."""
    return {
        "name": study.prepare["name"],
        "verdict": words.verdict(study),
        "facts": words.facts(study),
        "meanings": words.meanings(study),
        "labelled": study.labelled,
        "methods": _methods(study),
        "data": _data(study),
        "audit": _audit(study),
        "augment": study.params.augment.model_dump(),
        "preview": data_uri(Path(study.inputs.augment)),
        "backbones": _backbones(study),
        "curves": _curves(study),
        "confusion": _confusion(study),
        "mistakes": study.shown["mistakes"],
        "wrong": study.shown.get("wrong", 0),
        "calibration": _calibration(study),
        "sharpness": _sharpness(study),
        "cost": _cost(study),
        "origin": _origin(study),
    }


def _methods(study: Study) -> dict[str, Any]:
    final, evaluated = study.final, study.evaluated
    rows = []
    for method in words.NAMES:
        part = evaluated.get(method, {})
        rows.append(
            {
                "method": method,
                "val": final[method]["val"],
                "val_deviation": final[method].get("val_deviation", {}),
                "test": part.get("test"),
                "deviation": part.get("test_deviation", {}),
                "gradients": final[method]["gradient_evaluations"],
                "released": final["released"]["method"] == method,
            }
        )
    found: dict[str, Any] = {"rows": rows}
    if study.labelled:
        found |= {
            "dots": accuracy_chart(study),
            "differences": difference_chart(study),
            "seeds": _each_difference(study),
        }
        found["parts"] = _parts(study)
    return found


PARTS = {
    "test": "all",
    "without_near_duplicates": "without near duplicates in train",
    "clean": "labels that no near duplicate contradicts",
    "suspect": "labels that one contradicts",
}


def _parts(study: Study) -> list[dict[str, Any]]:
    """The scores on parts of test that audit found: of each its name, images, methods' accuracies and SAM's gain."""
    evaluated = study.evaluated
    gain, images = evaluated["sam_minus_control"], evaluated["test_images"]
    return [
        {
            "name": name,
            "images": images.get(part, images["all"]),
            "accuracies": [evaluated[method][part]["accuracy"] for method in words.NAMES],
            "gain": gain if part == "test" else gain[part],
        }
        for part, name in PARTS.items()
        if part in images or part == "test"
    ]


def accuracy_chart(study: Study) -> Markup:
    """Test accuracy by method, a dot for each seed."""
    dots = []
    for method, label in words.NAMES.items():
        part = study.evaluated[method]
        each = [part["seeds"][str(seed)] for seed in study.seeds] if "seeds" in part else [part]
        dots.append((label, method, [100 * one["test"]["accuracy"] for one in each], 100 * part["test"]["accuracy"]))
    means = "; ".join(f"{label} {mean:.1f} on average" for label, _, _, mean in dots)
    alt = f"Test accuracy in percent by method, a dot for each seed: {means}"
    return charts.dots("accuracy", alt, dots, "test accuracy, %")


def difference_chart(study: Study) -> Markup:
    """SAM's differences in test accuracy, with their intervals."""
    rows, told = [], []
    for other in COMPARED:
        found = study.evaluated[f"sam_minus_{other}"]
        seeds = [100 * found["seeds"][str(seed)]["accuracy"] for seed in study.seeds]
        ends = (100 * found[key] for key in ("accuracy", "low", "high"))
        rows.append((f"SAM {words.MINUS}\n{words.NAMES[other]}", other, seeds, *ends))
        told.append(f"SAM minus {words.NAMES[other]} {words.points(found['accuracy'])}, {words.interval(found)}")
    alt = f"Differences in test accuracy in points, with 95 % intervals: {'; '.join(told)}"
    return charts.intervals("differences", alt, rows)


def _each_difference(study: Study) -> list[dict[str, Any]]:
    return [
        {"other": other, "seed": seed, **study.evaluated[f"sam_minus_{other}"]["seeds"][str(seed)]}
        for other in COMPARED
        for seed in study.seeds
    ]


def _data(study: Study) -> dict[str, Any]:
    dataset, shown = study.dataset, study.shown
    roles = {role: dataset["roles"][role] for role in ROLES if role in dataset["roles"]}
    sizes = roles["train"]["classes"].values()
    examples = shown["examples"]
    return {
        "dataset": dataset,
        "roles": roles,
        "shown": [name for name in dataset["class_names"] if name in examples["train"]],
        "examples": examples,
        "scored": [role for role, each in roles.items() if not each["unlabelled"]],
        "imbalance": max(sizes) / min(sizes),
        "duplicates": {pair: each for pair, each in dataset["duplicates"].items() if each["count"]},
        "pairs": [
            list(zip(pair.split("_"), names, pictures, strict=True))
            for pair, shown_pictures in shown["duplicates"].items()
            for names, pictures in zip(dataset["duplicates"][pair]["names"], shown_pictures, strict=False)
        ],
        "ignored": sum(sum(each.values()) for each in dataset["ignored"].values()),
        "smallest": study.prepare["smallest_difference"],
        "groups": dataset.get("groups"),
    }


def _audit(study: Study) -> dict[str, Any]:
    found, shown, counts = study.audit, study.found, study.dataset["roles"]

    def told(kind: str) -> list[str]:
        return [
            f"{words.count(number)} {words.pair(key)} ({words.percent(number / counts[key.split('_')[-1]]['count'])})"
            for key, number in found[kind].items()
            if number
        ]

    sizes, small = counts["train"]["classes"], study.params.audit.small_class
    return {
        **shown,
        "near": told("near_duplicates"),
        "contradicting": told("contradictions"),
        "labels": found["suspects"],
        "settings": study.params.audit,
        "small": sorted((name for name, size in sizes.items() if size < small), key=lambda name: (sizes[name], name)),
    }


def _backbones(study: Study) -> dict[str, Any]:
    chosen = study.select["backbone"]
    rows = [{"name": name, **study.training("extract", name)} for name in study.params.backbones]
    points = [
        (row["name"], row["multiply_adds"] / 1e6, 100 * row["val"]["accuracy"], row["name"] == chosen) for row in rows
    ]
    alt = "Val accuracy of the frozen backbones against millions of multiply-adds: " + "; ".join(
        f"{name} {accuracy:.1f} % at {millions:.0f}" for name, millions, accuracy, _ in points
    )
    return {
        "chosen": chosen,
        "rows": rows,
        "tolerance": study.params.select.tolerance,
        "best": study.select[f"best_val_{study.params.select.metric}"],
        "metric": study.params.select.metric.replace("_", " "),
        "chart": charts.scatter("backbones", alt, "multiply-adds, millions", "val accuracy, %", points),
    }


def _curves(study: Study) -> list[tuple[str, Any]]:
    heads = {name: [study.curves("extract", name)] for name in study.params.backbones}
    tuned = {method: [study.curves(method, seed) for seed in study.seeds] for method in METHODS}
    work = {
        method: [_evaluations_per_epoch(study.training(method, seed)) for seed in study.seeds] for method in METHODS
    }
    found = []
    for column, title, factor in (("val_accuracy", "val accuracy, %", 100), ("val_loss", "val loss, nats", 1)):
        series = {
            name: [_points(each["epoch"], each[column], factor) for each in curves] for name, curves in heads.items()
        }
        alt = f"{title} by epoch of the linear classifiers on frozen backbones. {_ends(series)}"
        found.append(
            (f"Frozen backbones: {title.split(',')[0]}", charts.lines(f"head{column}", alt, "epoch", title, series))
        )
    for column, title, factor in (
        ("val_accuracy", "val accuracy, %", 100),
        ("val_loss", "val loss, nats", 1),
        ("loss", "training loss, nats", 1),
    ):
        series = {
            method: [
                _points([epoch * each for epoch in curve["epoch"]], curve[column], factor)
                for curve, each in zip(curves, work[method], strict=True)
            ]
            for method, curves in tuned.items()
        }
        alt = f"{title} against gradient evaluations, a line for each seed. {_ends(series)}"
        panel = charts.lines(f"tuned{column}", alt, "gradient evaluations", title, series)
        found.append((f"Fine-tuning: {title.split(',')[0]}", panel))
        if column == "val_accuracy":
            late = [y for curves in series.values() for curve in curves for _, y in curve[len(curve) // 2 :]]
            limits = (min(late) - 1, min(100.5, max(late) + 1))
            alt = f"The same, drawn from {limits[0]:.0f} to {limits[1]:.0f} %. {_ends(series)}"
            panel = charts.lines("tunedlate", alt, "gradient evaluations", title, series, limits)
            found.append(("Fine-tuning: val accuracy, the upper part", panel))
    return found


def _evaluations_per_epoch(training: Mapping[str, Any]) -> float:
    return float(training["gradient_evaluations"]) / training["epochs"]


def _points(xs: list[float], ys: list[float], factor: float) -> list[tuple[float, float]]:
    return [(x, factor * y) for x, y in zip(xs, ys, strict=True)]


def _ends(series: Mapping[str, list[list[tuple[float, float]]]]) -> str:
    """Where each curve ends, in words."""
    ends = {key: [f"{curve[-1][1]:.3g}" for curve in curves if curve] for key, curves in series.items()}
    return "; ".join(f"{words.NAMES.get(key, key)} ends at {', '.join(values)}" for key, values in ends.items()) + "."


def _confusion(study: Study) -> dict[str, Any] | None:
    if not study.labelled:
        return None
    names = study.dataset["class_names"]
    number = {name: index for index, name in enumerate(names)}
    matrix = np.zeros((len(names), len(names)), int)
    for row in files.read_csv(study.inputs.confusion):
        matrix[number[row["actual"]], number[row["predicted"]]] += 1
    classes = [
        {"name": row["class"], "images": int(row["images"]), **{key: float(row[key]) for key in SCORES}}
        for row in study.table("classes")
    ]
    found: dict[str, Any] = {"names": names, "classes": classes, "pairs": study.shown["confused"]}
    if len(names) <= AS_NUMBERS:
        errors = matrix - np.diag(np.diag(matrix))
        most = max(1, errors.max())
        found["shades"] = np.where(errors > 0, 0.1 + 0.4 * np.sqrt(errors / most), 0.0).round(3).tolist()
        found["matrix"] = matrix.tolist()
    else:
        alt = (
            f"Confusion matrix of {len(names)} classes: the diagonal holds {np.trace(matrix)} of {matrix.sum()} images"
        )
        found["chart"] = charts.heat_map("confusion", alt, matrix)
    return found


SCORES = ("precision", "recall", "f1")


def _calibration(study: Study) -> dict[str, Any] | None:
    if not study.labelled:
        return None
    bins = study.table("reliability")
    total = sum(int(row["images"]) for row in bins if row["calibrated"] == "0")
    series = {
        label: [
            (100 * float(row["confidence"]), 100 * float(row["accuracy"]), 100 * int(row["images"]) / total)
            for row in bins
            if row["calibrated"] == calibrated
        ]
        for calibrated, label in (("0", "before"), ("1", "after"))
    }
    scores = study.evaluated["final"]["test"]
    before, after = scores["ece"], scores["calibrated_ece"]
    covered = mean_by_method(study.table("coverage"), study.seeds)
    at_half = {method: points[len(points) // 2][1] for method, points in covered.items()}
    return {
        "temperature": study.final["released"]["temperature"],
        "scores": scores,
        "rows": [
            (method, study.evaluated[method]["test"], study.final[method]["temperature"]) for method in words.NAMES
        ],
        "reliability": charts.reliability(
            "reliability",
            "Accuracy against confidence of the released model on test. The expected calibration error is "
            f"{100 * before:.1f} points before the temperature and {100 * after:.1f} after it.",
            series,
        ),
        "coverage": charts.lines(
            "coverage",
            "Accuracy on the most confident share of the test images by method. At half of the images: "
            + "; ".join(f"{words.NAMES[method]} {accuracy:.1f} %" for method, accuracy in at_half.items()),
            "images answered, %",
            "accuracy on these, %",
            {method: [points] for method, points in covered.items()},
        ),
    }


def _sharpness(study: Study) -> dict[str, Any]:
    rows = study.table("sharpness")
    panels = []
    for direction, title, x in (
        ("eigenvector", "Along the top eigenvector of the Hessian", "distance in weight space"),
        ("random", "Along a random direction, normalised by filter", "distance, 1 = the norm of each filter"),
    ):
        series: dict[str, list[list[tuple[float, float]]]] = {}
        for row in rows:
            if row["direction"] == direction:
                series.setdefault(row["method"], [[]])[0].append((float(row["position"]), float(row["loss"])))
        rises = ", ".join(f"{words.NAMES[key]} {curves[0][-1][1]:.2g}" for key, curves in series.items())
        alt = f"Training loss around the minimum of each method. At the right end: {rises}."
        panels.append((title, charts.lines(direction, alt, x, "mean training loss, nats", series)))
    measured = {method: study.evaluated[method] for method in METHODS}
    return {
        "panels": panels,
        "rows": [(method, part["sharpness"], part.get("sharpness_deviation", {})) for method, part in measured.items()],
        "not_compared": words.unequal(study.evaluated["sharpness"]["not_compared"]),
        "seed": study.seeds[0],
        "images": study.params.evaluate.sharpness.images,
    }


def _cost(study: Study) -> dict[str, Any]:
    rows = []
    for method in METHODS:
        trainings = [study.training(method, seed) for seed in study.seeds]
        rows.append(
            {
                "method": method,
                "gradients": study.final[method]["gradient_evaluations"],
                "epochs": sorted({each["epochs"] for each in trainings}),
                "best": [each["best_epoch"] for each in trainings],
            }
        )
    head = study.training("extract", study.select["backbone"])
    first = {
        "method": "extract",
        "gradients": head["gradient_evaluations"],
        "epochs": [head["epochs"]],
        "best": [head["best_epoch"]],
    }
    return {"rows": [first, *rows], "network": study.shown["network"]}


def _origin(study: Study) -> dict[str, Any]:
    versions = {"Python": platform.python_version(), "Flatmin's results version": str(RESULTS_VERSION)}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "params": [(key, _yaml(value), _yaml(default)) for key, value, default in changed_params(study.params)],
        "versions": versions,
        "locked": study.locked,
        "digest": study.dataset["digest"],
    }


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
