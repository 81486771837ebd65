"""`flatmin explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def explain(
    image: Annotated[str, typer.Argument(metavar="IMAGE")],
    model: Annotated[Path, typer.Option(help="The folder of a classifier.")] = Path("models/final"),
    class_name: Annotated[
        str | None, typer.Option("--class", metavar="NAME", help="The class; by default the predicted one.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="PNG", help="The file to write.")] = Path("explained.png"),
) -> None:
    """Show where in a picture the classifier saw a class, by Grad-CAM.

    The PNG has on its left what the network sees of the picture, on its right the same, the brighter the more it speaks
    for the class, and grey where nothing does.

    \b
    Examples:
      flatmin explain cat.jpg
      flatmin explain cat.jpg --class dog --out why-a-dog.png
    """
    from flatmin.common import console

    with console.importing_tensorflow():
        from flatmin.use import explain as work
    work.explain(image, model, class_name, out)
