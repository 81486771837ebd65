"""extract-train: train a classifier behind a frozen backbone. Argument: the backbone.

Reads `runtime`, `augment`, `extract`, `select.metric` of params.yaml and data/records/. Writes
models/extract/{backbone}/, metrics/extract/{backbone}.json and plots/extract/{backbone}.csv.
"""

import sys
from typing import Any

from flatmin.common import console, stage


def main(declared: stage.Declared, backbone: str = "") -> Any:
    """Returns the resume state, which is removed when nothing has changed meanwhile."""
    # Imported here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        from flatmin.training.stages import Outputs, extract

    params = declared.params
    return extract(
        backbone,
        runtime=params.runtime,
        augment=params.augment,
        recipe=params.extract,
        metric=params.select.metric,
        records="data/records",
        outputs=Outputs(
            f"models/extract/{backbone}", f"metrics/extract/{backbone}.json", f"plots/extract/{backbone}.csv"
        ),
    )


if __name__ == "__main__":
    stage.run("extract-train", main, *sys.argv[1:])
