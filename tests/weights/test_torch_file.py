"""State dicts of PyTorch, read without it: real files, and files that nobody should trust."""

import io
import os
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.weights.torch_file import read_state_dict

FOLDER = pathlib.Path(__file__).parents[1] / "official"


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of tests/official/README.md."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return rng.standard_normal(shape).astype(np.float32)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("side", "count"), [("c", 3), ("s", 61)])
def test_a_real_state_dict_is_read_bit_for_bit(side: str, count: int) -> None:
    state = read_state_dict(FOLDER / f"checkpoint_{side}_best.tar")
    assert len(state) == count
    for name, value in state.items():
        same(value, drawn(f"{side}.{name}", value.shape))
    if side == "s":
        assert state["2.shortcut.0.weight"].shape == (8, 4, 1, 1)
        assert list(state)[-1] == "9.2.bias"


def test_every_kind_of_tensor_is_read_bit_for_bit() -> None:
    state = read_state_dict(FOLDER / "odd.pt")
    base = drawn("base", (6, 5))
    expected: dict[str, np.ndarray] = {
        "half": drawn("half", (3, 2)).astype(np.float16),
        "double": drawn("double", (2,)).astype(np.float64),
        "long": np.arange(-2, 3),
        "scalar": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
        "base": base,
        "transposed": base.T,
        "sliced": base[1::2, 1:4],
    }
    assert list(state) == list(expected)
    for name, value in expected.items():
        same(state[name], value)
        assert not state[name].flags.writeable or value.size == 0


def refused(path: pathlib.Path) -> str:
    """The one line with which the file is refused."""
    with pytest.raises(UserError) as error:
        read_state_dict(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600
    return message.removeprefix(f"{path}: ")


def test_the_format_before_torch_1_6_is_refused() -> None:
    assert "save it with torch >= 1.6" in refused(FOLDER / "legacy.pt")


def test_a_kind_without_numpy_is_refused() -> None:
    assert "torch.BFloat16Storage" in refused(FOLDER / "bfloat16.pt")


def test_no_file_another_file_and_a_truncated_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state.tar"
    assert refused(path) == "no such file"
    path.write_bytes(b"")
    assert "not a file of torch.save" in refused(path)
    whole = (FOLDER / "odd.pt").read_bytes()
    for length in (3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)


def test_an_archive_of_several_disks_is_refused(tmp_path: pathlib.Path) -> None:
    """zipfile does not only say that it is none."""
    locator, end = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 2), b"PK\5\6" + bytes(18)
    (tmp_path / "disks.pt").write_bytes(locator + end)
    with pytest.raises(UserError, match=r"disks\.pt: not a file of torch\.save"):
        read_state_dict(tmp_path / "disks.pt")


