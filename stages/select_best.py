"""select-best: take the cheapest backbone that is near the best on val.

Reads `backbones` and `select` of params.yaml, models/extract/ and metrics/extract/ of the backbones listed. Writes
models/select/ and metrics/select.json.
"""

from flatmin import selection
from flatmin.common import console, errors, files, params


def main() -> None:
    settings = params.load()
    metrics = selection.select(settings.backbones, settings.select.tolerance)
    files.write_json("metrics/select.json", metrics)
    console.log(f"select-best: {metrics['backbone']}, val accuracy {metrics['val']['accuracy']:.4f}")


if __name__ == "__main__":
    errors.run(main)
