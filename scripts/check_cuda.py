"""Show that the loader finds every NVIDIA library that TensorFlow asks for, and every one that those need.

    python scripts/check_cuda.py

Runs in the image of the gpu lock, or in any environment with that lock, and needs no GPU. Nothing here knows what a
library is called. TensorFlow's own functions that open libraries are called, each in a new process, and what the loader
says under LD_DEBUG is read; then the loader lists what each library among NVIDIA's wheels needs, as ldd does.
"""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

LOADER = "/lib64/ld-linux-x86-64.so.2"
FROM_DRIVER = ("libcuda.so", "libnvidia-")  # of the host; the NVIDIA container toolkit mounts them
OPTIONAL = ("libnvinfer", "libnvshmem")  # TensorRT, NVSHMEM: not among what tensorflow[and-cuda] installs

# DsoLoader's functions take no argument; the buffer takes the StatusOr that they return. The process ends
# without what libraries do at its end, so that its exit code tells of the function.
OPEN = """
import ctypes, os, sys
library = ctypes.CDLL(sys.argv[1])
function = library[sys.argv[2]]
function.restype = None
function(ctypes.create_string_buffer(64))
os._exit(0)
"""


def opened(library: Path, function: str) -> dict[str, str | None]:
    """The libraries that the loader was asked for when the function was called, and where it found each."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, library, function],
        env={**os.environ, "LD_DEBUG": "files,libs"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"error: {function}: expected exit code 0, received {done.returncode}")
    asked = re.findall(r"file=(\S+) \[0\];  (?:needed|dynamically loaded) by", done.stderr)
    loaded = {Path(path).name: path for path in re.findall(r"calling init: (\S+)", done.stderr)}
    return {Path(name).name: loaded.get(Path(name).name) for name in asked}


def needed(library: Path) -> dict[str, str | None]:
    """The libraries that a library needs, and those that these need, and where the loader finds each."""
    environment = {**os.environ, "LD_TRACE_LOADED_OBJECTS": "1"}  # unlike --list it continues after one that is missing
    done = subprocess.run([LOADER, library], env=environment, capture_output=True, text=True, check=True)
    rows = re.findall(r"^\s*(\S+) => (?:(/\S+) \(0x|not found)", done.stdout, re.MULTILINE)
    return {name: path or None for name, path in rows}


def tensorflow_openers(library: Path) -> list[str]:
    """The names of TensorFlow's functions that open a library of NVIDIA's (others open AMD's)."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.findall(rb"\0(_ZN3tsl8internal9DsoLoader\d+Get(?!Hip|Miopen|Roc)\w+DsoHandleEv)(?=\0)", data)
    return sorted({name.decode() for name in found})


def nvidia(found: dict[str, str | None]) -> dict[str, str | None]:
    """NVIDIA's part of it, by name."""
    return {name: path for name, path in found.items() if re.match(r"lib(cu(?!rl)|nv|nccl)", name)}


def main() -> int:
    spec = find_spec("tensorflow")
    if spec is None or spec.origin is None:
        print("error: no TensorFlow here")
        return 1
    packages = Path(spec.origin).parents[1]
    framework = packages / "tensorflow/libtensorflow_framework.so.2"
    openers = tensorflow_openers(framework)
    wheels = sorted(packages.glob("nvidia/*/lib/*.so*"))
    wanted = [("TensorFlow", nvidia(opened(framework, opener))) for opener in openers]
    wanted += [(wheel.name, nvidia(needed(wheel))) for wheel in wheels]
    tools = [packages / "nvidia/cuda_nvcc" / name for name in ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc")]
    wanted.append(("XLA", {tool.name: str(tool) if tool.exists() else None for tool in tools}))

    # A library counts as found when each that asks for it finds it.
    where: dict[str, str | None] = {}
    who: dict[str, list[str]] = {}
    for asker, found in wanted:
        for name, path in found.items():
            who.setdefault(name, []).append(asker)
            where[name] = path and where.get(name, path)
    missing = []
    for name, path in sorted(where.items()):
        if path is not None:
            state = os.path.relpath(os.path.realpath(path), packages)
        elif name.startswith(FROM_DRIVER):
            state = "not here: the driver's"
        elif name.startswith(OPTIONAL):
            state = "not here: optional, not in the lock"
        else:
            state = "MISSING"
            missing.append(name)
        print(f"{name:22} {state:45} asked for by {who[name][0]}")
    print(
        f"asked for by {len(openers)} functions of TensorFlow's and {len(wheels)} libraries in NVIDIA's wheels: "
        f"{len(where)} files, {len(missing)} missing"
    )
    if not openers or not wheels:
        sys.exit("error: expected functions of TensorFlow's and libraries in NVIDIA's wheels, found none of either")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
