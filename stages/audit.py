"""audit: near duplicates within and across roles, and labels that may be wrong, by the selected backbone's activations.

Reads `runtime` and `audit` of params.yaml, data/records/ and models/select/. Writes metrics/audit.json and audit/.
It reads test's pictures and labels, and scores nothing on them; no training and no choice depends on it.
"""

from flatmin.common import console, stage


def main(declared: stage.Declared) -> None:
    with console.importing_tensorflow():
        from flatmin.audit.audit import audit

    params = declared.params
    audit(
        runtime=params.runtime,
        settings=params.audit,
        records="data/records",
        model="models/select",
        metrics="metrics/audit.json",
        outputs="audit",
    )


if __name__ == "__main__":
    stage.run("audit", main)
