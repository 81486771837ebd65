"""evaluate: score every method's classifiers and the released one on test, compare the methods, predict.

Reads `seeds`, `runtime`, `evaluate` of params.yaml, data/records/, audit/, metrics/final.json and models/. Writes
metrics/evaluate.json, predictions/, evaluation/ (what the report shows of the images), and plots/confusion.csv,
plots/class_accuracy.csv, plots/sharpness.png.
"""

from flatmin.common import console, stage


def main(declared: stage.Declared) -> None:
    with console.importing_tensorflow():
        from flatmin.evaluation.evaluate import Models, Outputs, evaluate

    params = declared.params
    folders = {"finetune": "models/finetune", "control": "models/control", "sam": "models/sam"}
    evaluate(
        runtime=params.runtime,
        settings=params.evaluate,
        records="data/records",
        audit="audit",
        models=Models(
            extract="models/select",
            seeded={method: {seed: f"{models}/{seed}" for seed in params.seeds} for method, models in folders.items()},
            final="models/final",
            finalized="metrics/final.json",
        ),
        outputs=Outputs(
            predictions="predictions",
            evaluation="evaluation",
            metrics="metrics/evaluate.json",
            confusion="plots/confusion.csv",
            class_accuracy="plots/class_accuracy.csv",
            sharpness="plots/sharpness.png",
        ),
    )


if __name__ == "__main__":
    stage.run("evaluate", main)
