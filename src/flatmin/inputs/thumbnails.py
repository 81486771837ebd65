"""Small copies of stored pictures, for the report."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from flatmin.inputs.records import Records

SIDE = 160  # pixels of the longer side of a picture


class Gallery:
    """Writes pictures into `folder`, which exists; each file is named by what it shows."""

    def __init__(self, records: Records, folder: Path) -> None:
        self._records, self._folder = records, folder
        self._written: dict[tuple[str, int, int], str] = {}

    def add(self, role: str, position: int, side: int = SIDE) -> str:
        """Write a small copy of a role's picture, once; return the file's name."""
        key = (role, int(position), side)
        if key not in self._written:
            (stored,) = self._records.stored(role, [position])
            self._written[key] = self.save(stored.read(), f"{role}-{position}-{side}", side)
        return self._written[key]

    def save(self, picture: Image.Image, name: str, side: int = SIDE) -> str:
        """Write a picture, reduced to `side` if it is larger, as PNG or JPEG, whichever is smaller."""
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        encoded = {}
        for suffix, options in (("png", {"optimize": True}), ("jpg", {"format": "JPEG", "quality": 82})):
            buffer = io.BytesIO()
            picture.save(buffer, **({"format": "PNG"} | options))
            encoded[suffix] = buffer.getvalue()
        suffix = min(encoded, key=lambda each: len(encoded[each]))
        (self._folder / f"{name}.{suffix}").write_bytes(encoded[suffix])
        return f"{name}.{suffix}"
