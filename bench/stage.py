"""Flatmin's side of the bench: run a training stage in the working directory, as the scripts in stages/ do.

    python bench/stage.py extract BACKBONE
    python bench/stage.py finetune

It prints `ready` between importing and the stage's work, so that the two can be told apart.
"""

import sys

from flatmin.common import console, errors, params


def main(stage: str, *backbone: str) -> None:
    # Imported here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        from flatmin.training.stages import Outputs, extract, finetune

    settings = params.load()
    shared = {"runtime": settings.runtime, "augment": settings.augment, "records": "data/records"}
    name = "/".join([stage, *backbone])
    outputs = Outputs(f"models/{name}", f"metrics/{name}.json", f"plots/{name}.csv")
    print("ready", flush=True)
    if stage == "extract":
        state = extract(*backbone, recipe=settings.extract, outputs=outputs, **shared)
    else:
        start = {"seed": settings.seeds[0], "selected": "models/select"}
        state = finetune(stage, recipe=settings.finetune, outputs=outputs, **start, **shared)
    state.remove()


if __name__ == "__main__":
    errors.run(main, *sys.argv[1:])
