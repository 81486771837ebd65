"""sam-finetune: what finetune does, from the same start and by the same recipe, with sharpness-aware steps.

Argument: the seed. Reads what finetune reads and `sam` of params.yaml. Writes models/sam/{seed}/,
metrics/sam/{seed}.json, plots/sam/{seed}.csv and, for control, models/budget/{seed}.json.
"""

import sys
from functools import partial
from typing import Any

from flatmin.common import console, stage


def main(declared: stage.Declared, seed: str = "") -> Any:
    """Returns the resume state, which is removed when nothing has changed meanwhile."""
    # Imported here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        from flatmin import sam
        from flatmin.training.stages import Outputs, finetune
        from flatmin.training.step import StepSettings

    params = declared.params
    settings = sam.Settings(**params.sam.settings())
    recipe = params.finetune
    return finetune(
        f"sam-finetune@{seed}",
        seed=int(seed),
        runtime=params.runtime,
        augment=params.augment,
        recipe=recipe.model_copy(update={"epochs": params.sam.epochs or recipe.epochs}),
        metric=params.select.metric,
        selected="models/select",
        records="data/records",
        outputs=Outputs(
            f"models/sam/{seed}", f"metrics/sam/{seed}.json", f"plots/sam/{seed}.csv", f"models/budget/{seed}.json"
        ),
        step=StepSettings(
            partial(sam.Step, settings),
            depends_on=params.sam.settings(),
            rooms=("sam",),
            accumulate=settings.accumulate,
            hint=f"a lower rho than {settings.rho:g}",
        ),
    )


if __name__ == "__main__":
    stage.run("sam-finetune", main, *sys.argv[1:])
