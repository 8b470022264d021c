"""What `encode_images` refuses, so that no feature is NaN without a word."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import SplitModel, encode_images, split_model
from mocosfl_jax.errors import UserError
from mocosfl_jax.weights.encoder_file import Encoder, Metadata

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)


@pytest.fixture
def encoder(toy_model: SplitModel) -> Encoder:
    return toy_encoder(toy_model)


def toy_encoder(model: SplitModel) -> Encoder:
    metadata = Metadata({"function": "own", "key_dim": model.key_dim}, (0.5,) * 3, (0.25,) * 3)
    return Encoder(model, model.init(jax.random.key(0)), metadata)


def test_a_list_of_images_gives_the_features_of_the_array(encoder: Encoder) -> None:
    expected = encode_images(encoder, IMAGES)
    assert np.ptp(expected.backbone, axis=0).max() > 0
    for images in (list(IMAGES), (IMAGES / 255).tolist(), jnp.asarray(IMAGES)):
        for found, wanted in zip(encode_images(encoder, images, batch_size=2), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_head_over_all_rows_does_not_see_the_batches() -> None:
    """Batch norm refuses one image alone, but here five are encoded, one at a time."""
    network: dict[str, Any] = {"name": "resnet18", "cut_layer": 1, "width": 4, "image_size": 8}
    network |= {"key_dim": 6, "head": "mlp_bn"}
    model = split_model(**network)
    encoder = Encoder(
        model, jax.jit(model.init)(jax.random.key(0)), Metadata(network, (0.5,) * 3, (0.25,) * 3)
    )
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    normalised = jnp.asarray((images / 255 - 0.5) / 0.25, jnp.float32)
    whole = model.server(encoder.params[1], model.client(encoder.params[0], normalised))
    for size in (1, 2, 5):
        for found, wanted in zip(encode_images(encoder, images, batch_size=size), whole, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="head: found mlp_bn and a batch of one image"):
        encode_images(encoder, images[:1])


@pytest.mark.parametrize("name, least", [("vgg11", 32), ("vgg13", 32)])
@pytest.mark.parametrize("shape", [(16, 16), (32, 31), (31, 64)])
def test_images_smaller_than_the_network_needs(name: str, least: int, shape: tuple[int, int]) -> None:
    network: dict[str, Any] = {"name": name, "cut_layer": 2, "width": 4, "image_size": 32, "key_dim": 6}
    model = split_model(**network)
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(model.init, jax.random.key(0))
    )
    encoder = Encoder(model, params, Metadata(network, (0.5,) * 3, (0.25,) * 3))
    message = rf"^images: found {shape[0]}x{shape[1]} pixels, allowed: {least} or more a side for {name}"
    with pytest.raises(UserError, match=message):
        encode_images(encoder, np.zeros((2, *shape, 3), np.uint8))


@pytest.mark.parametrize("shape", [(16, 17), (24, 24)])
def test_images_of_another_size_where_features_are_not_pooled(shape: tuple[int, int]) -> None:
    network: dict[str, Any] = {"name": "vgg9", "cut_layer": 2, "width": 4, "image_size": 16, "key_dim": 6}
    model = split_model(**network)
    params = jax.jit(model.init)(jax.random.key(0))
    encoder = Encoder(model, params, Metadata(network, (0.5,) * 3, (0.25,) * 3))
    assert encode_images(encoder, np.zeros((2, 16, 16, 3), np.uint8)).backbone.shape == (2, 2 * 2 * 32)
    message = f"^images: found {shape[0]}x{shape[1]} pixels, allowed: 16x16 for vgg9, whose features are not"
    with pytest.raises(UserError, match=message):
        encode_images(encoder, np.zeros((2, *shape, 3), np.uint8))


@pytest.mark.parametrize(
    "images, more, message",
    [
        (IMAGES, {"batch_size": 0}, "^batch_size: found 0, allowed: an integer of 1 or more"),
        (IMAGES, {"batch_size": 2.0}, "^batch_size: found 2.0, allowed: an integer"),
        ([IMAGES[0], IMAGES[1, :2]], {}, "^images: found images of several shapes, allowed"),
        (IMAGES.tolist(), {}, "^images: found int64, allowed: uint8"),
        (np.full((2, 4, 4, 3), np.nan), {}, "^images: found values that are not finite"),
        ([[[[0.5, 0.5, np.inf]]]], {}, "^images: found values that are not finite"),
        ([], {}, r"^images: found shape \[0\], allowed"),
    ],
)
def test_images_that_cannot_be_encoded(
    images: Any, more: dict[str, Any], message: str, encoder: Encoder
) -> None:
    with pytest.raises(UserError, match=message):
        encode_images(encoder, images, **more)


def test_features_that_are_not_finite(encoder: Encoder) -> None:
    wrong = jax.tree.map(lambda leaf: leaf * np.nan, encoder.params[1])
    with pytest.raises(UserError, match=r"^encoder: found features of images of 4x4 pixels that are not fin"):
        encode_images(encoder._replace(params=(encoder.params[0], wrong)), IMAGES)
