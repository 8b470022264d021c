"""The network and the algorithm of a configuration."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.adversary import Adversary, decoder_adversary
from mocosfl_jax.algorithm.clients import Sync
from mocosfl_jax.algorithm.flmoco import flmoco
from mocosfl_jax.algorithm.interface import Algorithm, TrainState
from mocosfl_jax.algorithm.moco import MomentumContrast
from mocosfl_jax.algorithm.mocosfl import mocosfl
from mocosfl_jax.algorithm.noise import Noise
from mocosfl_jax.config import Resolved, name_of
from mocosfl_jax.errors import UserError, one_line, renamed
from mocosfl_jax.evaluation.features import Head
from mocosfl_jax.feed.augment import unnormalise
from mocosfl_jax.models import SplitModel, split_model
from mocosfl_jax.models.decoders import make_decoder
from mocosfl_jax.models.forms import ACCELERATOR, Forms
from mocosfl_jax.parallel import exchange, state
from mocosfl_jax.privacy.similarity import ssim

# The fields of a configuration that give the arguments of `split_model`.
FIELDS = {
    "name": "config.model.name",
    "cut_layer": "config.model.cut_layer",
    "width": "config.model.width",
    "image_size": "config.data.image_size",
    "stem_stride": "config.model.stem_stride",
    "key_dim": "config.moco.key_dim",
    "head": "config.moco.head",
    "bottleneck": "config.model.bottleneck",
    "client_residual": "config.model.client_residual",
    "weight_standardisation": "config.model.weight_standardisation",
    "norm": "config.model.norm",
    "init": "config.model.init",
    "compute_dtype": "config.model.compute_dtype",
}

# The fields that give the arguments of `make_decoder`.
RESIST_FIELDS = {"decoder": "config.resist.decoder"}

_NOISE_KEY = 1 << 30  # sets the draws of the noise apart from the run's others; no epoch has this number

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel
NOT_NORMALISED: Statistics = ((0.0,) * 3, (1.0,) * 3)


def build(
    config: Resolved,
    mesh: Mesh,
    forms: Forms,
    *,
    image_size: int,
    steps_per_epoch: int = 1,
    batch_sizes: list[int] | None = None,
    images: list[int] | None = None,
    statistics: Statistics = NOT_NORMALISED,
) -> tuple[SplitModel, Algorithm]:
    """Build the network and the algorithm of a configuration, without its data.

    Args:
      config: the resolved configuration.
      mesh: the mesh on which the algorithm's states are placed.
      forms: the forms for the mesh's platform.
      image_size: in pixels.
      steps_per_epoch: for the schedules; irrelevant if nothing is trained.
      batch_sizes: [M], for each place in the cohort; None: they are equal, or nothing is trained.
      images: [N], number of images of each client, for weighted averages; None: nothing is trained.
      statistics: mean and standard deviation by which images are normalised; irrelevant if nothing is
        trained.

    Returns:
      The network, and the algorithm with its states on the mesh.
    """
    model = build_model(config, image_size, forms)
    of_clients = client_optimizer(config, steps_per_epoch)
    arguments: dict[str, Any] = {
        "num_clients": config.clients.num,
        "moco": MomentumContrast(
            queue_size=config.moco.queue_size,
            temperature=config.moco.temperature,
            momentum=config.moco.momentum,
            symmetric=config.moco.symmetric,
            full_symmetric=config.moco.full_symmetric,
            feature_sharing=config.moco.feature_sharing,
            concatenate=config.moco.concatenate,
        ),
        "sync": Sync(
            weights=np.array(images, np.float32) if config.sync.weighted and images is not None else None,
            momentum_models=config.sync.momentum_models,
            buffers=config.sync.buffers,
            divergence_lambda=config.sync.divergence_lambda,
        ),
        "placement": exchange.make_placement(mesh, forms),
    }
    if config.algorithm == "flmoco":
        assert of_clients is not None  # the configuration refuses a rate of 0
        arguments |= {"optimizer": of_clients}
    else:
        arguments |= {
            "batch_sizes": batch_sizes,
            "client_optimizer": of_clients,
            "server_optimizer": server_optimizer(config, steps_per_epoch),
        }
        if (noise := noise_of(config)) is not None:
            arguments["noise"] = noise
        if config.resist.strength:
            arguments["adversary"] = _adversary(config, model, forms, image_size, steps_per_epoch, statistics)
    with renamed({"moco.queue_size": "config.moco.queue_size"}):
        if config.own.algorithm is not None:
            make = _own("config.own.algorithm", config.own.algorithm, "config, model, arguments")
            algorithm = make(config, model, arguments)
        else:
            algorithm = (flmoco if config.algorithm == "flmoco" else mocosfl)(model, **arguments)
    if not isinstance(algorithm, Algorithm):
        found = type(algorithm).__name__
        raise UserError(f"config.own.algorithm: found a function that returns {found}, allowed: Algorithm")
    return model, state.distribute(algorithm, mesh)


def noise_of(config: Resolved) -> Noise | None:
    """Return the noise in the clients' smashed data; None if there is none."""
    settings = config.privacy
    if not settings.noise:
        return None
    return Noise(jax.random.fold_in(jax.random.key(config.seed), _NOISE_KEY), settings.noise, settings.clip)


