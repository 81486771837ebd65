"""The sentences of the report that depend on the numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flatmin import power
from flatmin.report.study import METHODS, Study

MINUS = "\N{MINUS SIGN}"
NAMES = {"extract": "frozen", "finetune": "fine-tuned", "control": "control", "sam": "SAM"}
MEANINGS = {
    "extract": "linear classifier on the frozen backbone",
    "finetune": "plain fine-tuning",
    "control": "plain fine-tuning for as many gradient evaluations as SAM took",
    "sam": "fine-tuning with sharpness-aware steps",
}


def meanings(study: Study) -> dict[str, str]:
    """What each method is, in words."""
    settings = study.params.sam
    adaptive = ", adaptive" if settings.adaptive else ""
    return MEANINGS | {"sam": f"{MEANINGS['sam']} (method {settings.method}, rho {settings.rho:g}{adaptive})"}


def points(fraction: float) -> str:
    """A difference in percentage points, with its sign: 0.004 -> +0.4."""
    return f"{100 * fraction:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0").replace("-", MINUS)


def percent(fraction: float, decimals: int = 1) -> str:
    return f"{100 * fraction:.{decimals}f}\xa0%"


def count(number: float) -> str:
    return f"{number:,.0f}"


def within(fraction: float) -> str:
    """A tolerance in percentage points: 0.005 -> 0.5 points."""
    return f"{100 * fraction:g} point{'' if 100 * fraction == 1 else 's'}"


def plural(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def pair(key: str) -> str:
    """What audit counts: `train_test` -> of test have one in train; `test` -> of test have another."""
    first, _, second = key.partition("_")
    return f"of {second} have one in {first}" if second else f"of {first} have one in {first}"


def interval(found: Mapping[str, float]) -> str:
    return f"{points(found['low'])} to {points(found['high'])}"


def is_shown(found: Mapping[str, float]) -> bool:
    """Whether a difference's interval leaves out 0."""
    return found["low"] > 0 or found["high"] < 0


def verdict(study: Study) -> str:
    """What came out, in one sentence."""
    if not study.labelled:
        released = study.final["released"]
        return (
            f"Test has no labels, so nothing says how accurate a method is or whether SAM helps; {_who(released)} was "
            f"released for its accuracy on val, {percent(released['val']['accuracy'])}."
        )
    found = study.evaluated["sam_minus_control"]
    seeds = plural(len(found["seeds"]), "seed")
    sized = f"95\xa0% interval {interval(found)} points, {seeds}, {count(found['images'])} test images"
    size = f"{abs(100 * found['accuracy']):.1f}"
    if size == "0.0":
        return f"SAM is as accurate as plain fine-tuning at equal compute ({sized})."
    direction = "better" if found["accuracy"] > 0 else "worse"
    chance = "" if is_shown(found) else ", which may be chance"
    return f"SAM is {size} points {direction} than plain fine-tuning at equal compute{chance} ({sized})."


def facts(study: Study) -> list[tuple[str, str]]:
    """What the verdict rests on: a term and a sentence or two for each."""
    found = [("Equal compute", _equal_compute(study)), ("Released", _released(study))]
    if not study.labelled:
        return found
    against_control = study.evaluated["sam_minus_control"]
    covers = against_control["covers"]
    alone = "" if "seeds" in covers else " With one seed, nothing is known of how much another one would differ."
    scope = f"It is over {covers}, for this training set and this start: other training images could change it."
    return [found[0], ("Interval", scope + alone), ("Power", _power(against_control)), found[1]]


def _equal_compute(study: Study) -> str:
    costs = {method: count(study.final[method]["gradient_evaluations"]) for method in METHODS}
    taken = costs["sam"] if costs["sam"] == costs["control"] else f"{costs['sam']} and {costs['control']}"
    sentence = (
        f"SAM and control, which is plain fine-tuning for as long, took {taken} gradient evaluations a seed (an "
        "image's pass forward and backward)."
    )
    if not study.labelled:
        return sentence
    found = study.evaluated["sam_minus_finetune"]
    return (
        f"{sentence} Beside fine-tuning as configured, with {costs['finetune']}, SAM differs by "
        f"{points(found['accuracy'])} points ({interval(found)})."
    )


def _power(found: Mapping[str, Any]) -> str:
    images = f"{count(found['images'])} test images"
    smallest = found.get("smallest_difference")
    if smallest is None:
        return f"On {images} the two differ so rarely that no difference could be shown."
    enough = "more" if abs(found["accuracy"]) >= smallest else "less"
    return (
        f"With {percent(power.POWER, 0)} power, one seed's {images} show differences from {100 * smallest:.1f} points "
        f"on, where {percent(found['discordance'])} of them are discordant, as here: right with one of the two alone. "
        f"What was found is {enough}."
    )


def _who(released: Mapping[str, Any]) -> str:
    seed = f" of seed {released['seed']}" if "seed" in released else ""
    return f"{NAMES[released['method']]}{seed}"


def _released(study: Study) -> str:
    final, tolerance = study.final, study.params.finalize.tolerance
    released = final["released"]
    accuracies = {method: final[method]["val"][study.params.select.metric] for method in NAMES}
    near = [method for method in NAMES if accuracies[method] >= max(accuracies.values()) - tolerance - 1e-9]
    if len(near) == 1:
        why = f"the only method within {within(tolerance)} of the best on val"
    else:
        others = ", ".join(NAMES[method] for method in near)
        why = (
            f"of those within {within(tolerance)} of the best on val ({others}) the one with the fewest "
            "gradient evaluations"
        )
    best = ", and of its seeds the best on val" if "seed" in released and len(study.seeds) > 1 else ""
    scored = ""
    if study.labelled:
        scored = f" Its test accuracy is {percent(study.evaluated['final']['test']['accuracy'])}."
    who = _who(released)
    return (
        f"{who[0].upper()}{who[1:]}: {why}{best}. Its val accuracy, {percent(released['val']['accuracy'])}, is "
        f"optimistic, since val chose it.{scored}"
    )


def unequal(pairs: str) -> str:
    """Pairs of methods as evaluate writes them, by the names of the report: "finetune and sam of seed 7; ..."."""
    return re.sub("|".join(NAMES), lambda found: NAMES[found[0]], pairs).replace("; ", ", ")


def plain(sentence: str) -> str:
    """A sentence for a terminal of any encoding."""
    return sentence.replace(MINUS, "-").replace("\xa0", " ")
