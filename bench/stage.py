"""Flatmin's side of the bench: run a training stage in the working directory, as the files in stages/ do.

    python bench/stage.py extract BACKBONE
    python bench/stage.py finetune

It prints `ready` between importing and the stage's work, so that the two can be told apart.
"""

import sys

from flatmin.common import console, errors, params


def main(stage: str, *backbone: str) -> None:
    # Here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        pass

    print("ready", flush=True)
    getattr(training, stage)(params.load(), *backbone)


if __name__ == "__main__":
    errors.run(main, *sys.argv[1:])
