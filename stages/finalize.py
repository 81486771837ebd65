"""finalize: release the method that val favours, with its best seed, and fit temperatures on val.

Reads `seeds`, `select.metric` and `finalize` of params.yaml, val's labels, and models and metrics of extract, finetune,
control and sam. Writes models/final/ and metrics/final.json. It reads nothing of test.
"""

from flatmin.common import files, stage
from flatmin.selection.finalize import Candidate, finalize


def main(declared: stage.Declared) -> None:
    params = declared.params
    folders = {
        "finetune": ("models/finetune", "metrics/finetune"),
        "control": ("models/control", "metrics/control"),
        "sam": ("models/sam", "metrics/sam"),
    }
    candidates = {"extract": [Candidate(None, "models/select", "metrics/select.json")]} | {
        method: [Candidate(seed, f"{models}/{seed}", f"{metrics}/{seed}.json") for seed in params.seeds]
        for method, (models, metrics) in folders.items()
    }
    metrics = finalize(
        candidates,
        params.finalize.tolerance,
        params.select.metric,
        val="data/records/val/index.csv",
        released="models/final",
    )
    files.write_json("metrics/final.json", metrics)


if __name__ == "__main__":
    stage.run("finalize", main)
