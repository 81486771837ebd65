"""prepare: read the source of `data`, check every image, write records.

Reads `seed` and `data` of params.yaml. Writes data/records/ and metrics/prepare.json.
"""

from flatmin.common import console, files, stage


def main(declared: stage.Declared) -> None:
    with console.importing_tensorflow():
        from flatmin.data import writer

    metrics = writer.write(declared.params.data, declared.params.seed, "data/records")
    files.write_json("metrics/prepare.json", metrics)
    roles = ", ".join(f"{role} {described['count']}" for role, described in metrics["roles"].items())
    console.log(f"prepare: {roles}; {metrics['classes']} classes")


if __name__ == "__main__":
    stage.run("prepare", main)
