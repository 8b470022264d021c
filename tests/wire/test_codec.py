"""Arrays as bytes: exact or rounded within bounds, and whatever else is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_jax.wire import messages
from mocosfl_jax.wire.codec import Format, Misfit, pack, pack_leaves, unpack, unpack_leaves

ARRAY = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_as_they_are_arrays_return_unchanged(dtype: str) -> None:
    array = np.asarray(jnp.asarray(ARRAY, dtype)) if dtype == "bfloat16" else ARRAY.astype(dtype)
    form = Format(array.shape, dtype, dtype)
    message = messages.Array.FromString(pack(array, form).SerializeToString())
    assert len(message.data) == form.nbytes == array.nbytes
    np.testing.assert_array_equal(unpack(message, form), array)
    assert unpack(message, form).dtype == array.dtype


def test_bfloat16_keeps_eight_bits_and_int8_a_127th_of_the_largest_value() -> None:
    rounded = unpack(pack(ARRAY, half := Format(ARRAY.shape, "float32", "bfloat16")), half)
    np.testing.assert_allclose(rounded, ARRAY, rtol=2**-8)
    quarter = Format(ARRAY.shape, "float32", "int8")
    coarse = unpack(pack(ARRAY, quarter), quarter)
    assert np.abs(coarse - ARRAY).max() <= np.abs(ARRAY).max() / 127 / 2 * 1.001
    assert (quarter.nbytes, half.nbytes) == (ARRAY.size, 2 * ARRAY.size)


def test_zeros_as_int8() -> None:
    form = Format((3,), "float32", "int8")
    assert not unpack(pack(np.zeros(3, np.float32), form), form).any()


def test_bytes_are_little_endian() -> None:
    assert pack(np.array([1.0], np.float32), Format((1,), "float32", "float32")).data == b"\x00\x00\x80?"


@pytest.mark.parametrize(
    "message, what",
    [
        (messages.Array(data=b"123"), "found 3 bytes, allowed: 8"),
        (messages.Array(data=b"1" * 12), "found 12 bytes, allowed: 8"),
        (messages.Array(data=np.array([1, np.nan], np.float32).tobytes()), "not finite"),
        (messages.Array(data=np.array([1, np.inf], np.float32).tobytes()), "not finite"),
        (messages.Array(data=np.array([1, -3e38], np.float32).tobytes()), "beyond 1e"),
    ],
)
def test_what_does_not_fit_is_named(message: messages.Array, what: str) -> None:
    with pytest.raises(Misfit, match=what):
        unpack(message, Format((2,), "float32", "float32"))


@pytest.mark.parametrize("scale", [0.0, -1.0, np.inf, np.nan])
def test_an_impossible_scale_is_refused(scale: float) -> None:
    with pytest.raises(Misfit, match="scale"):
        unpack(messages.Array(data=b"\x01\x02", scale=scale), Format((2,), "float32", "int8"))


def test_the_arrays_of_a_tree() -> None:
    leaves = [ARRAY, np.array(3, np.int32), np.zeros((0,), np.float32)]
    shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    message = messages.Leaves.FromString(pack_leaves(leaves).SerializeToString())
    for found, leaf in zip(unpack_leaves(message, shapes), leaves, strict=True):
        np.testing.assert_array_equal(found, leaf)
    with pytest.raises(Misfit, match="found 3 arrays, allowed: 2"):
        unpack_leaves(message, shapes[:2])


@given(st.binary(max_size=40), st.floats(width=32), st.sampled_from(["float32", "bfloat16", "int8"]))
def test_any_bytes_are_an_array_or_a_misfit(data: bytes, scale: float, sent_as: str) -> None:
    form = Format((2, 2), "float32", sent_as)
    try:
        array = unpack(messages.Array(data=data, scale=scale), form)
    except Misfit:
        return
    assert array.shape == (2, 2) and np.isfinite(array).all()
