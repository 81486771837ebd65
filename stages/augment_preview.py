"""augment-preview: draw training images beside augmented versions of them.

Reads `seed` and `augment` of params.yaml and data/records/. Writes plots/augment.png.
"""

from flatmin.common import console, errors, params


def main() -> None:
    settings = params.load()
    with console.importing_tensorflow():
        from flatmin.inputs import preview, records

    found = records.Records("data/records")
    preview.draw(found, settings.augment, settings.seed, "plots/augment.png")
    console.log("augment-preview: plots/augment.png")


if __name__ == "__main__":
    errors.run(main)
