"""sam-finetune: what finetune does, from the same start and by the same recipe, with sharpness-aware steps.

Reads what finetune reads and `sam` of params.yaml. Writes models/sam/, metrics/sam.json and plots/sam.csv.
"""

from flatmin.common import console, errors, params


def main() -> None:
    # Here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        from flatmin.training import stages

    settings = params.load()
    stages.finetune(settings, settings.sam)


if __name__ == "__main__":
    errors.run(main)
