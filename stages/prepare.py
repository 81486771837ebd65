"""prepare: read the source of `data`, check every image, write records.

Reads `data`, `backbones` and their image sizes in params.yaml. Writes data/records/ and metrics/prepare.json.
"""

from flatmin import power
from flatmin.common import console, files, stage
from flatmin.common.params import largest_image_size


def main(declared: stage.Declared) -> None:
    with console.importing_tensorflow():
        from flatmin.data import writer

    params = declared.params
    largest = largest_image_size(params.backbones, params.extract.image_size, params.finetune.image_size)
    metrics = writer.write(params.data, "data/records", largest)
    counts = {role: described["count"] for role, described in metrics["roles"].items()}
    scored = {role: counts[role] for role in ("test", "val")}
    found = {role: power.smallest_difference(count) for role, count in scored.items()}
    metrics["smallest_difference"] = {role: value for role, value in found.items() if value is not None}
    files.write_json("metrics/prepare.json", metrics)
    roles = ", ".join(f"{role} {count}" for role, count in counts.items())
    console.log(f"prepare: {roles}; {metrics['classes']} classes")
    console.log(f"prepare: {power.describe(scored)}")


if __name__ == "__main__":
    stage.run("prepare", main)
