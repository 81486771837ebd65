"""`flatmin export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flatmin.use import formats


def export(
    format: Annotated[formats.Name, typer.Option(help="What to write.")],
    model: Annotated[Path, typer.Option(help="The folder of a released classifier.")] = Path("models/final"),
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default exports/FORMAT.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Export it although it answers otherwise too often.")] = False,
) -> None:
    """Write a model for another program, and prove that it answers as the trained one.

    The folder holds the file, its class names, the proof on val's pictures (parity.json) and a model card (README.md).
    Run it where the study ran: it reads data/records and metrics/. docs/export.md says what a format takes and gives.

    \b
    Examples:
      flatmin export --format onnx
      flatmin export --format litert-int8 --out phone
    """
    if missing := formats.missing(format):
        raise typer.BadParameter(
            f"{format} needs {', '.join(missing)}, of the extra `export`: `make export-setup` in a checkout",
            param_hint="--format",
        )
    from flatmin.common import console

    with console.importing_tensorflow():
        from flatmin.use import export as work
    work.export(model, format, out or Path("exports", format), force=force)