def _adversary(
    config: Resolved,
    model: SplitModel,
    forms: Forms,
    image_size: int,
    steps_per_epoch: int,
    statistics: Statistics,
) -> Adversary:
    """The decoder that is trained against the clients, by the official code's recipe or without its slips."""
    settings, faithful = config.resist, config.resist.preset == "faithful"
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    if not jax.tree.leaves(params):
        raise UserError(
            f"config.resist.strength: found {settings.strength:g} and clients without parameters, allowed: 0"
        )
    with renamed(RESIST_FIELDS):
        decoder = make_decoder(
            settings.decoder, smashed_shape(model, image_size), image_size, forms, stacked=False, xavier=True
        )
    # The official learning rate falls while the clients' is still high.
    rate = optim.schedule(
        "multistep" if faithful else "constant",
        settings.decoder_lr,
        epochs=config.total_epochs,
        steps_per_epoch=steps_per_epoch,
        decay=0.2,
        milestones=(0.3, 0.6, 0.8),
    )
    return decoder_adversary(
        decoder,
        ssim,
        partial(unnormalise, mean=statistics[0], std=statistics[1]),
        strength=settings.strength,
        target=settings.ssim_target,
        hinge="batch" if faithful else "image",
        batch_statistics=not faithful,
        optimizer=optim.adam(rate),
        steps_per_epoch=steps_per_epoch,
    )


def smashed_shape(model: SplitModel, image_size: int) -> tuple[int, int, int]:
    """Return the shape (h, w, c) of one image's smashed data."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    _, height, width, channels = jax.eval_shape(model.client, params, image).shape
    return height, width, channels


# A function like `config.own.algorithm`.
MakeAlgorithm = Callable[[Resolved, SplitModel, dict[str, Any]], Algorithm]


def _own(field: str, function: Callable[..., Any], parameters: str) -> Callable[..., Any]:
    """A function of your own, whose parameters are checked and whose errors get a note with its field."""
    try:
        inspect.signature(function).bind(*parameters.split(", "))
    except TypeError as error:
        raise UserError(
            f"{field}: found a function of {inspect.signature(function)}, allowed: of ({parameters})"
        ) from error

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            error.add_note(f"This was raised by `{field}`, {name_of(function)}.")
            raise

    return call


def server_optimizer(config: Resolved, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the optimizer of the server."""
    settings = config.optim
    rate = optim.schedule(
        settings.schedule, settings.server_lr, epochs=config.total_epochs, steps_per_epoch=steps_per_epoch
    )
    return optim.sgd(rate, settings.momentum, settings.weight_decay)


