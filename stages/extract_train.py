"""extract-train: a classifier behind a frozen backbone. Argument: the backbone.

Reads `seed`, `runtime`, `augment`, `extract` of params.yaml and data/records/. Writes models/extract/{backbone}/,
metrics/extract/{backbone}.json and plots/extract/{backbone}.csv.
"""

import sys

from flatmin.common import console, errors, params


def main(backbone: str = "") -> None:
    # Here, since the processes that augment load this file too and need no TensorFlow.
    with console.importing_tensorflow():
        from flatmin.training import stages

    stages.extract(params.load(), backbone)


if __name__ == "__main__":
    errors.run(main, *sys.argv[1:])
