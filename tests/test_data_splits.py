"""Splits: what is refused before any record is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import cats_and_dogs, folder_data

from flatmin.common.errors import InputError
from flatmin.data import splits
from flatmin.data.sources import open_source


def test_refuse_broken_lists_all_of_them_in_a_file(tmp_path: Path) -> None:
    broken = [f"cat/{index}.png (truncated)" for index in range(50)] + ["cat/a\nb\r.png (empty)"]
    listed = tmp_path / "data" / "broken.txt"
    with pytest.raises(InputError) as error:
        splits.refuse_broken(broken, 50, listed)
    assert str(error.value) == (
        f"data.skip_broken: expected at most 50 broken images, received 51: {', '.join(broken[:3])}, ...; all are"
        f" listed in {listed}"
    )
    assert listed.read_text().splitlines() == [*broken[:50], r"cat/a\nb\r.png (empty)"]
    assert [path.name for path in listed.parent.iterdir()] == ["broken.txt"]
    splits.refuse_broken(broken, 51, listed)
    assert not listed.exists()


def test_assign_roles_with_too_many_broken_lists_those_of_every_role(tmp_path: Path) -> None:
    source = cats_and_dogs(tmp_path / "source", train=4, val=2, test=2)
    files = ["train/cat/00.png", "train/dog/01.png", "val/cat/00.png", "test/dog/01.png"]
    for file in files:
        (source / file).write_bytes(b"broken")
    data = folder_data(source, val="val", train_per_class=2, skip_broken=1)
    listed = tmp_path / "broken.txt"
    with pytest.raises(InputError, match="at most 1 broken images, received 4: "):
        splits.assign_roles(open_source(data), data, ["cat", "dog"], [], listed)
    assert sorted(line.split(" ")[0] for line in listed.read_text().splitlines()) == sorted(files)