def test_a_flipped_bit_is_refused_or_read_as_it_is(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state.tar"
    whole = (FOLDER / "odd.pt").read_bytes()
    refusals = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            read_state_dict(path)
        except UserError:
            refusals += 1
    assert refusals > len(whole) // 7 // 3


def archive(
    path: pathlib.Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)
    return path


class Named:
    """Pickled as the global of this name."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]


class Pickler(PythonPickler):
    """Writes names that are not there, too."""

    def save_named(self, named: Named) -> None:
        self.write(pickle.GLOBAL + f"{named.module}\n{named.name}\n".encode())

    def persistent_id(self, obj: object) -> object:
        return obj.pid if isinstance(obj, Reference) else None

    dispatch = {**PythonPickler.dispatch, Named: save_named}  # noqa: RUF012


class Reference:
    def __init__(self, *pid: object) -> None:
        self.pid = pid


class Call:
    """Pickled as a call of a global."""

    def __init__(self, module: str, name: str, *args: object) -> None:
        self.named, self.args = Named(module, name), args


def save_call(pickler: Pickler, call: Call) -> None:
    pickler.save(call.named)
    pickler.save(call.args)
    pickler.write(pickle.REDUCE)


Pickler.dispatch[Call] = save_call


def dumps(content: object) -> bytes:
    file = io.BytesIO()
    Pickler(file, 2).dump(content)
    return file.getvalue()


FLOATS = Named("torch", "FloatStorage")
BYTES = np.arange(6, dtype=np.float32).tobytes()


def tensor(
    *,
    key: object = "0",
    numel: object = 6,
    offset: object = 0,
    shape: object = (2, 3),
    strides: object = (3, 1),
) -> Call:
    storage = Reference("storage", FLOATS, key, "cpu", numel)
    hooks = Call("collections", "OrderedDict")
    return Call("torch._utils", "_rebuild_tensor_v2", storage, offset, shape, strides, False, hooks)


def write(path: pathlib.Path, content: object, **members: bytes) -> pathlib.Path:
    return archive(path, {"data.pkl": dumps(content), "data/0": BYTES, **members})


def test_the_writer_of_these_tests_is_understood(tmp_path: pathlib.Path) -> None:
    state = read_state_dict(write(tmp_path / "a", {"w": tensor(), "t": tensor(shape=(3, 2), strides=(1, 3))}))
    np.testing.assert_array_equal(state["w"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(state["t"], np.arange(6).reshape(2, 3).T)


def test_a_wrapped_state_dict_of_a_parallel_network(tmp_path: pathlib.Path) -> None:
    expected = np.arange(6).reshape(2, 3)
    names = {"module.a.weight": tensor(), "module.module.b": tensor()}
    rest = {
        "epoch": 3,
        "best": 0.25,
        "optimizer": {"state": {0: {"buffer": tensor()}}, "groups": [{"lr": 0.1}]},
    }
    for content in (names, {"state_dict": names}, {**rest, "state_dict": names}):
        state = read_state_dict(write(tmp_path / "a", content))
        assert list(state) == ["a.weight", "module.b"]
        for value in state.values():
            np.testing.assert_array_equal(value, expected)
    state = read_state_dict(write(tmp_path / "a", {**names, "other": tensor()}))
    assert list(state) == ["module.a.weight", "module.module.b", "other"]


def test_a_pickle_runs_nothing(tmp_path: pathlib.Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Callable, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    for content in (Malicious(), {"w": Malicious()}):
        message = refused(archive(tmp_path / "a", {"data.pkl": pickle.dumps(content, 2), "data/0": BYTES}))
        assert "system, which is not allowed" in message
    for name in ("builtins eval", "torch load", "numpy load", "mocosfl_jax.torch_file _member"):
        module, function = name.split()
        assert f"{module}.{function}" in refused(write(tmp_path / "a", {"w": Call(module, function, "1")}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"w": tensor(numel=7)}, "has 24 bytes, its tensors need 28"),
        ({"w": tensor(numel=5)}, "has 24 bytes, its tensors need 20"),
        ({"w": tensor(numel=-1)}, "unknown kind, name or size"),
        ({"w": tensor(), "v": tensor(numel=5)}, "with 5 float32 and with 6 float32"),
        ({"w": tensor(key="1")}, "no member archive/data/1"),
        ({"w": tensor(key="../data.pkl")}, "no member"),
        ({"w": tensor(offset=1)}, "in a storage of 6"),
        ({"w": tensor(offset=-1)}, "something other than a storage"),
        ({"w": tensor(strides=(3, 2))}, "in a storage of 6"),
        ({"w": tensor(strides=(-3, 1))}, "something other than a storage"),
        ({"w": tensor(strides=(1,))}, "with strides (1,)"),
        ({"w": tensor(shape=(1 << 40,), strides=(0,))}, "in a storage of 6"),
        ({"w": tensor(shape=(True, 3))}, "something other than a storage"),
        ({"w": tensor(shape=2)}, "something other than a storage"),
        ({"w": Reference("storage", FLOATS, "0", "cpu", 6)}, "something other than tensors by name"),
        ({"w": 1}, "something other than tensors by name"),
        ({1: tensor()}, "something other than tensors by name"),
        (tensor(), "not a dictionary"),
        ([tensor()], "not a dictionary"),
        ({"state_dict": [tensor()]}, "its state_dict is not a dictionary"),
        ({"state_dict": {"w": 1}}, "something other than tensors by name"),
        ({"state_dict": tensor(), "w": tensor()}, "its state_dict is not a dictionary"),
        ({"w": FLOATS}, "something other than tensors by name"),
        (Call("torch", "FloatStorage"), "TypeError"),
    ],
)
def test_what_does_not_fit_is_refused(content: object, expected: str, tmp_path: pathlib.Path) -> None:
    assert expected in refused(write(tmp_path / "a", content))


def test_stand_ins_cannot_be_altered(tmp_path: pathlib.Path) -> None:
    storage = pickle.GLOBAL + b"torch\nFloatStorage\n"
    change = storage + b"}" + pickle.BINUNICODE + b"\x05\0\0\0dtypeK\x01s" + pickle.BUILD
    message = refused(archive(tmp_path / "a", {"data.pkl": b"\x80\x02" + change + b".", "data/0": BYTES}))
    assert "AttributeError" in message


def test_what_would_fill_the_memory_is_refused(tmp_path: pathlib.Path) -> None:
    path, content = tmp_path / "a", dumps({"w": tensor()})
    members = {"data.pkl": content, "data/0": BYTES}
    assert "is compressed" in refused(archive(path, members, zipfile.ZIP_DEFLATED))
    memo = b"\x80\x02}" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f."
    assert "memo index" in refused(archive(path, {"data.pkl": memo}))
    text = b"\x80\x02" + pickle.BINUNICODE + b"\xff\xff\xff\x7fa."
    assert "expected 2147483647 bytes" in refused(archive(path, {"data.pkl": text}))


def test_another_archive_is_refused(tmp_path: pathlib.Path) -> None:
    assert "0 members data.pkl" in refused(archive(tmp_path / "a", {"x": b""}))
    big = archive(tmp_path / "a", {"data.pkl": dumps({"w": tensor()}), "byteorder": b"big", "data/0": BYTES})
    assert "not little-endian" in refused(big)
