"""A network cut in two: the client's first layers and the server's rest."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mocosfl_jax.errors import UserError
from mocosfl_jax.models import mobilenetv2, resnet, vgg
from mocosfl_jax.models.bottleneck import ClientBottleneck, ServerBottleneck, read_bottleneck
from mocosfl_jax.models.forms import ACCELERATOR, Forms
from mocosfl_jax.models.layers import HEADS, NORMS, Layer, Options, ProjectionHead

Params = Any  # a tree of arrays


class Features(NamedTuple):
    """What the whole network says of n images."""

    backbone: Array  # [..., n, D], globally average-pooled; float32 at least
    projection: Array  # [..., n, key_dim], output of the head, not normalised; float32 at least


class SplitModel(NamedTuple):
    """Pure functions of one client-side and one server-side model.

    Any network fits: `mocosfl` uses nothing but these five. Client and backbone treat each image by itself,
    so that the images of a batch can be on different devices; in the head they may meet (batch norm).
    """

    init: Callable[[Array], tuple[Params, Params]]  # rng -> client params, server params
    client: Callable[[Params, Array], Array]  # params, images [n, H, W, 3] -> smashed data [n, h, w, c]
    # The server's layers: params, smashed data [..., n, h, w, c] -> pooled features [..., n, D]
    backbone: Callable[[Params, Array], Array]
    # Of the server too: params, pooled features -> [..., n, key_dim]; leading axes are batches of their own
    head: Callable[[Params, Array], Array]
    key_dim: int  # width of the projection

    def server(self, params: Params, smashed: Array) -> Features:
        """The server-side model on smashed data [..., n, h, w, c]."""
        backbone = self.backbone(params, smashed)
        return Features(backbone, self.head(params, backbone))

    def whole_backbone(self, params: tuple[Params, Params], images: Array) -> Array:
        """Client, then backbone: images [..., n, H, W, 3] -> pooled features [..., n, D]."""
        client, server = params
        smashed = self.client(client, images.reshape(-1, *images.shape[-3:]))
        return self.backbone(server, smashed.reshape(*images.shape[:-3], *smashed.shape[1:]))


class _Client(nn.Module):
    """The layers before the cut; without any, the identity (in the dtype of the activations)."""

    layers: Sequence[Callable[..., nn.Module]]
    options: Options

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = self.options.cast(images)
        for layer in self.layers:
            x = layer(options=self.options)(x)
        return x


class _Server(nn.Module):
    """The layers after the cut, global average pool and projection head."""

    layers: Sequence[Callable[..., nn.Module]]
    options: Options
    head: ProjectionHead

    def __call__(self, smashed: Array) -> Array:
        return self.head(self.backbone(smashed))

    @nn.compact
    def backbone(self, smashed: Array) -> Array:
        x = smashed.reshape(-1, *smashed.shape[-3:])
        for layer in self.layers:
            x = layer(options=self.options)(x)
        # Pooled features and projections are not rounded: the loss and the evaluation are made of them.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.mean(x, axis=(1, 2)).reshape(*smashed.shape[:-3], -1)


# What config.model.compute_dtype stands for, as Options.dtype.
COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}

NAMES = (*resnet.DEPTHS, *vgg.ENTRIES, mobilenetv2.NAME)


def _paper_width(name: str) -> int:
    if name in resnet.DEPTHS:
        return resnet.WIDTH
    return vgg.WIDTH if name in vgg.ENTRIES else mobilenetv2.WIDTH


def _layers(name: str, *, width: int, image_size: int, stem_stride: int | None) -> list[Layer]:
    """All layers between images and global average pool."""
    stride = stem_stride or (2 if image_size == 64 or image_size >= 224 else 1)
    if name in resnet.DEPTHS:
        return resnet.resnet_layers(name, width=width, image_size=image_size, stem_stride=stride)
    if name in vgg.ENTRIES:
        return vgg.vgg_layers(name, width=width)
    return mobilenetv2.mobilenetv2_layers(width=width, stem_stride=stride)


def check_model(
    name: str,
    *,
    cut_layer: int,
    width: int | None = None,
    image_size: int | None = None,
    stem_stride: int | None = None,
    head: str = "mlp",
    bottleneck: str | None = None,
    norm: str = "group",
    compute_dtype: str = "float32",
) -> None:
    """Raise UserError, which says what is allowed, if there is no such network or no such cut.

    An `image_size` of None is one that is not known yet.
    """
    if name not in NAMES:
        raise UserError(f"config.model.name: found {name!r}, allowed: {', '.join(NAMES)}")
    paper = _paper_width(name)
    step = 16 if name == mobilenetv2.NAME else 4
    if width is not None and (width < step or width % step):
        raise UserError(
            f"config.model.width: found {width}, allowed: multiples of {step} for {name}, "
            f"or None for the paper's {paper} (all layers need multiples of 4 channels)"
        )
    last = len(_layers(name, width=paper, image_size=32, stem_stride=None)) - 1
    if not 0 <= cut_layer <= last:
        if name in resnet.DEPTHS:
            what = f"stem and {last} blocks"
        elif name in vgg.ENTRIES:
            what = f"{last + 1} convolutions and max-pools"
        else:
            what = f"stem, {len(mobilenetv2.GROUPS)} groups of blocks and last convolution"
        raise UserError(
            f"config.model.cut_layer: found {cut_layer}, allowed: 0 to {last} for {name} "
            f"(how many of {what} are the client's; the server keeps at least one)"
        )
    if name in vgg.ENTRIES and stem_stride is not None:
        raise UserError(
            f"config.model.stem_stride: found {stem_stride}, allowed: None for {name}, which has no stem"
        )
    if stem_stride not in (None, 1, 2, 4):
        raise UserError(f"config.model.stem_stride: found {stem_stride}, allowed: None, 1, 2 or 4")
    if name in vgg.ENTRIES and image_size is not None and image_size < vgg.SMALLEST_IMAGE:
        raise UserError(
            f"config.data.image_size: found {image_size}, allowed: {vgg.SMALLEST_IMAGE} or more for {name}, "
            "which has five max-pools"
        )
    if norm not in NORMS:
        raise UserError(f"config.model.norm: found {norm!r}, allowed: {', '.join(NORMS)}")
    if compute_dtype not in COMPUTE_DTYPES:
        raise UserError(
            f"config.model.compute_dtype: found {compute_dtype!r}, allowed: {', '.join(COMPUTE_DTYPES)}"
        )
    if head not in HEADS:
        raise UserError(f"config.moco.head: found {head!r}, allowed: {', '.join(HEADS)}")
    if bottleneck is not None:
        read_bottleneck(bottleneck)
        if cut_layer == 0:
            raise UserError(
                f"config.model.bottleneck: found {bottleneck!r}, allowed: None where cut_layer is 0"
            )


def split_model(
    name: str,
    *,
    cut_layer: int,
    width: int | None = None,
    image_size: int = 32,
    stem_stride: int | None = None,
    key_dim: int = 1024,
    head: str = "mlp",
    bottleneck: str | None = None,
    client_residual: bool = True,
    weight_standardisation: bool = True,
    norm: str = "group",
    compute_dtype: str = "float32",
    stacked_server: bool = False,
    forms: Forms = ACCELERATOR,
) -> SplitModel:
    """A network cut after its first `cut_layer` layers.

    What a layer is: of a ResNet the stem and each block; of a VGG each convolution (with norm and ReLU)
    and each max-pool; of MobileNetV2 the stem, each of the seven groups of blocks and the last convolution.

    Args:
      name: resnet18, 34, 50, 101 or 152, vgg11, 13, 16 or 19, or mobilenetv2.
      cut_layer: how many layers are the client's. With 0 a client has no parameters and its smashed data
        are the images: MoCo on the server. At least one layer stays with the server.
      width: channels of the first convolution, and all others in proportion; a multiple of 4, for
        mobilenetv2 of 16. None takes the paper's: 64, for mobilenetv2 32.
      image_size: pixels a side; at least 32 for a VGG.
      stem_stride: None takes 2 for images of 64 px and from 224 px on, else 1. A VGG has no stem and refuses
        a value.
      key_dim: width of query and key embeddings.
      head: "linear" (MoCo V1), "mlp" with a hidden layer of key_dim, from ResNet-50 on of four times
        key_dim (V2), or "mlp_bn" with a batch-normalised hidden layer of twice key_dim (large V2).
      bottleneck: layers at the cut that shrink the smashed data, such as "C4S2"; see `read_bottleneck`.
      client_residual: whether the client's blocks have their shortcuts.
      weight_standardisation: of the kernels of all convolutions but those of the bottleneck layers and of
        MobileNetV2's shortcuts. A ResNet's stem and the shortcuts of its bottleneck blocks have it anyway.
      norm: "group" of four channels, "layer" (all channels together) or "instance" (each by itself).
      compute_dtype: "float32", or "bfloat16": mixed precision, for accelerators. Convolutions, activations
        and the smashed data are then bfloat16; parameters, the statistics of norms, pooled features and the
        projection head stay float32. (Where JAX's float64 is on, "float32" computes in that.) A CPU gains
        nothing: its bfloat16 convolutions can be slower.
      stacked_server: the server too is to be vmapped over stacked parameters, as clients are.
      forms: of the platform on which the model will run, see `forms.forms`; the numbers are the same in all.

    Raises:
      UserError: if a value is not possible; the message says what is.
    """
    check_model(
        name,
        cut_layer=cut_layer,
        width=width,
        image_size=image_size,
        stem_stride=stem_stride,
        head=head,
        bottleneck=bottleneck,
        norm=norm,
        compute_dtype=compute_dtype,
    )
    layers = _layers(name, width=width or _paper_width(name), image_size=image_size, stem_stride=stem_stride)
    client_layers = [layer.module for layer in layers[:cut_layer]]
    server_layers = [layer.module for layer in layers[cut_layer:]]
    if bottleneck is not None:
        read, channels = read_bottleneck(bottleneck), layers[cut_layer - 1].channels
        client_layers.append(functools.partial(ClientBottleneck, read, name="bottleneck"))
        server_layers.insert(0, functools.partial(ServerBottleneck, read, channels, name="bottleneck"))
    is_deep = name in resnet.DEPTHS and resnet.DEPTHS[name][1]
    mlp_dim = key_dim * (resnet.BOTTLENECK_EXPANSION if is_deep else 1)
    hidden_dim = {"linear": None, "mlp": mlp_dim, "mlp_bn": 2 * key_dim}[head]
    single, stacked = forms.convolutions
    dtype = COMPUTE_DTYPES[compute_dtype]
    client = _Client(
        tuple(client_layers),
        Options(stacked, weight_standardisation, norm, residual=client_residual, dtype=dtype),
    )
    server = _Server(
        tuple(server_layers),
        Options(
            stacked if stacked_server else single, weight_standardisation, norm, residual=True, dtype=dtype
        ),
        ProjectionHead(key_dim, hidden_dim, batch_norm=head == "mlp_bn", name="head"),
    )

    def init(rng: Array) -> tuple[Params, Params]:
        rng_client, rng_server = jax.random.split(rng)
        images = jnp.zeros((1, image_size, image_size, 3))
        smashed, client_params = client.init_with_output(rng_client, images)
        return client_params.get("params", {}), server.init(rng_server, smashed)["params"]

    def apply_client(params: Params, images: Array) -> Array:
        smashed: Any = client.apply({"params": params}, images)
        return smashed

    def apply_backbone(params: Params, smashed: Array) -> Array:
        backbone: Any = server.apply({"params": params}, smashed, method="backbone")
        return backbone

    def apply_head(params: Params, backbone: Array) -> Array:
        projection: Any = server.head.apply({"params": params["head"]}, backbone)
        return projection

    return SplitModel(init, apply_client, apply_backbone, apply_head, key_dim)
