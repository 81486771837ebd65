"""Fills the generated blocks of a page: what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH, as in the image
from flatmin.common import files
from flatmin.common.errors import InputError

BLOCK = re.compile(r"<!-- begin ([a-z-]+) -->\n.*?<!-- end \1 -->\n", re.DOTALL)


def fill(page: Path, blocks: Mapping[str, str]) -> None:
    """Write a page with these blocks, by name, in place of those that it has.

    Raises:
        InputError: the page does not have each of the blocks once, or has others; nothing is written then.
    """
    text = page.read_text(encoding="utf-8")
    if sorted(found := BLOCK.findall(text)) != sorted(blocks) or len(found) != text.count("<!-- begin "):
        raise InputError(
            f"{page}: expected the blocks {', '.join(blocks)}, once each and ended, found {', '.join(found)}"
        )
    text = BLOCK.sub(lambda block: f"<!-- begin {block[1]} -->\n{blocks[block[1]]}<!-- end {block[1]} -->\n", text)
    with files.atomic_write(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in [columns, ["---"] * len(columns), *rows])
