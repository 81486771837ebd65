"""evaluate: score the selected, the fine-tuned and the SAM-fine-tuned classifier on test; predict.

Reads `seed`, `runtime`, `evaluate` of params.yaml, data/records/ and models/. Writes metrics/evaluate.json,
predictions/ and plots/confusion.csv, plots/class_accuracy.csv, plots/sharpness.png.
"""

from flatmin.common import console, errors, params


def main() -> None:
    with console.importing_tensorflow():
        from flatmin.evaluation import evaluate

    evaluate.evaluate(params.load())


if __name__ == "__main__":
    errors.run(main)
