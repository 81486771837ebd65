"""Reads PyTorch state dicts in the format before version 1.6 (not zip), without PyTorch and without running pickles.

Such a file is five pickles (a magic number, a protocol version, facts about the machine that wrote it, the state dict,
the order of the storages) and then, for each storage, its number of elements and their bytes. A pickle can call any
function, so the unpickler here knows only three kinds of names: `collections.OrderedDict`,
`torch._utils._rebuild_tensor_v2` and the types of storages. For the last two it has stand-ins that only record their
arguments.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatmin.common.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_DTYPES = {
    "BoolStorage": "?",
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
}


def read(path: str | Path) -> dict[str, Array]:
    """Read a state dict: tensors by name, nothing else. Nothing in the file is ever called.

    Args:
        path: a file that `torch.save(model.state_dict(), path)` wrote before PyTorch 1.6, or later with
            `_use_new_zipfile_serialization=False`, on a little-endian machine.

    Returns:
        The tensors in the file's order, each a contiguous array of its own with the tensor's shape and dtype (bool,
        uint8, int8 to int64, float16 to float64). Strides are honoured: a tensor that is transposed in the file comes
        out as PyTorch would show it.

    Raises:
        InputError: the file can't be read, has another format, is truncated, or names anything but plain tensors.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, received {error.strerror}") from error
    try:
        return _read(content)
    except _FormatError as error:
        raise InputError(" ".join(f"{path}: {error}".split())) from error
    except Exception as error:  # a damaged pickle can raise any exception, however limited the unpickler is
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{path}: expected a PyTorch state dict of the format before 1.6, received {problem}"
        ) from error


class _FormatError(Exception):
    """Says what was expected and what was received; `read` adds the file's name."""


@dataclass(frozen=True, slots=True)
class _StorageType:
    """Stand-in for `torch.FloatStorage` and the like. Not callable, and frozen so that no BUILD opcode can alter it."""

    dtype: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage to which the pickle refers: its key, its NumPy dtype and its number of elements."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor's place in its storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _RebuildTensor:
    """Stand-in for `torch._utils._rebuild_tensor_v2`; frozen, like the types of storages."""

    def __call__(self, storage: Any, offset: Any, size: Any, strides: Any, *others: Any) -> _Tensor:
        del others  # requires_grad, backward hooks and metadata, which a reader of values does not need
        if not isinstance(storage, _Storage):
            raise _FormatError(f"expected a tensor over a storage, received one over {type(storage).__name__}")
        for name, value in (("size", size), ("stride", strides)):
            if not isinstance(value, tuple) or not all(_is_count(item) for item in value):
                raise _FormatError(f"expected a tensor's {name} in whole numbers from 0, received {value!r}"[:300])
        if not _is_count(offset) or len(size) != len(strides):
            raise _FormatError(
                f"expected an offset and a stride per size, received {offset!r}, {strides!r}, {size!r}"[:300]
            )
        return _Tensor(storage, offset, size, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


class _Unpickler(pickle.Unpickler):
    """Resolves the three kinds of names that a state dict needs, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        raise _FormatError(f"expected only tensors, received a pickle that names {module}.{name}"[:300])

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), str(), elements, None) if _is_count(elements):
                return _Storage(key, dtype, elements)
        raise _FormatError(f"expected a reference to a storage, received {pid!r}"[:300])


class _PlainUnpickler(pickle.Unpickler):
    """Reads the pickles around the state dict: numbers, strings, lists and dicts."""

    def find_class(self, module: str, name: str) -> Any:
        raise _FormatError(f"expected plain values, received a pickle that names {module}.{name}"[:300])


def _read(content: bytes) -> dict[str, Array]:
    if content.startswith(b"PK\x03\x04"):
        raise _FormatError(
            "expected the torch format before 1.6, received the zip format "
            "(save with _use_new_zipfile_serialization=False)"
        )
    stream = io.BytesIO(content)
    magic = _PlainUnpickler(stream).load()
    if magic != _MAGIC_NUMBER:
        raise _FormatError(f"expected torch's magic number {_MAGIC_NUMBER:#x}, received {magic!r}"[:300])
    protocol = _PlainUnpickler(stream).load()
    if protocol != _PROTOCOL_VERSION:
        raise _FormatError(f"expected torch's protocol {_PROTOCOL_VERSION}, received {protocol!r}"[:300])
    machine = _PlainUnpickler(stream).load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _FormatError(f"expected a file from a little-endian machine, received {machine!r}"[:300])
    tensors = _Unpickler(stream).load()
    if not isinstance(tensors, dict):
        raise _FormatError(f"expected a state dict, received {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise _FormatError(f"expected tensors by name, received {name!r}: {type(tensor).__name__}"[:300])
    storages = _read_storages(stream, {t.storage.key: t.storage for t in tensors.values()})
    return {name: _view(name, tensor, storages) for name, tensor in tensors.items()}


def _read_storages(stream: io.BytesIO, by_key: dict[str, _Storage]) -> dict[str, Array]:
    keys = _PlainUnpickler(stream).load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(by_key):
        raise _FormatError("expected each tensor's storage once in the list of storages, received another list")
    content = stream.getbuffer()
    position = stream.tell()
    storages = {}
    for key in keys:
        storage = by_key[key]
        elements = int.from_bytes(content[position : position + 8], "little", signed=True)
        start = position + 8
        position = start + storage.elements * np.dtype(storage.dtype).itemsize
        if position > len(content):
            raise _FormatError(f"expected {position} bytes or more, received {len(content)}: the file is truncated")
        if elements != storage.elements:
            raise _FormatError(f"expected {storage.elements} elements in storage {key}, received {elements}")
        storages[key] = np.frombuffer(content[start:position], storage.dtype)
    if position != len(content):
        raise _FormatError(f"expected the file to end after {position} bytes, received {len(content)} bytes")
    return storages


def _view(name: str, tensor: _Tensor, storages: dict[str, Array]) -> Array:
    values = storages[tensor.storage.key]
    if values.dtype != np.dtype(tensor.storage.dtype):
        raise _FormatError(f"{name}: expected its storage to have one type, received two")
    count = math.prod(tensor.size)
    if count == 0:
        return np.zeros(tensor.size, values.dtype)
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.strides, strict=True))
    # The second condition limits the size of the copy: a stride of 0 makes a tensor of any size from one element.
    if last >= len(values) or count > len(values):
        raise _FormatError(
            f"{name}: expected a tensor inside its storage of {len(values)} elements, received "
            f"size {tensor.size}, strides {tensor.strides}, offset {tensor.offset}"
        )
    strides = tuple(stride * values.itemsize for stride in tensor.strides)
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.size, strides, writeable=False)
    return np.array(view, order="C")
