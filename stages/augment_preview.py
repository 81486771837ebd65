"""augment-preview: draw training images alongside augmented versions of them.

Reads `augment` of params.yaml and data/records/. Writes plots/augment.png.
"""

from flatmin.common import console, stage


def main(declared: stage.Declared) -> None:
    with console.importing_tensorflow():
        from flatmin.inputs import preview, records

    params = declared.params
    preview.draw(records.Records("data/records"), params.augment, "plots/augment.png")
    console.log("augment-preview: plots/augment.png")


if __name__ == "__main__":
    stage.run("augment-preview", main)
