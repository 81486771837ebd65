"""Fills the generated blocks of a page: what stands between `<!-- NAME: filled by ... -->` and `<!-- end -->`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH, as in the image
from flatmin.common import files
from flatmin.common.errors import InputError


def fill(page: Path, blocks: Mapping[str, str]) -> None:
    """Write a page with these blocks, by name, in place of those that it has.

    Raises:
        InputError: the page does not have each of the blocks once; nothing is written then.
    """
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        found = re.findall(rf"<!-- {name}: [^>]*-->\n.*?<!-- end -->", text, re.DOTALL)
        if len(found) != 1:
            raise InputError(f"{page}: expected one block <!-- {name}: ... --> to <!-- end -->, found {len(found)}")
        text = text.replace(found[0], f"{found[0].splitlines()[0]}\n{block}<!-- end -->")
    with files.atomic_write(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in [columns, ["---"] * len(columns), *rows])
