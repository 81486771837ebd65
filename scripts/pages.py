"""Fill the generated blocks of the README and of docs/, and draw the README's picture: for `make docs`.

Everything comes from files that git tracks, so the same commit gives the same pages.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from blocks import fill, table  # which finds the package in a shell without PYTHONPATH
from pydantic_core import PydanticUndefined

from flatmin import cli
from flatmin.common import errors, files, params
from flatmin.models.registry import BACKBONES
from flatmin.report import words
from flatmin.report.page import accuracy_chart, difference_chart
from flatmin.report.study import Inputs, Study
from flatmin.sam import methods_table
from flatmin.use import formats, parity

ROOT = Path(__file__).resolve().parents[1]


def verbatim(text: str) -> str:
    return f"```\n{text.rstrip()}\n```\n"


def study() -> Study:
    """The default study, as far as metrics/ tells."""
    paths: dict[str, Any] = dict.fromkeys((field.name for field in fields(Inputs)), "")
    paths |= {name: str(ROOT / f"metrics/{name}.json") for name in ("prepare", "select", "final", "evaluate")}
    return Study(params.load(ROOT / "params.yaml"), Inputs(**paths))


def verdict() -> str:
    return words.plain(words.verdict(study()))


def picture(chart: str) -> str:
    """A chart of the report as a file of its own, with the report's colours."""
    style = (ROOT / "src/flatmin/report/style.css").read_text(encoding="utf-8")
    colours = " ".join(re.findall(r":root {(.*?)}", style, re.DOTALL)[0].split())  # the first are the light ones
    start = '<svg xmlns="http://www.w3.org/2000/svg" style="background: #fff; color: var(--text)"'
    return str(chart).replace("<svg", start, 1).replace(">", f"><style>:root {{{colours}}}</style>", 1) + "\n"


def results() -> str:
    """The methods of the default study, and what SAM gained."""
    final, evaluated = study().final, study().evaluated
    rows = []
    for method, name in words.NAMES.items():
        test, spread = evaluated[method]["test"], evaluated[method].get("test_deviation", {})
        deviation = f" ± {100 * spread['accuracy']:.1f}" if spread else ""
        cost = f"{final[method]['gradient_evaluations']:,.0f}"
        rows.append([f"**{name}**: {words.MEANINGS[method]}", f"{100 * test['accuracy']:.1f}{deviation}", cost])
    columns = ["", "test accuracy, %", "gradient evaluations"]
    return f"{table(columns, rows)}\n**{verdict()}**\n"


def output() -> str:
    """What the default study prints at its end."""
    return verbatim(f"report: {verdict()}\nreport: .../report/index.html")


def params_tables() -> str:
    """Every key of the schema, a table for each section."""
    parts = [_section("The whole study", params.Params, leave_out=_sections(params.Params))]
    for name, section in _sections(params.Params).items():
        if name == "extract":
            parts.append(_section("extract and finetune", params.Training))
        shared = params.Training.model_fields if issubclass(section, params.Training) else {}
        parts.append(_section(name, section, leave_out=shared))
    return "\n".join(parts)


def _sections(section: Any) -> dict[str, Any]:
    """The sections within a section, by key."""
    return {name: inner[0] for name, field in section.model_fields.items() if (inner := _models(field.annotation))}


def _models(annotation: Any) -> list[Any]:
    """The sections that a key's type allows: one, several as for a schedule, or none."""
    if isinstance(annotation, type) and issubclass(annotation, params.Section):
        return [annotation]
    return [each for part in getattr(annotation, "__args__", ()) for each in _models(part)]


def _section(title: str, section: Any, *, leave_out: Container[str] = ()) -> str:
    rows = [row for row in _rows(section) if row[0].strip("`").split(".")[0] not in leave_out]
    return f"## {title}\n\n{(section.__doc__ or '').strip()}\n\n{table(['key', 'default', 'meaning'], rows)}"


def _rows(section: Any, prefix: str = "") -> Iterator[list[str]]:
    """Key, default and meaning; the keys of a section within the section have a dot."""
    for name, field in section.model_fields.items():
        if field.description and not (prefix and name == "name"):  # a schedule's name is explained with the schedule
            meaning = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", field.description)
            yield [f"`{prefix}{name}`", _default(field.default), meaning]
        for inner in _models(field.annotation):
            yield from _rows(inner, f"{prefix}{name}.")


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def backbones() -> str:
    rows = (
        [f"`{name}`", f"{row.image_size} px", f"`{row.fine_tune_at}`", f"{row.smallest} px"]
        for name, row in BACKBONES.items()
    )
    return table(["name", "default size", "first trained layer, by default", "smallest size"], rows)


