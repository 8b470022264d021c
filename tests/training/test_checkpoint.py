"""What a checkpoint can hold, and how damage of it is noticed."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.algorithm.interface import Home
from mocosfl_jax.training import checkpoint
from mocosfl_jax.training.checkpoint import Progress, _fingerprint

TREES: dict[str, Any] = {
    "float32": jnp.asarray([1.5, -2.0, 0.0]),
    "bfloat16": jnp.asarray([[1.5, -2.0], [3.0, 4.0]], jnp.bfloat16),
    "float16": jnp.asarray([0.5, 2.0, 7.0], jnp.float16),
    "truth values": jnp.asarray([True, False, True]),
    "small numbers": jnp.asarray([-3, 100], jnp.int8),
    "a number": jnp.asarray(7, jnp.int32),
}


def words(leaf: np.ndarray) -> int:
    """The sum of the bits of an array as words of at most 32 bits."""
    bits = 8 * min(leaf.dtype.itemsize, 4)
    return int(np.ascontiguousarray(leaf).reshape(-1).view(f"uint{bits}").astype(np.uint64).sum())


@pytest.mark.parametrize("kind", TREES)
def test_the_fingerprint_is_the_sum_of_all_bits(kind: str) -> None:
    leaf = np.asarray(TREES[kind])
    expected = (words(leaf) + 3 * words(np.ones(1, np.float32))) % 2**32
    assert int(_fingerprint((TREES[kind], jnp.float32(1.0)))) == expected


def test_leaves_of_any_width_are_saved_and_restored(tmp_path: pathlib.Path) -> None:
    """As of an optimizer with moments in bfloat16, or with a truth value for a step that was not finite."""
    with checkpoint.open_manager(tmp_path / "checkpoints", keep=1) as manager:
        like: Any = TREES
        checkpoint.save(manager, like, Progress(step=3))
        checkpoint.finish(manager)
        found: Any = checkpoint.restore_newest(manager, like, lambda state: Home("server"))
    state, progress = found
    assert progress.step == 3
    for kind, leaf in TREES.items():
        assert state[kind].dtype == leaf.dtype
        np.testing.assert_array_equal(state[kind], leaf)
