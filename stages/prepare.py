"""prepare: read the source of `data`, check every image, write records.

Reads `seed` and `data` of params.yaml. Writes data/records/ and metrics/prepare.json.
"""

from flatmin.common import params, reporting


def main() -> None:
    settings = params.load()
    with reporting.quiet():
        from flatmin.data import records

    metrics = records.write(settings.data, settings.seed, "data/records")
    reporting.write_json("metrics/prepare.json", metrics)
    roles = ", ".join(f"{role} {found['count']}" for role, found in metrics["roles"].items())
    reporting.log(f"prepare: {roles}; {metrics['classes']} classes")


if __name__ == "__main__":
    reporting.run(main)
