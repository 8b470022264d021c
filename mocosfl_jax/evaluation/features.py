"""Features of whole sets of images, computed once, in batches of one shape.

`encode_images` takes an encoder that `load_encoder` or `encoder_of_run` has read. `make_encode` and `extract`
take the state of an algorithm, during training.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mocosfl_jax.algorithm.interface import Algorithm
from mocosfl_jax.data import Images
from mocosfl_jax.errors import UserError
from mocosfl_jax.evaluation.examples import at_least
from mocosfl_jax.feed import augment
from mocosfl_jax.models import Features, SplitModel
from mocosfl_jax.models.named import NETWORKS
from mocosfl_jax.weights.encoder_file import Encoder

BATCH = 250  # images at a time

# What an encoder computes with: the `TrainState` of an algorithm, or the parameters of an `Encoder`.
State = Any
Head = Callable[[State, np.ndarray], Array]  # state, pooled features [n, D] -> projections [n, key_dim]


class Extracted(NamedTuple):
    """Features of a whole set of images, in the memory of the host."""

    backbone: np.ndarray  # [n, D]: what the head sees, after global average pooling in most networks
    projection: np.ndarray  # [n, key_dim], output of the projection head, not normalised


def encode_images(
    encoder: Encoder, images: Images | Array | Sequence[Any], batch_size: int = BATCH
) -> Extracted:
    """Compute the features of images with a trained encoder, without augmentation.

    Args:
      encoder: from `load_encoder` or `encoder_of_run`.
      images: [n, H, W, 3], uint8 or floats in [0, 1], in memory, on disk or a list of arrays; n must be at
        least 1. They should have the size on which the encoder was trained,
        `encoder.metadata.network["image_size"]`.
      batch_size: images at a time.

    Returns:
      Features of all n images, float32. With the head mlp_bn, projections are normalised over all n images,
      so they depend on which images are encoded together.

    Raises:
      UserError: if the images have another shape or dtype, are floats far above 1 or not finite, are smaller
        than the network's layers allow, or of another size where its features are not pooled; if
        `batch_size` is not positive; if a feature is not finite; if a single image meets the head mlp_bn.

    Example:
      >>> from mocosfl_jax import split_model
      >>> from mocosfl_jax.weights.encoder_file import Metadata
      >>> network = {"name": "resnet18", "cut_layer": 1, "width": 4, "image_size": 8, "key_dim": 6}
      >>> model = split_model(**network)  # load_encoder reads all of this from a file
      >>> params = model.init(jax.random.key(0))
      >>> encoder = Encoder(model, params, Metadata(network, mean=(0.5,) * 3, std=(0.25,) * 3))
      >>> features = encode_images(encoder, np.zeros((5, 8, 8, 3), np.uint8))
      >>> features.backbone.shape, features.projection.shape
      ((5, 32), (5, 6))
    """
    at_least("batch_size", batch_size, 1)
    if not isinstance(images, Images):
        try:
            images = np.asarray(images)
        except ValueError as error:
            raise UserError("images: found images of several shapes, allowed: [n, H, W, 3]") from error
    if len(images.shape) != 4 or images.shape[3] != 3 or not len(images):
        raise UserError(f"images: found shape {list(images.shape)}, allowed: [n, H, W, 3], n at least 1")
    size = f"{images.shape[1]}x{images.shape[2]} pixels"
    network = NETWORKS.get(encoder.metadata.network.get("name", ""))  # None: one of your own
    if network and min(images.shape[1:3]) < network.smallest_image:
        raise UserError(
            f"images: found {size}, allowed: {network.smallest_image} or more a side for "
            f"{network.name}, whose layers leave nothing of smaller ones"
        )
    trained = encoder.metadata.network.get("image_size")
    if network and not network.pooled and images.shape[1:3] != (trained, trained):
        raise UserError(
            f"images: found {size}, allowed: {trained}x{trained} for {network.name}, whose features are not "
            "pooled"
        )
    if isinstance(images, np.ndarray) and images.dtype.kind == "f" and not np.isfinite(images).all():
        raise UserError("images: found values that are not finite, allowed: finite ones")
    found = extract(encode_of(encoder), encoder.params, images, batch_size)
    if not all(np.isfinite(rows).all() for rows in found):
        raise UserError(
            f"encoder: found features of images of {size} that are not finite, allowed: finite ones"
        )
    return found


class Encode(NamedTuple):
    """The compiled encoder of images without augmentation."""

    batch: Callable[[State, np.ndarray], Features]  # state, images [n, H, W, 3] -> Features
    # For a head that mixes the rows of its batch, as batch norm does. None: rows are independent.
    head: Head | None


def make_encode(
    algorithm: Algorithm, mean: Sequence[float], std: Sequence[float], head: Head | None = None
) -> Encode:
    """Compile the encoder of images without augmentation.

    Args:
      algorithm: its `encode` is compiled.
      mean: per channel, for pixels on [0, 1].
      std: per channel.
      head: from `training.build.whole_head`, for a network whose head mixes the rows of its batch.

    Returns:
      The encoder, for `extract`.
    """
    batch = jax.jit(lambda state, images: algorithm.encode(state, augment.normalise(images, mean, std)))
    return Encode(batch, head)


def encode_of(encoder: Encoder) -> Encode:
    """Return the compiled encoder, for `extract` and `extract_batches`. Its parameters are their state."""
    model, _, metadata = encoder

    # Of the heads of `split_model`, only mlp_bn mixes rows. That of a network of your own may.
    mixes_rows = metadata.network.get("head") == "mlp_bn" or "function" in metadata.network
    compute = _without_head if mixes_rows else _features

    def batch(params: State, images: np.ndarray) -> Features:
        return compute(model, params, augment.normalise(images, metadata.mean, metadata.std))

    return Encode(batch, partial(_head, model) if mixes_rows else None)


@partial(jax.jit, static_argnums=0)
def _features(model: SplitModel, params: State, images: Array) -> Features:
    client, server = params
    return model.server(server, model.client(client, images))


@partial(jax.jit, static_argnums=0)
def _without_head(model: SplitModel, params: State, images: Array) -> Features:
    """Features without projections, which the head will compute of all images together."""
    backbone = model.whole_backbone(params, images)
    return Features(backbone, backbone[:, :0])


@partial(jax.jit, static_argnums=0)
def _head(model: SplitModel, params: State, backbone: Array) -> Array:
    return model.head(params[1], backbone)


def extract(encode: Encode, state: State, images: Images, batch_size: int = BATCH) -> Extracted:
    """Compute the features of all `images`, as `extract_batches` does.

    Args:
      encode: the compiled encoder.
      state: the training state, or the parameters of the encoder.
      images: [n, H, W, 3], in memory or on disk; n must be at least 1.
      batch_size: images at a time.

    Returns:
      Features of all n images.
    """
    starts = range(0, len(images), batch_size)
    return extract_batches(
        encode, state, (images[start : start + batch_size] for start in starts), batch_size
    )


def extract_batches(
    encode: Encode, state: State, batches: Iterable[np.ndarray], batch_size: int = BATCH
) -> Extracted:
    """Compute the features of batches of images.

    The next batch is read while the device encodes the current one. The head of a network whose head mixes
    rows runs once, on all images, so features do not depend on how the images are divided into batches.

    Args:
      encode: the compiled encoder.
      state: the training state, or the parameters of the encoder.
      batches: of n_i images [n_i, H, W, 3] each, 1 <= n_i <= batch_size; at least one.
      batch_size: smaller batches are padded to it, and the features of the padding are dropped.

    Returns:
      Features of all images, in their order.

    Raises:
      UserError: if there is one image alone and the head cannot encode it.
    """
    done: list[list[np.ndarray]] = []
    working: tuple[int, Features] | None = None

    def finish(count: int, features: Features) -> None:
        done.append([np.asarray(x)[:count] for x in features])

    for batch in batches:
        if working is not None:
            finish(*working)
        padding = np.zeros((batch_size - len(batch), *batch.shape[1:]), batch.dtype)
        working = len(batch), encode.batch(state, np.concatenate([batch, padding]))
    assert working is not None
    finish(*working)
    backbone, projection = (np.concatenate(parts) for parts in zip(*done, strict=True))
    if encode.head is not None:
        projection = np.asarray(encode.head(state, backbone))
    return Extracted(backbone, projection)
