"""Our networks by name: the table of them, their checks, and `split_model`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mocosfl_jax.errors import UserError
from mocosfl_jax.models import mobilenetv2, resnet, vgg
from mocosfl_jax.models.bottleneck import ClientBottleneck, ServerBottleneck, read_bottleneck
from mocosfl_jax.models.forms import ACCELERATOR, Forms
from mocosfl_jax.models.layers import HEADS, INITS, NORMS, Options, ProjectionHead
from mocosfl_jax.models.network import Layer, Network
from mocosfl_jax.models.split import Params, SplitModel

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        *resnet.NETWORKS,
        *vgg.NETWORKS,
        mobilenetv2.NETWORK,
    )
}

# Values of `compute_dtype` -> Options.dtype.
COMPUTE_DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}

Module = Callable[..., nn.Module]  # called with `options`


class _Client(nn.Module):
    """The layers before the cut. Without layers it only casts to the dtype of the activations."""

    layers: Sequence[Module]
    options: Options

    @nn.compact
    def __call__(self, images: Array) -> Array:
        x = self.options.cast(images)
        for layer in self.layers:
            x = layer(options=self.options)(x)
        return x


class _Server(nn.Module):
    """The layers after the cut, the global average pool unless there is none, and the projection head."""

    layers: Sequence[Module]
    options: Options
    head: ProjectionHead
    arrange: Callable[[Array], Array]
    pooled: bool

    def __call__(self, smashed: Array) -> Array:
        return self.head(self.backbone(smashed))

    @nn.compact
    def backbone(self, smashed: Array) -> Array:
        x = self.arrange(smashed)
        for layer in self.layers:
            x = layer(options=self.options)(x)
        # Features and projections are not rounded, since loss and evaluation are computed from them.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.mean(x, axis=(1, 2)) if self.pooled else x.reshape(x.shape[0], -1)


def stem_stride_of(given: int | None, image_size: int) -> int:
    """The stride of the first convolution; None takes 2 for images of 64 pixels and of 224 or more."""
    return given or (2 if image_size == 64 or image_size >= 224 else 1)


def _layers(network: Network, *, width: int | None, image_size: int, stem_stride: int | None) -> list[Layer]:
    """All layers between the images and the last feature map. None stands for the paper's values."""
    return network.layers(
        width=width or network.paper_width,
        image_size=image_size,
        stem_stride=stem_stride_of(stem_stride, image_size),
    )