def client_optimizer(config: Resolved, steps_per_epoch: int) -> optax.GradientTransformation | None:
    """Return the optimizer of one client; None for frozen clients.

    Example:
      >>> from mocosfl_jax.config import quickstart, resolve
      >>> config = quickstart()
      >>> config.optim.client_lr = 0.0
      >>> client_optimizer(resolve(config), steps_per_epoch=60) is None
      True
    """
    settings = config.optim
    if settings.client_lr == 0:
        return None
    name, steps_per_decay, own_steps = settings.client_schedule, steps_per_epoch, False
    if name == "official_per_step":
        name, steps_per_decay, own_steps = settings.schedule, 1, config.clients_skip_steps
    rate = optim.schedule(
        name, settings.client_lr, epochs=config.total_epochs, steps_per_epoch=steps_per_decay, decay=0.2
    )
    return optim.sgd(rate, settings.momentum, settings.weight_decay, own_steps=own_steps)


def network_arguments(config: Resolved, image_size: int) -> dict[str, Any]:
    """Return the arguments of `split_model` that describe the network of a configuration."""
    given = {
        argument: attrgetter(field.removeprefix("config."))(config) for argument, field in FIELDS.items()
    }
    return given | {"image_size": image_size}


def constant_network(model: SplitModel) -> Callable[..., SplitModel]:
    """Return a function like `config.own.network` that always gives this network."""

    def network(config: Resolved, image_size: int, forms: Forms) -> SplitModel:
        return model

    return network


def network_record(config: Resolved, image_size: int) -> dict[str, Any]:
    """Describe the network in plain values: arguments of `split_model`, or the name of your own function."""
    if config.own.network is None:
        return network_arguments(config, image_size)
    return {"function": name_of(config.own.network), "key_dim": config.moco.key_dim}


def build_model(config: Resolved, image_size: int, forms: Forms = ACCELERATOR) -> SplitModel:
    """Build the network of a configuration, for images of `image_size` pixels."""
    if config.own.network is None:
        stacked_server = config.algorithm == "flmoco" or not config.moco.concatenate
        with renamed(FIELDS):
            return split_model(
                **network_arguments(config, image_size), stacked_server=stacked_server, forms=forms
            )
    network = _own("config.own.network", config.own.network, "config, image_size, forms")
    model = network(config, image_size, forms)
    if not isinstance(model, SplitModel):
        raise UserError(
            f"config.own.network: found a function that returns {type(model).__name__}, allowed: SplitModel"
        )
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32)
    try:
        jax.eval_shape(lambda rng, x: model.whole_backbone(model.init(rng), x), jax.random.key(0), images)
    except Exception as error:
        raise UserError(
            f"config.own.network: found a network that fails for images of {image_size}x{image_size}x3, the "
            f"size of the data, allowed: one for the `image_size` that the function gets ({one_line(error)})"
        ) from error
    return model


def online_models(algorithm: Algorithm, state: TrainState) -> tuple[Any, Any]:
    """Return the online models of both sides, without computing a mean of the pool's momentum models."""
    online: tuple[Any, Any] = jax.jit(lambda state: algorithm.models(state).online)(state)
    return online


def whole_head(config: Resolved, model: SplitModel, algorithm: Algorithm, mesh: Mesh) -> Head | None:
    """Return the compiled head of a run's encoder, on as many rows as it is given.

    Args:
      config: the resolved configuration.
      model: its network.
      algorithm: whose states hold the models.
      mesh: of the states.

    Returns:
      The head for `make_encode`; None for a head that is known to treat each row by itself.
    """
    if config.moco.head != "mlp_bn" and config.own.network is None:
        return None

    def head(state: TrainState, backbone: Array) -> Array:
        _, server_params = algorithm.models(state).online
        with renamed(FIELDS):
            return model.head(server_params, backbone)

    return jax.jit(head, out_shardings=NamedSharding(mesh, P()))
