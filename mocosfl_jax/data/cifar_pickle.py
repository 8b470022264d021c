"""Reads the pickles of `cifar-*-python` without running any code that they name.

A pickle is a program. This interpreter knows the opcodes of a dictionary of lists and arrays, and stand-ins
for the names that pickled NumPy arrays use, which build plain arrays from checked bytes. Lists are flat, and
tuples hold only flat tuples: where lists may nest, each can hold the one before it ten times by references of
two bytes, and a short file fills the memory.
"""

import math
import pickletools
from typing import Any

import numpy as np

from mocosfl_jax.errors import one_line

_KINDS = {"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"}
_LONGEST_REASON = 300  # characters, since messages may quote the file
_IGNORED = {"PROTO", "FRAME"}
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # of Python 2: bytes
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}

_NUMPY = ("numpy.core", "numpy._core")
_NAMES = {
    "numpy ndarray",
    "numpy dtype",
    "_codecs encode",
    *(f"{core}.multiarray {name}" for core in _NUMPY for name in ("_reconstruct", "scalar")),
    *(f"{core}.numeric _frombuffer" for core in _NUMPY),
}


class _Name:
    """Stands in for what the pickle names."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Dtype:
    """Stands in for `numpy.dtype(kind, align, copy)`; its state sets the order of bytes."""

    def __init__(self, kind: Any) -> None:
        self.spec = _text(kind)
        self.order = "="

    def dtype(self) -> np.dtype[Any]:
        if self.spec not in _KINDS or self.order not in ("<", ">", "|", "="):
            raise ValueError(f"an array of type {self.order}{self.spec}, only integers are allowed")
        return np.dtype(self.spec if self.order == "|" else self.order + self.spec)


class _Array:
    """Stands in for an array; that of `_reconstruct` is empty until its state is set."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value


