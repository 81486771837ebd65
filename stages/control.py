"""control: what finetune does, for as many gradient evaluations as sam-finetune took. Argument: the seed.

Reads `runtime`, `augment`, `finetune`, `select.metric` of params.yaml, data/records/, models/select/ and
models/budget/{seed}.json. Writes models/control/{seed}/, metrics/control/{seed}.json and plots/control/{seed}.csv.
"""

import sys
from typing import Any

from flatmin.common import console, stage


def main(declared: stage.Declared, seed: str = "") -> Any:
    """Returns the resume state, which is removed when nothing has changed meanwhile."""
    # Imported here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        from flatmin.training.schedule import Budget
        from flatmin.training.stages import Outputs, finetune

    params = declared.params
    return finetune(
        f"control@{seed}",
        seed=int(seed),
        runtime=params.runtime,
        augment=params.augment,
        recipe=params.finetune,
        metric=params.select.metric,
        selected="models/select",
        records="data/records",
        outputs=Outputs(f"models/control/{seed}", f"metrics/control/{seed}.json", f"plots/control/{seed}.csv"),
        budget=Budget.read(f"models/budget/{seed}.json"),
    )


if __name__ == "__main__":
    stage.run("control", main, *sys.argv[1:])
