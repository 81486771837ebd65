"""finetune: train the selected classifier's layers from `fine_tune_at` on. Argument: the seed.

Reads `runtime`, `augment`, `finetune`, `select.metric` of params.yaml, data/records/ and models/select/. Writes
models/finetune/{seed}/, metrics/finetune/{seed}.json and plots/finetune/{seed}.csv.
"""

import sys
from typing import Any

from flatmin.common import console, stage


def main(declared: stage.Declared, seed: str = "") -> Any:
    """Returns the resume state, which is removed when nothing has changed meanwhile."""
    # Imported here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        from flatmin.training.stages import Outputs, finetune

    params = declared.params
    return finetune(
        f"finetune@{seed}",
        seed=int(seed),
        runtime=params.runtime,
        augment=params.augment,
        recipe=params.finetune,
        metric=params.select.metric,
        selected="models/select",
        records="data/records",
        outputs=Outputs(f"models/finetune/{seed}", f"metrics/finetune/{seed}.json", f"plots/finetune/{seed}.csv"),
    )


if __name__ == "__main__":
    stage.run("finetune", main, *sys.argv[1:])
