"""augment-preview: draw training images beside augmented versions of them.

Reads `seed` and `augment` of params.yaml and data/records/. Writes plots/augment_preview.png.
"""

from flatmin.common import params, reporting


def main() -> None:
    settings = params.load()
    with reporting.quiet():
        from flatmin.data import records
        from flatmin.inputs import preview

    found = records.Records("data/records")
    preview.draw(found, settings.augment, settings.seed, "plots/augment_preview.png")
    reporting.log("augment-preview: plots/augment_preview.png")


if __name__ == "__main__":
    reporting.run(main)