def read(data: bytes) -> dict[str, Any]:
    """Reads a pickled dictionary of integers, text, bytes, flat lists of these, and integer arrays.

    Keys that are bytes are decoded.

    Raises:
      ValueError: With a message of one line, if the pickle holds anything else.
    """
    try:
        content = _Interpreter(data).run()
    except Exception as error:  # a broken pickle raises nearly any exception
        raise ValueError(f"not a readable pickle: {one_line(error)[:_LONGEST_REASON]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"a pickle of {type(content).__name__}, a dictionary is expected")
    try:
        return {_text(key): _plain(value) for key, value in content.items()}
    except UnicodeDecodeError as error:
        raise ValueError("a dictionary with keys that are not text") from error


class _Interpreter:
    """Runs a pickle on a stack."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}
        # Encoding one long text again and again would take unlimited memory.
        self._budget = 2 * len(data)

    def run(self) -> Any:
        stack = self._stack
        # genops compares every declared length with the bytes that follow.
        argument: Any
        for opcode, argument, _ in pickletools.genops(self._data):
            name = opcode.name
            if name in _IGNORED:
                continue
            if name == "STOP":
                return stack.pop()
            if name == "MARK":
                self._marks.append(len(stack))
            elif name in _VALUES:
                stack.append(argument)
            elif name in _STRINGS:
                stack.append(argument.encode("latin1"))  # as which genops has decoded them
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name in _PUTS:
                self._memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            elif name in _GETS:
                stack.append(self._memo[argument])
            else:
                self._combine(name, argument)
        raise ValueError("it ends without STOP")

    def _combine(self, name: str, argument: Any) -> None:
        """Runs an opcode that makes something of what is on the stack."""
        stack = self._stack
        if name in _TUPLES:
            stack.append(_tuple(self._pop(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(_tuple(self._above_mark()))
        elif name in ("EMPTY_LIST", "LIST"):
            stack.append(_flat(self._above_mark() if name == "LIST" else []))
        elif name in ("APPEND", "APPENDS"):
            items = self._above_mark() if name == "APPENDS" else self._pop(1)
            _of(list, stack[-1]).extend(_flat(items))
        elif name in ("EMPTY_DICT", "DICT"):
            stack.append(_pairs(self._above_mark() if name == "DICT" else []))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._above_mark() if name == "SETITEMS" else self._pop(2)
            _of(dict, stack[-1]).update(_pairs(items))
        elif name == "GLOBAL":
            stack.append(_name(argument))
        elif name == "STACK_GLOBAL":
            stack.append(_name(" ".join(map(_text, self._pop(2)))))
        elif name == "REDUCE":
            named, arguments = self._pop(2)
            stack.append(self._call(_of(_Name, named).name.split()[1], _of(tuple, arguments)))
        elif name == "BUILD":
            (state,) = self._pop(1)
            _set_state(stack[-1], _of(tuple, state))
        else:
            raise ValueError(f"it uses {name}, which is not allowed")

    def _pop(self, count: int) -> list[Any]:
        place = len(self._stack) - count
        if place < 0:
            raise ValueError("its stack is empty")
        items = self._stack[place:]
        del self._stack[place:]
        return items

    def _above_mark(self) -> list[Any]:
        return self._pop(len(self._stack) - self._marks.pop())

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        match name:
            case "_reconstruct":
                return _Array(np.empty(0, np.uint8))
            case "_frombuffer":
                data, dtype, shape, order = arguments
                return _Array(_build(data, dtype, shape, order))
            case "scalar":
                dtype, data = arguments
                return int(_build(data, dtype, (1,), "C")[0])
            case "dtype":
                return _Dtype(arguments[0])
            case "encode":
                text = _of(str, arguments[0])
                self._budget -= len(text)
                if self._budget < 0:
                    raise ValueError("more encoded bytes than a file of this size can hold")
                return text.encode("latin1")
        raise ValueError(f"{name} may be named but not called")


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} where {kind.__name__.strip('_')} is expected")
    return value


def _name(name: str) -> _Name:
    if name not in _NAMES:
        raise ValueError(f"it names {name.replace(' ', '.')}, which is not allowed")
    return _Name(name)


def _flat(items: list[Any]) -> list[Any]:
    for item in items:
        if type(item) not in (int, str, bytes):
            raise ValueError(f"a list with {type(item).__name__}, allowed: integers, text and bytes")
    return items


def _tuple(items: list[Any]) -> tuple[Any, ...]:
    for item in items:
        if isinstance(item, list | dict) or (
            isinstance(item, tuple) and any(isinstance(inner, tuple) for inner in item)
        ):
            raise ValueError(f"a tuple with {type(item).__name__}, allowed: flat tuples")
    return tuple(items)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys, values = items[::2], items[1::2]
    if any(type(key) not in (str, bytes) for key in keys):
        raise ValueError("a dictionary with keys that are not text")
    for value in values:
        if type(value) not in (int, str, bytes, list, _Array):
            raise ValueError(
                f"a dictionary with {type(value).__name__}, allowed: integers, text, bytes, lists and arrays"
            )
    return dict(zip(keys, values, strict=True))


def _set_state(made: Any, state: tuple[Any, ...]) -> None:
    if type(made) is _Dtype:
        made.order = _text(state[1])
    else:
        _, shape, dtype, fortran, data = state
        _of(_Array, made).value = _build(data, dtype, shape, "F" if fortran else "C")


def _text(value: Any) -> str:
    return value.decode("ascii") if type(value) is bytes else _of(str, value)


def _build(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """The array of these bytes. Raises ValueError if they do not fit the dtype and the shape."""
    if not (isinstance(dtype, _Dtype) and isinstance(data, bytes | bytearray)):
        raise ValueError("an array without a type or without bytes")
    if order not in ("C", "F"):
        raise ValueError("an array of unknown order")
    # The product of many large sizes would take long.
    if len(_of(tuple, shape)) > 4 or any(type(size) is not int or not 0 <= size < 1 << 48 for size in shape):
        raise ValueError("an array whose shape is not of at most four sizes")
    kind = dtype.dtype()
    if len(data) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"an array of {len(data)} bytes for shape {shape} of {kind}")
    return np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value
