"""Programs exported by JAX for any number of images, against the plain call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mocosfl_jax import normalise, split_model
from mocosfl_jax.models import convolution
from mocosfl_jax.models.forms import ACCELERATOR, CPU, Forms

Images = jax.Array | np.ndarray


def exported(function: Callable[[Any], Any], shape: tuple[int, ...], dtype: Any) -> Callable[[Any], Any]:
    """`function` of images [n, *shape], exported with n left open."""
    (n,) = export.symbolic_shape("n")
    return jax.jit(export.export(jax.jit(function))(jax.ShapeDtypeStruct((n, *shape), dtype)).call)


def check(function: Callable[[Any], Any], images: Images) -> None:
    call = exported(function, images.shape[1:], images.dtype)
    for n in (1, len(images)):
        found, expected = call(images[:n]), jax.jit(function)(images[:n])
        assert found.shape == expected.shape and found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forms", [ACCELERATOR, CPU], ids=["accelerator", "cpu"])
@pytest.mark.parametrize(
    "settings",
    [
        {"name": "resnet18", "cut_layer": 2, "width": 32, "bottleneck": "C4S2"},  # wide enough for Winograd
        {"name": "vgg11", "cut_layer": 4, "width": 4, "image_size": 32},
        {"name": "mobilenetv2", "cut_layer": 2, "width": 16},
    ],
    ids=str,
)
def test_the_client_takes_any_number_of_images(
    settings: Any, forms: Forms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "CACHE_ELEMENTS", 1)  # the plain call divides the batch
    settings = {"image_size": 8} | settings
    model = split_model(**settings, key_dim=8, forms=forms)
    params, _ = jax.jit(model.init)(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (7, settings["image_size"], settings["image_size"], 3))
    check(lambda images: model.client(params, images), images)


@pytest.mark.parametrize("forms", [ACCELERATOR, CPU], ids=["accelerator", "cpu"])
def test_a_whole_encoder_takes_any_number_of_pictures(forms: Forms) -> None:
    """The recipe of docs/encoders.md."""
    model = split_model("resnet18", cut_layer=1, width=4, image_size=8, key_dim=8, forms=forms)
    params = jax.jit(model.init)(jax.random.key(0))

    def encode(pictures: jax.Array) -> jax.Array:
        return model.whole_backbone(params, normalise(pictures, (0.5,) * 3, (0.25,) * 3))

    check(encode, np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3)).astype(np.uint8))


@pytest.mark.parametrize("name", ["resnet50", "vgg9", "vgg11", "mobilenetv2"])
def test_every_kind_of_network_can_be_exported(name: str) -> None:
    for forms in (ACCELERATOR, CPU):
        model = split_model(
            name, cut_layer=2, width=32, key_dim=8, head="mlp_bn", bottleneck="C4S2", forms=forms
        )
        params = jax.eval_shape(model.init, jax.random.key(0))
        (n,) = export.symbolic_shape("n")
        images = jax.ShapeDtypeStruct((n, 32, 32, 3), jnp.float32)

        def encode(params: Any, images: jax.Array) -> Any:
            return model.server(params[1], model.client(params[0], images))  # noqa: B023

        backbone, projection = export.export(jax.jit(encode))(params, images).out_avals
        assert backbone.shape[0] == projection.shape[0] == n and projection.shape[1] == 8
