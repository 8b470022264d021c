"""Decoders: numbers of parameters, batch norm against NumPy, and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.models.decoders import make_decoder, read_family

FAMILIES = ("res_normN4C64", "conv_normN0C16", "custom")
# (h, w, c) of the smashed data of 32x32 images -> trainable parameters, counted by hand from the official
# definitions.
PARAMETERS = {
    (16, 16, 4): (449_579, 5_769, 259),  # C4S2 up to cut layer 3
    (16, 16, 2): (448_295, 5_481, 95),
    (16, 16, 8): (452_147, 6_345, 803),
    (16, 16, 16): (457_283, 7_497, 2_755),
    (32, 32, 8): (489_203, 6_345, 803),  # C8S1
    (8, 8, 4): (412_523, 5_769, 207),  # C4S4, or C4S2 at cut layers 4 and 5
    (32, 32, 64): (520_931, 14_409, 38_659),  # no bottleneck, up to cut layer 3
    (16, 16, 128): (529_187, 23_625, 151_043),
    (8, 8, 256): (574_307, 42_057, 593_667),
    (4, 4, 512): (775_715, 81_273, 2_363_651),
}


@pytest.mark.parametrize("shape", PARAMETERS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_have_the_official_number_of_parameters(family: str, shape: tuple[int, int, int]) -> None:
    decoder = make_decoder(family, shape, 32)
    params, statistics = jax.eval_shape(decoder.init, jax.random.key(0))
    found = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found == PARAMETERS[shape][FAMILIES.index(family)]
    smashed = jax.ShapeDtypeStruct((3, *shape), np.float32)
    images, _ = jax.eval_shape(lambda *a: decoder.apply(*a, training=False), params, statistics, smashed)
    assert images.shape == (3, 32, 32, 3)


def test_batch_norm_is_pytorchs() -> None:
    """The first norm of a residual block sees the input itself."""
    decoder = make_decoder("res_normN0C4", (4, 4, 3), 4)
    params, statistics = decoder.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(2, 3, (5, 4, 4, 3)).astype(np.float32)
    first, once = decoder.apply(params, statistics, x, training=True)
    norm = once["block0"]["norm0"]
    np.testing.assert_allclose(norm["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm["variance"], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)
    # With the batch's own statistics, evaluation gives what training gave.
    for _ in range(200):
        _, once = decoder.apply(params, once, x, training=True)
    many = jax.tree.map(np.asarray, once)
    count = 5 * 4 * 4
    biased = jax.tree.map_with_path(
        lambda path, leaf: leaf * (count - 1) / count if path[-1].key == "variance" else leaf, many
    )
    evaluated, unchanged = decoder.apply(params, biased, x, training=False)
    np.testing.assert_allclose(evaluated, first, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, unchanged, biased)


def test_initial_weights_are_pytorchs_default() -> None:
    decoder = make_decoder("custom", (4, 4, 16), 8)
    params, statistics = decoder.init(jax.random.key(0))
    assert not jax.tree.leaves(statistics)
    (conv,) = (value for name, value in params.items() if "Conv" in name)
    (last,) = (value for name, value in params.items() if "Upsampling" in name)
    for layer, fan_in in ((conv, 9 * 16), (last, 9 * 3)):
        for name in ("kernel", "bias"):
            assert np.abs(layer[name]).max() <= fan_in**-0.5
        assert np.std(layer["kernel"]) == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


def test_outputs_are_in_0_to_1() -> None:
    decoder = make_decoder("conv_normN1C4", (2, 2, 1), 16)  # three doublings
    x = 100 * jax.random.normal(jax.random.key(1), (2, 2, 2, 1))
    images, _ = decoder.apply(*decoder.init(jax.random.key(0)), x, training=True)
    assert images.shape == (2, 16, 16, 3)
    assert 0 <= float(jnp.min(images)) < float(jnp.max(images)) <= 1


@pytest.mark.parametrize("name", ["", "res_norm", "res_normN4", "res_normN4C0", "gan", "res_normN-1C4"])
def test_an_unknown_family_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"decoder: found .*, allowed: res_normNxCy"):
        read_family(name)


@pytest.mark.parametrize("shape, size", [((3, 3, 4), 32), ((16, 8, 4), 32), ((32, 32, 4), 16)])
def test_images_of_another_size_are_refused(shape: tuple[int, int, int], size: int) -> None:
    with pytest.raises(UserError, match=r"decoder: found smashed data of .* allowed: images larger by"):
        make_decoder("res_normN0C4", shape, size)
