"""finetune: train the selected classifier's layers from `fine_tune_at` on.

Reads `seed`, `runtime`, `augment`, `finetune` of params.yaml, data/records/ and models/select/. Writes
models/finetune/, metrics/finetune.json and plots/finetune.csv.
"""

from flatmin.common import console, errors, params


def main() -> None:
    # Here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        from flatmin.training import stages

    stages.finetune(params.load())


if __name__ == "__main__":
    errors.run(main)
