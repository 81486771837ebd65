"""`flatmin new`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The study's, of letters, digits, '.', '_' and '-'.")],
    folder: Annotated[
        Path | None, typer.Option(help="Pictures in a folder for each class, or in train/, val/ and test/ of these.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="A CSV or Parquet file of paths and labels.")] = None,
    image: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column of paths. [default: image]")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="The column of labels. [default: label]")] = None,
    split: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of splits. [default: split, if there is one]")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write this file. [default: studies/NAME/params.yaml]")
    ] = None,
) -> None:
    """Look at pictures, write the params of a study with sizes that suit them, and say what it will take here.

    docs/data.md says which folders and tables are read. Nothing but the one file is written.

    \b
    Examples:
      flatmin new birds --folder ~/pictures/birds
      flatmin new birds --csv birds.csv --image path --label species
    """
    if (folder is None) == (csv is None):
        raise typer.BadParameter("expected one of them", param_hint="'--folder' / '--csv'")
    columns = {key: value for key, value in (("image", image), ("label", label), ("split", split)) if value}
    if folder and columns:
        raise typer.BadParameter("expected with --csv only", param_hint=f"'--{next(iter(columns))}'")
    from flatmin.common import console

    started = time.perf_counter()
    with console.importing_tensorflow():
        from flatmin.use import new as work
    source = {"source": "table" if csv else "folder", "name": str(csv or folder), "columns": columns}
    work.new(name, source, to, time.perf_counter() - started)
