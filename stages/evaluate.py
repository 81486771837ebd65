"""evaluate: score the selected, the fine-tuned and the SAM-fine-tuned classifier on test; predict.

Reads `seed`, `runtime`, `evaluate` of params.yaml, data/records/ and models/. Writes metrics/evaluate.json,
predictions/ and plots/confusion.csv, plots/class_accuracy.csv, plots/sharpness.png.
"""

from flatmin.common import console, stage


def main(declared: stage.Declared) -> None:
    with console.importing_tensorflow():
        from flatmin.evaluation.evaluate import Outputs, evaluate

    params = declared.params
    evaluate(
        seed=params.seed,
        runtime=params.runtime,
        settings=params.evaluate,
        records="data/records",
        models={"extract": "models/select", "finetune": "models/finetune", "sam": "models/sam"},
        outputs=Outputs(
            predictions="predictions",
            metrics="metrics/evaluate.json",
            confusion="plots/confusion.csv",
            class_accuracy="plots/class_accuracy.csv",
            sharpness="plots/sharpness.png",
        ),
    )


if __name__ == "__main__":
    stage.run("evaluate", main)
