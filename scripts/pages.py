"""Fill the generated blocks of the pages with the numbers of metrics/: `make docs`.

A block stands between `<!-- results: ... -->` and `<!-- end -->` and is replaced as a whole.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH
from flatmin.common import errors, files

PAGE = Path("README.md")
BLOCK = re.compile(r"(<!-- results: [^>]*-->\n).*?(<!-- end -->)", re.DOTALL)
METHODS = ("finetune", "control", "sam")
MEANINGS = {
    "finetune": "finetune",
    "control": "control: finetune for as many gradient evaluations as sam-finetune took",
    "sam": "sam-finetune",
}


def results(select: Mapping[str, Any], final: Mapping[str, Any], evaluated: Mapping[str, Any]) -> str:
    """The table of the default study's methods, and what SAM gained."""
    names = {"extract": f"extract: frozen {select['backbone']}, linear classifier", **MEANINGS}
    columns = ("", "val accuracy", "test accuracy", "test loss", "the same, calibrated", "train loss", "eigenvalue")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method, name in names.items():
        test, spread = evaluated[method]["test"], evaluated[method].get("test_deviation", {})
        val, val_spread = final[method]["val"], final[method].get("val_deviation", {})
        sharpness = evaluated[method].get("sharpness")
        sharpness_spread = evaluated[method].get("sharpness_deviation", {})
        cells = [_number(val, val_spread, "accuracy", 4)]
        cells += [_number(test, spread, key, 4) for key in ("accuracy", "loss", "calibrated_loss")]
        for key, digits in (("loss", 3), ("eigenvalue_1", 0)):
            cells += [_number(sharpness, sharpness_spread, key, digits) if sharpness else ""]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", *_sentences(final, evaluated)]) + "\n"


def _number(means: Mapping[str, float], deviations: Mapping[str, float], key: str, decimals: int) -> str:
    """A mean and, with several seeds, its standard deviation."""
    deviation = f" ± {deviations[key]:.{decimals}f}" if key in deviations else ""
    return f"{means[key]:.{decimals}f}{deviation}"


def _sentences(final: Mapping[str, Any], evaluated: Mapping[str, Any]) -> list[str]:
    against_control = evaluated["sam_minus_control"]
    seeds = len(against_control["seeds"])
    many = f"Means and standard deviations over {seeds} seeds" if seeds > 1 else "One seed"
    released = final["released"]
    who = f"{released['method']}, seed {released['seed']}" if "seed" in released else released["method"]
    lines = [
        f"{many}, {against_control['images']:,} test images. **SAM minus control, at equal compute: "
        f"{_interval(against_control)}**; SAM minus finetune: {_interval(evaluated['sam_minus_finetune'])}.",
        f"These 95 % intervals are over {against_control['covers']}, for this training set and this start.",
        f"Released, by val alone: {who}, test accuracy {evaluated['final']['test']['accuracy']:.4f}.",
    ]
    if unequal := evaluated["sharpness"]["not_compared"]:
        lines.append(f"Flatness is not compared at equal training loss: {unequal}.")
    return lines


def _interval(found: Mapping[str, float]) -> str:
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['accuracy']:+.2f} points ({low:+.2f} to {high:+.2f})"


def fill(text: str, block: str) -> str:
    """The page with the block in place of what stands between its marks."""
    return BLOCK.sub(lambda found: found[1] + block + found[2], text)


def _main() -> None:
    select, final, evaluated = (files.read_json(f"metrics/{name}.json") for name in ("select", "final", "evaluate"))
    text = fill(PAGE.read_text(encoding="utf-8"), results(select, final, evaluated))
    with files.atomic_write(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    errors.run(_main)
