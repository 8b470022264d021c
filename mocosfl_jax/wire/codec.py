"""Arrays as bytes, and back. The receiver knows shape and dtype, and refuses what does not fit."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mocosfl_jax.wire import messages

# The largest number that is accepted. A client could make the sums of the others overflow with larger ones.
LARGEST = 1e10


class Misfit(ValueError):
    """What was received does not fit the contract. The message says what was found and what is allowed."""


class Format(NamedTuple):
    """How one kind of array is sent."""

    shape: tuple[int, ...]
    dtype: str  # of the array, such as float32
    sent_as: str  # the dtype on the wire; int8 has a scale

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return int(np.prod(self.shape, dtype=np.int64)) * jnp.dtype(self.sent_as).itemsize


def pack(array: np.ndarray, form: Format) -> Any:
    """The message of an array. As int8, the largest absolute value becomes 127.

    Example:
      >>> form = Format((3,), "float32", "int8")
      >>> message = pack(np.array([127.0, -63.9, 0.0], np.float32), form)
      >>> len(message.data), unpack(message, form).tolist()
      (3, [127.0, -64.0, 0.0])
    """
    if form.sent_as != "int8":
        return messages.Array(data=_little(array.astype(form.sent_as)).tobytes())
    scale = np.float32(np.max(np.abs(array), initial=0.0) / 127) or np.float32(1)
    rounded = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
    return messages.Array(data=rounded.tobytes(), scale=float(scale))


def unpack(message: Any, form: Format) -> np.ndarray:
    """The array of a message.

    Raises:
      Misfit: If there are too few or too many bytes, or a number is not finite or larger than `LARGEST`.
    """
    array = _from_bytes(message.data, form.shape, form.sent_as)
    if form.sent_as == "int8":
        if not 0 < message.scale < np.inf:
            raise Misfit(f"scale: found {message.scale}, allowed: more than 0 and finite")
        array = array.astype(np.float32) * np.float32(message.scale)
    array = array.astype(form.dtype)
    _check_numbers("data", array)
    return array


def pack_leaves(leaves: list[Any]) -> Any:
    """The message of the arrays of a tree."""
    return messages.Leaves(data=[_little(np.asarray(leaf)).tobytes() for leaf in leaves])


def unpack_leaves(message: Any, shapes: list[tuple[tuple[int, ...], str]]) -> list[np.ndarray]:
    """The arrays of a tree.

    Args:
      message: From `pack_leaves`.
      shapes: Shape and dtype of each array.

    Raises:
      Misfit: If the number of arrays or of their bytes is another, or a number is not finite or larger than
        `LARGEST`.
    """
    if len(message.data) != len(shapes):
        raise Misfit(f"leaves: found {len(message.data)} arrays, allowed: {len(shapes)}")
    leaves = [_from_bytes(data, *each) for data, each in zip(message.data, shapes, strict=True)]
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            _check_numbers("leaves", leaf)
    return leaves


def _check_numbers(what: str, array: np.ndarray) -> None:
    """Raise Misfit for numbers that no training sends."""
    if not (np.abs(array.astype(np.float32, copy=False)) <= LARGEST).all():
        raise Misfit(f"{what}: found a number that is not finite, or beyond {LARGEST:g}")


def _from_bytes(data: bytes, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    kind = jnp.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    if len(data) != count * kind.itemsize:
        raise Misfit(f"data: found {len(data)} bytes, allowed: {count * kind.itemsize} for {shape} {dtype}")
    return np.frombuffer(data, kind.newbyteorder("<")).astype(kind, copy=False).reshape(shape)


def _little(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
