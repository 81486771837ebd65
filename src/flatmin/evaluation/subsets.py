"""Parts of test that audit found, on which every model is scored, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flatmin.common import files
from flatmin.common.errors import InputError

WITHOUT = "without_near_duplicates"


def read(audit: Path | str, images: int) -> dict[str, np.ndarray]:
    """By the name of each part of test whether an image is in it: bool [images].

    WITHOUT is test without the images that have near duplicates in train. `suspect` is those whose label contradicts a
    near duplicate's in any role, `clean` the others. A part that is all of test, or none of it, is left out.

    Args:
        audit: the folder that audit wrote. images: of test.

    Raises:
        InputError: It is missing, or of another test.
    """
    leaked, suspect = np.zeros(images, bool), np.zeros(images, bool)
    for row in files.read_csv(Path(audit) / "pairs.csv"):
        if row["role"] != "test":
            continue
        position = int(row["position"])
        if position >= images:
            raise InputError(
                f"{audit}/pairs.csv: expected positions below {images}, the images of test, received {position};"
                " run audit again"
            )
        leaked[position] |= row["like_role"] == "train"
        suspect[position] |= row["contradicts"] == "1"
    found = {WITHOUT: ~leaked, "clean": ~suspect, "suspect": suspect}
    return {name: part for name, part in found.items() if part.any() and not part.all()}
