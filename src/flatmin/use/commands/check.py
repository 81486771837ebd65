"""`flatmin check`."""

from __future__ import annotations

from typing import Annotated

import typer


def check(path: Annotated[str, typer.Argument(metavar="PARAMS", help="The file to check.")] = "params.yaml") -> None:
    """Check params and their data without running anything: counts by class and role, and what is odd.

    \b
    Examples:
      flatmin check
      flatmin check studies/birds/params.yaml
    """
    from flatmin.common import console

    with console.importing_tensorflow():
        from flatmin.use import check as work
    work.check(path)
