"""The command `flatmin`: `flatmin --help`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

from flatmin.common import errors
from flatmin.use import commands

EXAMPLES = """Begin a study, and use what it released.

\b
Examples:
  flatmin new birds --folder ~/pictures/birds
  flatmin check studies/birds/params.yaml
  flatmin predict picture.jpg --top 3
  flatmin predict pictures --format csv > predictions.csv
  flatmin explain picture.jpg --out why.png
  flatmin export --format onnx
  flatmin export --format litert-int8 --model models/final --out phone

Exit codes: 0 done, 1 the input cannot be used, 2 wrong usage.
"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command with these arguments, by default the process's, and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        import typer

        errors.run(lambda: _call(_application(typer), arguments))
    except ModuleNotFoundError as error:  # the base of the package has Keras alone
        if (error.name or "flatmin").startswith("flatmin"):
            raise
        _refuse(f"flatmin needs {error.name}, of its extra `pipeline`, as by: pip install '.[pipeline]' in a checkout")


def _application(typer: Any) -> Any:
    app = typer.Typer(
        help=EXAMPLES,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(lambda: None)  # with a single command Typer would leave out its name
    for module in pkgutil.iter_modules(commands.__path__):
        app.command(module.name)(getattr(importlib.import_module(f"{commands.__name__}.{module.name}"), module.name))
    return app


def _call(app: Any, arguments: list[str]) -> None:
    from typer import Abort, TyperException

    try:
        code = app(arguments or ["--help"], prog_name="flatmin", standalone_mode=False)
    except TyperException as error:
        _refuse(error.format_message().replace("Value error, ", ""))
    except Abort:  # Ctrl-C
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or (0 if arguments else 2))


def _refuse(message: str) -> Any:
    """Say in one line what is wrong with the usage, and exit with 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
