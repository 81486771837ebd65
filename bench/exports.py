"""Export the released model of the study that was run here in every format: the proofs, bench/exports.json.

`make exports` runs it, `make docs` shows them in docs/export.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # for a shell without PYTHONPATH
from flatmin.common import errors, files
from flatmin.common.params_errors import read_yaml
from flatmin.models import classifier
from flatmin.use import export, formats

MODEL, RESULTS = Path("models/final"), Path("bench/exports.json")


def main() -> None:
    proofs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in formats.FORMATS:
            out = Path(folder, name)
            command = ["export", "--format", name, "--model", str(MODEL), "--out", str(out)]
            subprocess.run([sys.executable, "-m", "flatmin.cli", *command], check=True)
            proofs[name] = files.read_json(out / export.PARITY)
    description = classifier.describe(MODEL)
    (digest,) = (out["md5"] for out in read_yaml("dvc.lock")["stages"]["finalize"]["outs"] if out["path"] == str(MODEL))
    model = {"backbone": description.backbone, "image_size": description.image_size, "md5": digest}
    files.write_json(RESULTS, {"model": model, "formats": proofs})


if __name__ == "__main__":
    errors.run(main)
