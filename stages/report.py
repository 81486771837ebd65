"""report: one HTML file of the whole study.

Reads all of params.yaml, metrics/, plots/, audit/, evaluation/, data/records/dataset.json, and dvc.lock, whose entries
of the earlier stages are complete by then. Writes report/index.html.
"""

from pathlib import Path

from flatmin.common import console, stage
from flatmin.report import page, words
from flatmin.report.study import Inputs, Study


def main(declared: stage.Declared) -> None:
    inputs = Inputs(
        dataset="data/records/dataset.json",
        prepare="metrics/prepare.json",
        select="metrics/select.json",
        audit="metrics/audit.json",
        final="metrics/final.json",
        evaluate="metrics/evaluate.json",
        trainings={
            "extract": "metrics/extract",
            "finetune": "metrics/finetune",
            "control": "metrics/control",
            "sam": "metrics/sam",
        },
        curves={
            "extract": "plots/extract",
            "finetune": "plots/finetune",
            "control": "plots/control",
            "sam": "plots/sam",
        },
        augment="plots/augment.png",
        confusion="plots/confusion.csv",
        audited="audit",
        evaluation="evaluation",
        lock="dvc.lock",
    )
    path = Path("report", "index.html")
    verdict = page.write(Study(declared.params, inputs), path)
    console.log(f"report: {words.plain(verdict)}")
    console.log(f"report: {path.absolute()}")


if __name__ == "__main__":
    stage.run("report", main)
