"""Checks params and their data without running anything."""

from __future__ import annotations

from flatmin import check as params_check
from flatmin import power
from flatmin.common import console, params
from flatmin.use import survey


def check(path: str) -> None:
    """Print what will run, the pictures by class and role, what is odd, and what differences they can show.

    Raises:
        InputError: the params or the data cannot be used.
    """
    settings = params.load(path)
    console.log(params_check.describe(settings, path))
    tell(settings.data, survey.survey(settings.data))
    console.log("prepare finds images that cannot be read or are in two roles")


def tell(data: params.Data, found: survey.Survey) -> None:
    """Print a survey."""
    count = sum(found.total(role) for role in found.counts)
    console.log(f"{data.source} {data.name}: {len(found.class_names)} classes, {count:,} images")
    for line in found.table():
        console.log(line)
    for line in found.odd:
        console.log(f"note: {line}")
    scored = {role: found.total(role) for role in ("test", "val") if not found.unknown[role]}
    console.log(power.describe(scored))