def check_model(
    name: str,
    *,
    cut_layer: int,
    width: int | None = None,
    image_size: int | None = None,
    stem_stride: int | None = None,
    key_dim: int = 1024,
    head: str = "mlp",
    bottleneck: str | None = None,
    norm: str = "group",
    init: str = "official",
    compute_dtype: str = "float32",
) -> None:
    """Check the arguments of `split_model`. An `image_size` of None is not known yet, and not checked.

    Raises:
      UserError: If there is no such network or no such cut. The message names the argument and says what is
        allowed.
    """
    if name not in NETWORKS:
        raise UserError(f"name: found {name!r}, allowed: {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    step, paper = network.width_step, network.paper_width
    if width is not None and (width < step or width % step):
        raise UserError(
            f"width: found {width}, allowed: multiples of {step} for {name}, "
            f"or None for the paper's {paper} (all layers need multiples of 4 channels)"
        )
    last = len(_layers(network, width=None, image_size=32, stem_stride=None)) - 1
    if not 0 <= cut_layer <= last:
        raise UserError(
            f"cut_layer: found {cut_layer}, allowed: 0 to {last} for {name} "
            f"(how many of {network.layers_in_words} are the client's; the server keeps at least one)"
        )
    if not network.has_stem and stem_stride is not None:
        raise UserError(f"stem_stride: found {stem_stride}, allowed: None for {name}, which has no stem")
    if stem_stride not in (None, 1, 2, 4):
        raise UserError(f"stem_stride: found {stem_stride}, allowed: None, 1, 2 or 4")
    if image_size is not None and image_size < network.smallest_image:
        raise UserError(
            f"image_size: found {image_size}, allowed: {network.smallest_image} or more for {name}, of which "
            "its layers leave one pixel"
        )
    if key_dim < 1:
        raise UserError(f"key_dim: found {key_dim}, allowed: 1 or more")
    if norm not in NORMS:
        raise UserError(f"norm: found {norm!r}, allowed: {', '.join(NORMS)}")
    if init not in INITS:
        raise UserError(f"init: found {init!r}, allowed: {', '.join(INITS)}")
    if compute_dtype not in COMPUTE_DTYPES:
        raise UserError(f"compute_dtype: found {compute_dtype!r}, allowed: {', '.join(COMPUTE_DTYPES)}")
    if head not in HEADS:
        raise UserError(f"head: found {head!r}, allowed: {', '.join(HEADS)}")
    if bottleneck is not None:
        read_bottleneck(bottleneck)
        if cut_layer == 0:
            raise UserError(f"bottleneck: found {bottleneck!r}, allowed: None where cut_layer is 0")


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
    init: str = "official",
    compute_dtype: str = "float32",
    stacked_server: bool = False,
    forms: Forms = ACCELERATOR,
) -> SplitModel:
    """A network cut after its first `cut_layer` layers.

    The layers of a ResNet are the stem and each block; those of a VGG are each convolution (with norm and
    ReLU) and each max-pool; those of MobileNetV2 are the stem, each of the seven groups of blocks and the
    last convolution.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from mocosfl_jax import split_model
      >>> model = split_model("resnet18", cut_layer=1, width=4, image_size=8, key_dim=8)
      >>> client, server = model.init(jax.random.key(0))
      >>> smashed = model.client(client, jnp.zeros((2, 8, 8, 3)))
      >>> features = model.server(server, smashed)
      >>> smashed.shape, features.backbone.shape, features.projection.shape
      ((2, 8, 8, 4), (2, 32), (2, 8))

    Args:
      name: resnet18, 34, 50, 101 or 152, vgg9, 11, 13, 16 or 19, or mobilenetv2.
      cut_layer: Number of layers on the client. With 0 a client has no parameters and its smashed data are
        the images, which is MoCo on the server. The server keeps at least one layer.
      width: Channels of the first convolution; all others scale with it. A multiple of 4, or of 16 for
        mobilenetv2. None takes the paper's width: 64, or 32 for vgg9 and mobilenetv2.
      image_size: Pixels a side; at least 32 for a VGG, or 8 for vgg9. The features of vgg9 are all values of
        its last map, so that their number depends on it; those of the others are means over the map.
      stem_stride: Stride of the first convolution, 1, 2 or 4. None takes 2 for images of 64 pixels and of 224
        or more, and 1 otherwise. A VGG has no stem and accepts None only.
      key_dim: Width of query and key embeddings.
      head: "linear" (MoCo V1); "mlp" with one hidden layer of width key_dim, or four times key_dim from
        ResNet-50 on (V2); or "mlp_bn" with a batch-normalised hidden layer of width twice key_dim (large V2).
        "mlp_bn" raises UserError when it is called on a batch of one image.
      bottleneck: Layers at the cut that shrink the smashed data, such as "C4S2"; see `read_bottleneck`.
      client_residual: Whether the client's blocks have shortcuts.
      weight_standardisation: Whether kernels of convolutions are standardised. Those of the bottleneck layers
        and of MobileNetV2's shortcuts never are; those of a ResNet's stem and of the shortcuts of its
        bottleneck blocks always are.
      norm: "group" (groups of four channels), "layer" (one group of all channels) or "instance" (one group
        per channel).
      init: "official" draws kernels and biases of weight-standardised convolutions as PyTorch does by
        default, uniform in +-1 / sqrt(fan_in), and other kernels by Xavier, with zero biases, as the official
        code does. "xavier" draws all kernels by Xavier. Standardisation hides the scale of a kernel from the
        network but not from training, so a learning rate that suits one need not suit the other.
      compute_dtype: "float32", or "bfloat16" for mixed precision on accelerators: convolutions, activations
        and smashed data are bfloat16, while parameters, statistics of norms, pooled features and the
        projection head stay float32. If JAX's float64 is enabled, "float32" computes in float64. On a CPU
        bfloat16 can be slower.
      stacked_server: Whether the server will be vmapped over stacked parameters too, as clients are, or
        called in a loop of the program, as without vector concatenation.
      forms: Forms of the platform on which the model will run, such as `forms("cpu")`. They differ in speed,
        not in the numbers. The default suits accelerators.

    Returns:
      The network. Its parameters and features are float32, its smashed data have `compute_dtype`.

    Raises:
      UserError: If a value is not allowed. The message names the argument and says what is.
    """
    check_model(
        name,
        cut_layer=cut_layer,
        width=width,
        image_size=image_size,
        stem_stride=stem_stride,
        key_dim=key_dim,
        head=head,
        bottleneck=bottleneck,
        norm=norm,
        init=init,
        compute_dtype=compute_dtype,
    )
    network = NETWORKS[name]
    layers = _layers(network, width=width, image_size=image_size, stem_stride=stem_stride)
    modules: list[Module] = [
        functools.partial(layer.module, name=f"layer{i}") for i, layer in enumerate(layers)
    ]
    client_layers, server_layers = modules[:cut_layer], modules[cut_layer:]
    if bottleneck is not None:
        read, channels = read_bottleneck(bottleneck), layers[cut_layer - 1].channels
        client_layers.append(functools.partial(ClientBottleneck, read, name="bottleneck"))
        server_layers.insert(0, functools.partial(ServerBottleneck, read, channels, name="bottleneck"))
    hidden_dim = {"linear": None, "mlp": key_dim * network.head_expansion, "mlp_bn": 2 * key_dim}[head]
    single, stacked = forms.convolutions
    dtype = COMPUTE_DTYPES[compute_dtype]
    options = Options(
        stacked, forms.group_norm, weight_standardisation, norm, residual=True, dtype=dtype, init=init
    )
    client = _Client(tuple(client_layers), dataclasses.replace(options, residual=client_residual))
    server = _Server(
        tuple(server_layers),
        dataclasses.replace(options, conv=stacked if stacked_server else single),
        ProjectionHead(key_dim, hidden_dim, batch_norm=head == "mlp_bn", name="head"),
        forms.arrange,
        network.pooled,
    )

    def init_params(rng: Array) -> tuple[Params, Params]:
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
        if head == "mlp_bn" and backbone.shape[-2] == 1:
            raise UserError(
                "head: found mlp_bn and a batch of one image, whose batch norm is constant, allowed: two "
                "images or more"
            )
        projection: Any = server.head.apply({"params": params["head"]}, backbone)
        return projection

    return SplitModel(init_params, apply_client, apply_backbone, apply_head, key_dim)
