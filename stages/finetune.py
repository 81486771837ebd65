"""finetune: train the selected classifier's layers from `fine_tune_at` on.

Reads `seed`, `runtime`, `augment`, `finetune` of params.yaml, data/records/ and models/selected/. Writes
models/finetune/, metrics/finetune.json and plots/finetune.csv.
"""

from flatmin.common import params, reporting


def main() -> None:
    # Here, since the processes that augment load this file too and need no TensorFlow.
    with reporting.quiet():
        from flatmin.training import training

    training.finetune(params.load())


if __name__ == "__main__":
    reporting.run(main)
