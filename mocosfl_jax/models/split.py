"""A network cut in two: the client's first layers and the server's rest. Any network can have this form."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError
from jax import Array

from mocosfl_jax.errors import UserError

Params = Any  # a tree of arrays
ImageShape = tuple[int, int, int]  # height, width, channels


class Features(NamedTuple):
    """Outputs of the whole network for n images, in float32 or wider."""

    backbone: Array  # [n, D]: what the head sees, after global average pooling in most networks
    projection: Array  # [n, key_dim], output of the projection head, not normalised


class SplitModel(NamedTuple):
    """A network as pure functions of one client-side and one server-side model.

    The algorithms use nothing but these five fields. `from_linen` and `from_functions` make them of a network
    of your own, with checks; `split_model` makes them of ours.

    Each function sees one batch and no other leading axes. A step runs the clients under `jax.vmap` or in a
    loop, and gives the backbone all views of all clients as one batch. Client and backbone must treat each
    image by itself, since the images of a batch come from different clients and may be on different
    devices; `check_independence` checks it. The head sees the whole batch of one view and may mix it, as
    batch norm does.
    """

    init: Callable[[Array], tuple[Params, Params]]  # rng -> params of the client, params of the server
    client: Callable[[Params, Array], Array]  # params, images [n, H, W, 3] -> smashed data [n, h, w, c]
    # The server's layers: params, smashed data [n, h, w, c] -> pooled features [n, D]
    backbone: Callable[[Params, Array], Array]
    # The server's head: params, pooled features [n, D] -> projections [n, key_dim]
    head: Callable[[Params, Array], Array]
    key_dim: int  # width of the projection

    def server(self, params: Params, smashed: Array) -> Features:
        """The server-side model on smashed data [n, h, w, c]."""
        backbone = self.backbone(params, smashed)
        return Features(backbone, self.head(params, backbone))

    def whole_backbone(self, params: tuple[Params, Params], images: Array) -> Array:
        """Client-side model and backbone: images [n, H, W, 3] -> pooled features [n, D]."""
        client, server = params
        return self.backbone(server, self.client(client, images))

    @classmethod
    def from_functions(
        cls,
        init: Callable[[Array], tuple[Params, Params]],
        client: Callable[[Params, Array], Array],
        backbone: Callable[[Params, Array], Array],
        head: Callable[[Params, Array], Array],
        image_shape: ImageShape,
    ) -> "SplitModel":
        """A network of your own as pure functions. Their shapes are checked; nothing is computed.

        Networks of other libraries become such functions by their functional split: `nnx.split` and
        `nnx.merge` in Flax NNX, `eqx.partition` and `eqx.combine` in Equinox.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from mocosfl_jax import SplitModel
          >>> def init(rng):
          ...     rngs = jax.random.split(rng, 3)
          ...     client, backbone, head = map(jax.random.normal, rngs, [(3, 8), (8, 16), (16, 4)])
          ...     return client, {"backbone": backbone, "head": head}
          >>> model = SplitModel.from_functions(
          ...     init,
          ...     client=lambda params, images: jax.nn.relu(images @ params),
          ...     backbone=lambda params, smashed: jnp.mean(smashed, axis=(1, 2)) @ params["backbone"],
          ...     head=lambda params, features: features @ params["head"],
          ...     image_shape=(8, 8, 3),
          ... )
          >>> model.key_dim
          4

        Args:
          init: As the field. All parameters are floats. A client without parameters has an empty tree.
          client: As the field.
          backbone: As the field.
          head: As the field.
          image_shape: Height, width and channels of the images.

        Raises:
          UserError: If a function returns another shape or dtype. The message names the argument. An error
            that a function raises itself gets a note with the argument.
        """
        _check_image_shape(image_shape)
        params = _shapes("init", init, jax.random.key(0))
        if not isinstance(params, tuple) or len(params) != 2:
            raise UserError(
                f"init: found a {type(params).__name__} of {len(jax.tree.leaves(params))} arrays, allowed: a "
                "pair (parameters of the client, parameters of the server)"
            )
        for path, leaf in jax.tree.leaves_with_path(params):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise UserError(
                    f"init: found {leaf.dtype} in params{jax.tree_util.keystr(path)}, allowed: floats"
                )
        x = _images(image_shape)
        for argument, function, side in (
            ("client", client, params[0]),
            ("backbone", backbone, params[1]),
            ("head", head, params[1]),
        ):
            x = _shapes(argument, function, side, x)
            _check_output(argument, x)
        return cls(init, client, backbone, head, key_dim=x.shape[1])

    @classmethod
    def from_linen(
        cls, client: nn.Module, backbone: nn.Module, head: nn.Module, image_shape: ImageShape
    ) -> "SplitModel":
        """A network of your own as three Flax Linen modules. Their shapes are checked; nothing is computed.

        Example:
          >>> import flax.linen as nn
          >>> from mocosfl_jax import SplitModel
          >>> class Backbone(nn.Module):
          ...     @nn.compact
          ...     def __call__(self, smashed):  # [n, h, w, c]
          ...         x = nn.GroupNorm(4)(nn.Conv(32, (3, 3), strides=2)(smashed))
          ...         return nn.relu(x).mean(axis=(1, 2))  # [n, D]
          >>> client = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu])
          >>> SplitModel.from_linen(client, Backbone(), nn.Dense(64), image_shape=(32, 32, 3)).key_dim
          64

        Args:
          client: Images [n, H, W, C] -> smashed data [n, h, w, c].
          backbone: Smashed data -> pooled features [n, D].
          head: Pooled features -> projections [n, key_dim].
          image_shape: Height, width and channels of the images.

        Returns:
          The network. The server's parameters are those of `backbone` and `head`, under these names.

        Raises:
          UserError: As `from_functions`, and if a module has variables other than parameters, such as the
            running statistics of batch norm, or draws random numbers, as dropout does.
        """
        _check_image_shape(image_shape)
        x = _images(image_shape)
        for argument, module in (("client", client), ("backbone", backbone), ("head", head)):
            x, variables = _shapes(argument, module.init_with_output, jax.random.key(0), x)
            for collection in set(variables) - {"params"}:
                raise UserError(
                    f"{argument}: found variables in {collection!r}, allowed: parameters only, since nothing "
                    "keeps other variables from step to step (take group or layer norm for batch norm)"
                )
            _check_output(argument, x)

        def init(rng: Array) -> tuple[Params, Params]:
            x, sides = jnp.zeros((1, *image_shape)), []
            for rng_module, module in zip(jax.random.split(rng, 3), (client, backbone, head), strict=True):
                x, variables = module.init_with_output(rng_module, x)
                sides.append(variables.get("params", {}))
            return sides[0], {"backbone": sides[1], "head": sides[2]}

        def apply(module: nn.Module, params: Params, x: Array) -> Any:
            return module.apply({"params": params}, x)

        return cls.from_functions(
            init,
            partial(apply, client),
            lambda params, smashed: apply(backbone, params["backbone"], smashed),
            lambda params, features: apply(head, params["head"], features),
            image_shape,
        )


def check_independence(
    model: SplitModel, image_shape: ImageShape, *, tolerance: float = 0.01, head: bool = False
) -> None:
    """Check that client and backbone give for an image alone what they give for it in a batch.

    The images of a batch come from different clients. A network that mixes them, by batch norm or by a mean
    over a wrong axis, trains without an error and learns something else. Here random images go through the
    network with random parameters, alone and in a batch of four.

    Example:
      >>> from mocosfl_jax import check_independence, split_model
      >>> model = split_model("resnet18", cut_layer=1, width=4, image_size=8, key_dim=8)
      >>> check_independence(model, (8, 8, 3))

    Args:
      model: The network.
      image_shape: Height, width and channels of the images.
      tolerance: The largest difference that is rounding, as a share of the largest output.
      head: Whether to check the head too, which may mix images where all clients take part in all steps.

    Raises:
      UserError: If a side mixes images. The message names it.
    """
    _check_image_shape(image_shape)
    rng_model, rng_noise, rng_images = jax.random.split(jax.random.key(0), 3)
    leaves, tree = jax.tree.flatten(jax.jit(model.init)(rng_model))
    noise = jax.random.split(rng_noise, len(leaves))
    # Parameters may start at zero and hide what follows them.
    shaken = [
        x + 0.1 * jax.random.normal(rng, x.shape, x.dtype) for x, rng in zip(leaves, noise, strict=True)
    ]
    client, server = jax.tree.unflatten(tree, shaken)
    images = _unlike(jax.random.normal(rng_images, (4, *image_shape)))
    smashed = _apart_and_together("client", model.client, client, images, tolerance)
    features = _apart_and_together("backbone", model.backbone, server, smashed, tolerance)
    if head:
        _apart_and_together("head", model.head, server, features, tolerance)


def _unlike(x: Array) -> Array:
    """Images [n, H, W, C] with a mean and a contrast of their own, so that a mean over the batch shows."""
    number = jnp.arange(len(x)).reshape(-1, 1, 1, 1)
    return (1 + number) * x + number


def _apart_and_together(
    argument: str, function: Callable[[Params, Array], Array], params: Params, x: Array, tolerance: float
) -> Array:
    """The outputs of a batch, which must be those of its images alone."""
    run = jax.jit(function)
    with jax.default_matmul_precision("highest"):
        together = run(params, x)
        apart = jnp.concatenate([run(params, x[i : i + 1]) for i in range(len(x))])
    if together.shape != apart.shape:
        raise UserError(
            f"{argument}: found an output of shape {together.shape} for a batch and {apart.shape} for its "
            "images alone, allowed: a row for each image"
        )
    largest = float(jnp.max(jnp.abs(together)))
    difference = float(jnp.max(jnp.abs(together.astype(float) - apart.astype(float))))
    if not difference <= tolerance * largest:  # also where it is not a number
        raise UserError(
            f"{argument}: found outputs of an image that change by {difference:.2g} (the largest is "
            f"{largest:.2g}) if it is in a batch, allowed: each image by itself (group or layer norm in "
            "place of batch norm, means over height and width only)"
        )
    return together


_ROWS = 5  # images in the batch of the checks, since few layers have five channels or pixels
_OUTPUTS = {
    "client": "smashed data [n, h, w, c]",
    "backbone": "pooled features [n, D]",
    "head": "projections [n, key_dim]",
}


def _images(image_shape: ImageShape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((_ROWS, *image_shape), jnp.float32)


def _check_image_shape(image_shape: ImageShape) -> None:
    if len(image_shape) != 3 or not all(isinstance(n, int) and n > 0 for n in image_shape):
        raise UserError(f"image_shape: found {image_shape}, allowed: (height, width, channels)")


def _shapes(argument: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """The shapes that `function` returns."""
    try:
        return jax.eval_shape(function, *inputs)
    except InvalidRngError as error:
        raise UserError(
            f"{argument}: found a layer that draws random numbers, allowed: none (deterministic=True for "
            "dropout), since a step gives a network no PRNG key"
        ) from error
    except Exception as error:
        error.add_note(f"This was raised by `{argument}`, called with {inputs[-1]}.")
        raise


def _check_output(argument: str, found: Any) -> None:
    allowed = _OUTPUTS[argument]
    if not isinstance(found, jax.ShapeDtypeStruct):
        raise UserError(f"{argument}: found a {type(found).__name__}, allowed: {allowed}")
    if len(found.shape) != allowed.count(",") + 1 or found.shape[0] != _ROWS:
        raise UserError(
            f"{argument}: found an output of shape {found.shape} for n = {_ROWS} images, allowed: {allowed}"
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise UserError(f"{argument}: found an output of {found.dtype}, allowed: floats")
