"""extract-train: a classifier behind a frozen backbone. Argument: the backbone.

Reads `seed`, `runtime`, `augment`, `extract` of params.yaml and data/records/. Writes models/extract/{backbone}/,
metrics/extract/{backbone}.json and plots/extract/{backbone}.csv.
"""

import sys

from flatmin.common import params, reporting


def main(backbone: str = "") -> None:
    # Here, since the processes that augment load this file too and need no TensorFlow.
    with reporting.quiet():
        from flatmin.training import training

    training.extract(params.load(), backbone)


if __name__ == "__main__":
    reporting.run(main, *sys.argv[1:])
