"""Reads the pickles of `cifar-*-python` without running any code that they name.

A pickle is a program. Here it can reach only the stand-ins below, for the six names that pickled NumPy arrays
use. They build plain arrays from checked bytes.
"""

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from mocosfl_jax.errors import one_line

_KINDS = {"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"}
# A memo is an array as long as its largest index, so a single opcode could allocate gigabytes.
_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}
_MAX_MEMO = 1 << 20


class _Dtype:
    """Stands in for `numpy.dtype(kind, align, copy)` and the state that is set on it."""

    __slots__ = ("order", "spec")

    def __init__(self, kind: str | bytes) -> None:
        self.spec = _text(kind)
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def dtype(self) -> np.dtype[Any]:
        if self.spec not in _KINDS or self.order not in ("<", ">", "|", "="):
            raise ValueError(f"an array of type {self.order}{self.spec}, only integers are allowed")
        return np.dtype(self.spec if self.order == "|" else self.order + self.spec)


class _Array:
    """Stands in for the empty array of `_reconstruct`, which is filled by its state."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _build(data, dtype, shape, "F" if fortran else "C")


class _Call:
    """A function that the pickle may call. It refuses attributes, so the pickle cannot alter it."""

    __slots__ = ("budget", "name")
    name: str
    budget: list[int]

    def __init__(self, name: str, budget: list[int]) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "budget", budget)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)

    def __call__(self, *args: Any) -> Any:
        match self.name:
            case "_reconstruct":
                return _Array()
            case "_frombuffer":
                data, dtype, shape, order = args
                return _build(data, dtype, shape, order)
            case "scalar":
                dtype, data = args
                return int(_build(data, dtype, (1,), "C")[0])
            case "dtype":
                return _Dtype(args[0])
            case "encode":
                text, _ = args
                # Encoding one long string again and again would take unlimited memory.
                self.budget[0] -= len(text)
                if self.budget[0] < 0:
                    raise ValueError("more encoded bytes than a file of this size can hold")
                return text.encode("latin1")
        raise ValueError(f"{self.name} may be named but not called")


_NUMPY = ("numpy.core", "numpy._core")
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((f"{core}.multiarray", name) for core in _NUMPY for name in ("_reconstruct", "scalar")),
    *((f"{core}.numeric", "_frombuffer") for core in _NUMPY),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._budget = [2 * len(data)]

    def find_class(self, module_name: str, global_name: str) -> _Call:
        if (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which is not allowed")
        return _Call(global_name, self._budget)


def _text(value: str | bytes) -> str:
    text = value.decode("ascii") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise TypeError(f"{type(text).__name__} where text is expected")
    return text


def _build(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """The array of these bytes. Raises ValueError if they do not fit the dtype and the shape."""
    if not (isinstance(dtype, _Dtype) and isinstance(data, bytes | bytearray)):
        raise ValueError("an array without a type or without bytes")
    if order not in ("C", "F"):
        raise ValueError("an array of unknown order")
    kind = dtype.dtype()
    if len(data) != math.prod(shape) * kind.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"an array of {len(data)} bytes for shape {tuple(shape)} of {kind}")
    return np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")


def read(data: bytes) -> dict[str, Any]:
    """Reads a pickled dictionary of lists, strings, integers and integer arrays.

    Keys that are bytes are decoded.

    Raises:
      ValueError: With a message of one line, if the pickle holds anything else: other names, other types, or
        values that take more memory than its own length can explain.
    """
    try:
        # genops compares every declared length with the bytes that follow.
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _MEMO_OPCODES and isinstance(argument, int) and argument > _MAX_MEMO:
                raise ValueError(f"memo index {argument}")
        content = _Unpickler(data).load()
    except Exception as error:  # a broken pickle raises nearly any exception
        raise ValueError(f"not a readable pickle: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"a pickle of {type(content).__name__}, a dictionary is expected")
    try:
        return {_text(key): _plain(value) for key, value in content.items()}
    except (TypeError, UnicodeDecodeError) as error:
        raise ValueError("a dictionary with keys that are not text") from error


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value
