"""sam-finetune: what finetune does, from the same start and by the same recipe, with sharpness-aware steps.

Reads what finetune reads and `sam` of params.yaml. Writes models/sam/, metrics/sam.json and plots/sam.csv.
"""

from functools import partial
from typing import Any

from flatmin.common import console, stage


def main(declared: stage.Declared) -> Any:
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
        "sam",
        seed=params.seed,
        runtime=params.runtime,
        augment=params.augment,
        recipe=recipe.model_copy(update={"epochs": params.sam.epochs or recipe.epochs}),
        selected="models/select",
        records="data/records",
        outputs=Outputs("models/sam", "metrics/sam.json", "plots/sam.csv"),
        step=StepSettings(
            partial(sam.Step, settings),
            depends_on=params.sam.settings(),
            rooms=("sam",),
            accumulate=settings.accumulate,
            hint=f"a lower rho than {settings.rho:g}",
        ),
    )


if __name__ == "__main__":
    stage.run("sam-finetune", main)
