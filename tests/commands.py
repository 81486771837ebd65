"""Runs `flatmin` as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from repository import ROOT


def flatmin(
    *arguments: str | Path, cwd: Path | str = ".", given: bytes = b"", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of `flatmin` in a process of its own.

    Args:
        given: its standard input. variables: more environment.
    """
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "flatmin.cli", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | variables,
        input=given,
        capture_output=True,
        check=False,
    )
    texts = (text.decode(errors="surrogateescape") for text in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(done.args, done.returncode, *texts)