def make_targets() -> str:
    """The targets that `make help` lists."""
    found = re.findall(r"^([a-z-]+):.*## (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return table(["command", "what it does"], ([f"`make {name}`", meaning] for name, meaning in found))


def helps() -> str:
    """The help of every subcommand of `flatmin`."""
    names = sorted(path.stem for path in (ROOT / "src/flatmin/use/commands").glob("[a-z]*.py"))
    return "\n".join(f"### flatmin {name}\n\n{verbatim(_help(name))}" for name in names)


def _help(command: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        cli.main([command, "--help"])
    return printed.getvalue()


def exports() -> str:
    """The proofs of bench/exports.json, a row for each format."""
    found = files.read_json(ROOT / "bench/exports.json")
    (machine,) = {proof["machine"] for proof in found["formats"].values()}
    rows = []
    for name in formats.FORMATS:
        proof = found["formats"][name]
        gain = proof["difference"]
        interval = f"{100 * gain['low']:+.2f} to {100 * gain['high']:+.2f}"
        rows.append(
            [
                f"`{name}`",
                f"{proof['differ']} of {proof['images']}",
                f"{proof['log_probability_difference']:.1g}",
                parity.with_interval(proof["exported"]),
                f"{100 * gain['accuracy']:+.2f} ({interval}), p {gain['p_value']:.2g}",
                f"{proof['bytes'] / 1e6:.1f}",
                f"{proof['milliseconds']:.0f}",
            ]
        )
    trained = parity.with_interval(found["formats"]["keras"]["trained"])
    columns = ["format", "answers that differ", "largest difference of log-probabilities", "accuracy (95 % interval)"]
    columns += ["difference in points (95 % interval), McNemar", "MB", "ms a picture"]
    text = f"{found['model']['backbone']} at {found['model']['image_size']} pixels, as trained {trained}; {machine}:"
    return f"{text}\n\n{table(columns, rows)}"


def check() -> str:
    """What `flatmin check` says of the default study."""
    command = [sys.executable, "-m", "flatmin.cli", "check", "params.yaml"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return verbatim(done.stdout)


def sam_cost() -> str:
    """Time and memory of the methods' steps, from `make bench`."""
    found = files.read_json(ROOT / "bench/results.json")["sam_variants"]
    names = sorted(found, key=lambda name: (not name.startswith("sam"), name))
    rows = [[name, *(f"{found[name][key]:.2f}" for key in ("step_ratio", "memory_copies"))] for name in names]
    return table(["step", "time, plain = 1", "memory above plain, copies of the trained weights"], rows)


def sam_backends() -> str:
    """The time of a step on each backend, from bench/sam_backends.py."""
    names = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
    found = files.read_json(ROOT / "bench/sam_backends.json")
    measured = {name: found[key] for key, name in names.items() if key in found}
    variants = [*next(iter(measured.values()))["ratios"]]
    rows = [
        [name, f"{each['plain_milliseconds']} ms", *(f"{each['ratios'][variant]:.2f}" for variant in variants)]
        for name, each in measured.items()
    ]
    return table(["", "plain", *variants], rows)


BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"results": results, "output": output},
    "docs/start.md": {"output": output},
    "docs/intervals.md": {"check": check},
    "docs/sam.md": {"methods": methods_table, "cost": sam_cost, "backends": sam_backends},
    "docs/backbone.md": {"backbones": backbones},
    "docs/params.md": {"params": params_tables},
    "docs/export.md": {"exports": exports},
    "docs/commands.md": {"make": make_targets, "flatmin": helps},
}


def main() -> None:
    os.environ["COLUMNS"] = "100"  # the width of the helps
    for page, blocks in BLOCKS.items():
        fill(ROOT / page, {name: write() for name, write in blocks.items()})
    for name, chart in {"accuracy": accuracy_chart, "differences": difference_chart}.items():
        with files.atomic_write(ROOT / f"docs/{name}.svg") as temporary:
            temporary.write_text(picture(chart(study())), encoding="utf-8")


if __name__ == "__main__":
    errors.run(main)
