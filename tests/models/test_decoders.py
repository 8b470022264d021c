"""Decoders: against PyTorch, numbers of parameters, batch norm against NumPy, and shapes."""

import functools
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.models.decoders import make_decoder, read_family
from mocosfl_jax.models.forms import Forms

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


# tests/official/README.md describes it. A case is family, N and C, side and channels of the smashed data.
TORCH = pathlib.Path(__file__).parents[1] / "official" / "decoders.npz"
CASES = sorted({name.split("/")[0] for name in np.load(TORCH)})
NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "variance": "running_var"}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Those from which PyTorch's numbers were computed, in its layout."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)


def named(path: Any) -> str:
    *parents, name = (key.key for key in path)
    return "/".join([*parents, NAMES.get(name, name)])


@pytest.mark.parametrize("case", CASES)
def test_decoders_are_pytorchs(case: str, forms: Forms, x64: None) -> None:
    """A pass forward and back in training mode, the running statistics after it, and evaluation with them."""
    family, blocks, channels, *numbers = case.split("-")
    side, inputs = map(int, numbers)
    with np.load(TORCH) as arrays:
        expected = {
            key.removeprefix(f"{case}/"): value for key, value in arrays.items() if key.startswith(f"{case}/")
        }
    name = family if family == "custom" else f"{family}N{blocks}C{channels}"
    decoder = make_decoder(name, (side, side, inputs), 8, forms, stacked=forms.scan_rounds)
    params, statistics = decoder.init(jax.random.key(0))

    def drawn(path: Any, leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 1:
            return jnp.asarray(0.1 * values(named(path), leaf.shape) + (path[-1].key == "scale"))
        # PyTorch stores kernels as [out, in, 3, 3], and those of transposed convolutions as [in, out, 3, 3].
        kernel = leaf.transpose(2, 3, 0, 1) if transposed(path) else leaf.transpose(3, 2, 0, 1)
        z = values(named(path), kernel.shape) / np.prod(kernel.shape[1:]) ** 0.5
        return jnp.asarray(z.transpose(2, 3, 0, 1) if transposed(path) else z.transpose(2, 3, 1, 0))

    def transposed(path: Any) -> bool:
        upsamples = {f"block{1 + int(blocks) + i}" for i in range(int(np.log2(8 // side)))}
        return "Upsampling" in path[0].key or (family != "custom" and path[0].key in upsamples)

    params = jax.tree.map_with_path(drawn, params)
    smashed = np.abs(values("smashed", (3, inputs, side, side))).transpose(0, 2, 3, 1)
    images = 1 / (1 + np.exp(-values("images", (3, 3, 8, 8)).transpose(0, 2, 3, 1)))

    def loss(params: Any) -> Any:
        found, after = decoder.apply(params, statistics, smashed, training=True)
        evaluated, _ = decoder.apply(params, after, smashed, training=False)
        return jnp.mean((found - images) ** 2), (found, after, evaluated)

    (mse, (found, after, evaluated)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    got = {"loss": mse}
    got |= {name: x.transpose(0, 3, 1, 2) for name, x in (("found", found), ("evaluated", evaluated))}
    for path, leaf in jax.tree.leaves_with_path(grads):
        if leaf.ndim > 1:
            leaf = leaf.transpose(2, 3, 0, 1) if transposed(path) else leaf.transpose(3, 2, 0, 1)
        got[f"gradient/{named(path)}"] = leaf
    got |= {f"statistics/{named(path)}": leaf for path, leaf in jax.tree.leaves_with_path(after)}
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, atol=1e-12, err_msg=key)


def test_batch_norm_is_pytorchs() -> None:
    """The first norm of a residual block sees the input itself."""
    decoder = make_decoder("res_normN0C4", (4, 4, 3), 4)
    params, statistics = decoder.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(2, 3, (5, 4, 4, 3)).astype(np.float32)
    train = jax.jit(functools.partial(decoder.apply, training=True))
    first, once = train(params, statistics, x)
    norm = once["block0"]["norm0"]
    np.testing.assert_allclose(norm["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm["variance"], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)
    # With the batch's own statistics, evaluation gives what training gave.
    for _ in range(200):
        _, once = train(params, once, x)
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
