"""The plots of evaluate."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from flatmin.evaluation import plots


def test_draw_sharpness_with_equal_losses_writes_equal_bytes(tmp_path: Path) -> None:
    along = {
        name: (plots.EIGENVECTOR_POSITIONS**2 * height, plots.RANDOM_POSITIONS**2)
        for name, height in (("finetune", 3), ("sam", 1))
    }
    for name in ("one", "two"):
        plots.draw_sharpness(tmp_path / f"{name}.png", along)
    one, two = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "two"))
    assert one == two
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (900, 360)
        assert not set(picture.info) & {"Software", "Creation Time", "date"}
        colors = {color for _, color in picture.convert("RGB").getcolors(2**20) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colors
    # Another curve is another picture.
    plots.draw_sharpness(tmp_path / "two.png", {"sam": along["sam"]})
    assert (tmp_path / "two.png").read_bytes() != one
