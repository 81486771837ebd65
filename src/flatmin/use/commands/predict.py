"""`flatmin predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Format = Literal["table", "csv", "jsonl"]


def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER|-...", help="- reads paths, one a line.")],
    model: Annotated[Path, typer.Option(help="The folder of a classifier.")] = Path("models/final"),
    top: Annotated[int, typer.Option(min=1, metavar="K", help="How many of the most probable classes to write.")] = 1,
    format: Annotated[Format, typer.Option(help="What to write; jsonl is one JSON object a line.")] = "table",
    abstain_below: Annotated[
        float, typer.Option(min=0, max=1, metavar="P", help="Give no class where its probability is lower.")
    ] = 0.0,
) -> None:
    """Classify pictures: class and calibrated probability, in the order of the pictures, as soon as they are known.

    A picture that cannot be read is named on standard error, and the exit code is 1 at the end.

    \b
    Examples:
      flatmin predict cat.jpg dog.png
      flatmin predict pictures --format csv --top 3 > predictions.csv
      find . -name '*.jpg' | flatmin predict - --format jsonl --abstain-below 0.8
    """
    from flatmin.common import console

    with console.importing_tensorflow():
        from flatmin.use import predict as work
    work.predict(images, model, form=format, top=top, abstain_below=abstain_below)
