"""select-best: choose the cheapest backbone that is near the best on val.

Reads `backbones` and `select` of params.yaml, models/extract/ and metrics/extract/ of the backbones listed. Writes
models/select/ and metrics/select.json.
"""

from flatmin.common import console, files, stage
from flatmin.selection import backbone


def main(declared: stage.Declared) -> None:
    params = declared.params
    metrics = backbone.select(
        params.backbones,
        params.select,
        models="models/extract",
        metrics="metrics/extract",
        selected="models/select",
    )
    files.write_json("metrics/select.json", metrics)
    console.log(f"select-best: {metrics['backbone']}, val accuracy {metrics['val']['accuracy']:.4f}")


if __name__ == "__main__":
    stage.run("select-best", main)
