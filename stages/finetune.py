"""finetune: train the selected classifier's layers from `fine_tune_at` on.

Reads `seed`, `runtime`, `augment`, `finetune` of params.yaml, data/records/ and models/select/. Writes
models/finetune/, metrics/finetune.json and plots/finetune.csv.
"""

from typing import Any

from flatmin.common import console, stage


def main(declared: stage.Declared) -> Any:
    """Returns the resume state, which is removed when nothing has changed meanwhile."""
    # Imported here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        from flatmin.training.stages import Outputs, finetune

    params = declared.params
    return finetune(
        "finetune",
        seed=params.seed,
        runtime=params.runtime,
        augment=params.augment,
        recipe=params.finetune,
        selected="models/select",
        records="data/records",
        outputs=Outputs("models/finetune", "metrics/finetune.json", "plots/finetune.csv"),
    )


if __name__ == "__main__":
    stage.run("finetune", main)
