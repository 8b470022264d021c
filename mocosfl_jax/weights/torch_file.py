"""Reads the tensors of a PyTorch state dict, without PyTorch and without running code that the file names.

Since PyTorch 1.6, `torch.save` writes an uncompressed zip archive with a pickle and one member for each
storage. A pickle is a program. Here it may use only the opcodes of a state dict, and can reach only stand-ins
for `OrderedDict`, for storages and for `_rebuild_tensor_v2`, which makes a view into checked bytes.
"""

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mocosfl_jax.errors import UserError

_MAX_PICKLE = 1 << 24  # bytes; the names and shapes of the largest network here take a hundredth of this
# A memo is an array as long as its largest index, so a single opcode could allocate gigabytes.
_MAX_MEMO = 1 << 20
_PARALLEL = "module."  # precedes all names of a network in nn.DataParallel
_OPCODES = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE"),
    *(
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "BINUNICODE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
    ),
    *("BINFLOAT", "EMPTY_LIST", "APPEND", "APPENDS"),  # beside a wrapped state dict: losses, an optimizer
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "SETITEM", "SETITEMS"),
}
_KINDS = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
}


class _Dict(dict):
    """Stands in for an OrderedDict. Drops the attributes that PyTorch sets on it (versions of modules)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Kind:
    """Stands in for a type of storage. It refuses attributes, so the pickle cannot alter it."""

    __slots__ = ("dtype",)
    dtype: np.dtype[Any]

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "dtype", np.dtype(_KINDS[name]))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class _Storage:
    """Stands in for a storage. Its values are read-only."""

    __slots__ = ("values",)
    values: np.ndarray

    def __init__(self, values: np.ndarray) -> None:
        object.__setattr__(self, "values", values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class _Tensor(_Storage):
    """Stands in for a tensor."""

    __slots__ = ()


def _new_dict() -> _Dict:
    return _Dict()


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Makes a tensor, a view of a storage. Raises ValueError if it would reach beyond the storage."""
    if type(storage) is not _Storage or not (_counts((offset,)) and _counts(shape) and _counts(strides)):
        raise ValueError("a tensor of something other than a storage, an offset, a shape and strides")
    values = storage.values
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape} with strides {strides}")
    if 0 in shape:
        return _Tensor(np.empty(shape, values.dtype))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= values.size or math.prod(shape) > values.size:
        raise ValueError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} in a storage of {values.size}"
        )
    in_bytes = [stride * values.itemsize for stride in strides]
    return _Tensor(np.lib.stride_tricks.as_strided(values[offset:], shape, in_bytes, writeable=False))


def _counts(numbers: Any) -> bool:
    """Whether `numbers` is a tuple of sizes, as in a shape."""
    return type(numbers) is tuple and all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)


class _Call:
    """A function that the pickle may call. It refuses attributes, so the pickle cannot alter it."""

    __slots__ = ("function",)
    function: Any

    def __init__(self, function: Any) -> None:
        object.__setattr__(self, "function", function)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, archive: zipfile.ZipFile, folder: str, budget: int) -> None:
        super().__init__(io.BytesIO(data))
        self._archive = archive
        self._folder = folder
        self._budget = budget  # bytes of storages that may still be read
        self._read: dict[str, _Storage] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return _Call(_new_dict)
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Call(_rebuild)
        if module_name == "torch" and global_name in _KINDS:
            return _Kind(global_name)
        raise ValueError(f"it names {module_name}.{global_name}, which is not allowed")

    def persistent_load(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise ValueError("a reference to something other than a storage")
        _, kind, key, _, numel = pid
        if type(kind) is not _Kind or type(key) is not str or not _counts((numel,)):
            raise ValueError("a reference to a storage of unknown kind, name or size")
        name = f"{self._folder}/data/{key}"
        if name not in self._read:
            data = _member(self._archive, name, numel * kind.dtype.itemsize)
            # Members may overlap, so a short file could fill the memory.
            self._budget -= len(data)
            if self._budget < 0:
                raise ValueError("storages longer than the file")
            self._read[name] = _Storage(np.frombuffer(data, kind.dtype))
        values = self._read[name].values
        if (values.dtype, values.size) != (kind.dtype, numel):
            raise ValueError(f"{name} with {numel:,} {kind.dtype} and with {values.size:,} {values.dtype}")
        return self._read[name]


def _member(archive: zipfile.ZipFile, name: str, size: int | None = None) -> bytes:
    """The bytes of a member. Raises ValueError if they are compressed, or their number is not `size`."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"no member {name}") from None
    # PyTorch does not compress, and an uncompressed member cannot be longer than the file.
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    if size is not None and info.file_size != size:
        raise ValueError(f"{name} has {info.file_size:,} bytes, its tensors need {size:,}")
    return archive.read(info)


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """Reads a state dict that was saved by PyTorch 1.6 or newer.

    It may be the entry `state_dict` of a dictionary, whose other entries are dropped, and all names may start
    with `module.`, which is dropped too.

    Args:
      path: The file, as written by `torch.save`.

    Returns:
      The tensors by name, as read-only arrays.

    Raises:
      UserError: With a message of one line, if the file holds anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"\x80\x02":
        raise UserError(
            f"{path}: a pickle, as PyTorch saved before 1.6; load it there and save it with torch >= 1.6"
        )
    try:
        is_archive = zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an archive that spans several disks
        is_archive = False
    if not is_archive:
        raise UserError(f"{path}: not a file of torch.save (no complete zip archive)")
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, path.stat().st_size)
    except Exception as error:  # a broken archive or pickle raises nearly any exception
        what = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not a readable state dict: {' '.join(what.split())[:300]}") from error


def _read(archive: zipfile.ZipFile, length: int) -> dict[str, np.ndarray]:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{len(pickles)} members data.pkl")
    folder = pickles[0].removesuffix("/data.pkl")
    order = f"{folder}/byteorder"
    if order in archive.namelist() and _member(archive, order) != b"little":
        raise ValueError("values that are not little-endian")
    if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE:
        raise ValueError(f"{pickles[0]} has more than {_MAX_PICKLE:,} bytes")
    data = _member(archive, pickles[0])
    # genops compares every declared length with the bytes that follow.
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise ValueError(f"its pickle uses {opcode.name}, which is not allowed")
        if opcode.name == "LONG_BINPUT" and isinstance(argument, int) and argument > _MAX_MEMO:
            raise ValueError(f"memo index {argument}")
    content = _Unpickler(data, archive, folder, length).load()
    if type(content) not in (_Dict, dict):
        raise ValueError("its content is not a dictionary")
    if "state_dict" in content:
        content = content["state_dict"]
        if type(content) not in (_Dict, dict):
            raise ValueError("its state_dict is not a dictionary")
    for name, value in content.items():
        if type(name) is not str or type(value) is not _Tensor:
            raise ValueError("a dictionary of something other than tensors by name")
    prefix = _PARALLEL if content and all(name.startswith(_PARALLEL) for name in content) else ""
    return {name.removeprefix(prefix): value.values for name, value in content.items()}
