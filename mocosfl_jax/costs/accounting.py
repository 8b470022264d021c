"""Computation, memory and traffic of a configuration, for each client and the server, from shapes alone."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mocosfl_jax import data
from mocosfl_jax.config import Resolved, name_of
from mocosfl_jax.costs.flops import (
    backward_flops,
    forward_flops,
    kept_bytes,
    size_in_bytes,
)
from mocosfl_jax.errors import UserError
from mocosfl_jax.models import SplitModel
from mocosfl_jax.models.forms import PLAIN
from mocosfl_jax.training.build import build_model


class Plan(NamedTuple):
    """The numbers of a run that determine its costs, besides the network."""

    image_size: int  # in pixels
    images: int  # training images, divided evenly among the clients
    num_clients: int  # N
    cohort: int  # M, clients per epoch
    batch_size: int  # B, images per client and step
    epochs: int  # of the run; each client takes part in epochs * M / N of them
    steps: int  # per epoch
    syncs: int  # synchronizations per epoch
    queue_size: int  # K
    symmetric: bool = True  # the server contrasts both views (symmetric loss)
    frozen: bool = False  # the client-side models are not trained
    momentum_models: bool = False  # synchronizations average the momentum models too (MonAcoSFL)
    buffers: bool = False  # synchronizations average the SGD buffers too
    full_symmetric: bool = False  # the clients run both of their models on both views
    feature_sharing: bool = True  # one queue for all clients; otherwise K // N keys per client

    @property
    def keys(self) -> int:
        """Keys in the queue that a query is compared with."""
        return self.queue_size if self.feature_sharing else self.queue_size // self.num_clients

    @property
    def client_views(self) -> int:
        """Views of an image that go through each of a client's two models."""
        return 2 if self.full_symmetric else 1

    @property
    def server_views(self) -> int:
        """Views of an image that go through each of the server's two models."""
        return 2 if self.symmetric or self.full_symmetric else 1


class Flops(NamedTuple):
    """FLOPs of training on one image. A multiply-add of a convolution or a matrix product counts as two.

    Element-wise work, reductions and augmentation are not counted.
    """

    online: int  # forward passes of the online model
    momentum: int  # forward passes of the momentum model
    backward: int  # gradients of the parameters, and on the server of the smashed data
    contrast: int  # queries times queue, and its gradient; on the server only


class Memory(NamedTuple):
    """Bytes that one side holds during a training step.

    Temporary buffers within a pass, the momentum model's forward passes, the program and the stored images
    are not counted.
    """

    parameters: int
    momentum_model: int
    gradient: int
    sgd_buffer: int
    activations: int  # all arrays that jax.vjp keeps for the backward pass; a compiler may keep fewer
    queue: int  # on the server only


class ClientBytes(NamedTuple):
    """Bytes sent between one client and the server."""

    smashed_up: int  # per step, for a client in the cohort: smashed data of query and key views
    smashed_down: int  # per step, for a client in the cohort: gradients of smashed data
    weights_up: int  # per synchronization, for a client in the cohort
    weights_down: int  # per synchronization, for every client


class Span(NamedTuple):
    """An amount per step, per epoch and for the whole run."""

    step: int
    epoch: int
    run: int


class Side(NamedTuple):
    """The costs of one client, or of the server with all its clients.

    A client's step and epoch are those of a client in the cohort; its run is that of the average client.
    """

    flops_per_image: Flops
    flops: Span
    memory: Memory
    up: Span  # bytes from the client, or from all clients
    down: Span  # bytes to the client, or to all clients


class Paper(NamedTuple):
    """One client's run in the accounting of Li et al. 2023, table 1, see `paper_costs`."""

    flops_per_image: int  # a multiply-add counts as one
    flops: int
    weights: int  # bytes
    smashed: int  # bytes


class Costs(NamedTuple):
    """What a run costs on both sides of the cut."""

    plan: Plan
    parameters: int  # of one client-side model
    client: Side
    server: Side
    paper: Paper


class Shapes(NamedTuple):
    """Shapes of both sides of a model for n images, as trees of jax.ShapeDtypeStruct."""

    client_params: Any
    server_params: Any
    images: Any  # [n, H, W, 3]
    smashed: Any  # [n, h, w, c]


def shapes_of(model: SplitModel, image_size: int, n: int) -> Shapes:
    """Return the shapes of a model's parameters, images and smashed data, for n images."""
    client_params, server_params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((n, image_size, image_size, 3), "float32")
    return Shapes(client_params, server_params, images, jax.eval_shape(model.client, client_params, images))


def client_flops(model: SplitModel, plan: Plan) -> Flops:
    """FLOPs of one client for one of its images. A frozen client has no backward pass."""
    params, _, image, _ = shapes_of(model, plan.image_size, 1)
    forward = plan.client_views * forward_flops(model.client, params, image)
    backward = plan.client_views * backward_flops(model.client, params, image, of_input=False)
    return Flops(online=forward, momentum=forward, backward=0 if plan.frozen else backward, contrast=0)


def server_flops(model: SplitModel, plan: Plan) -> Flops:
    """FLOPs of the server for one image. Frozen clients need no gradients of their smashed data."""
    _, params, _, smashed = shapes_of(model, plan.image_size, 2)  # a head with batch norm refuses one image
    project = _projection(model)
    forward = plan.server_views * forward_flops(project, params, smashed) // 2
    backward = plan.server_views * backward_flops(project, params, smashed, of_input=not plan.frozen) // 2
    products = plan.server_views * 2 * model.key_dim * plan.keys  # products of queries and keys
    return Flops(online=forward, momentum=forward, backward=backward, contrast=2 * products)


def client_memory(model: SplitModel, plan: Plan) -> Memory:
    """Bytes of one client. A frozen client has a momentum model too, which moves towards the online model."""
    params, _, batch, _ = shapes_of(model, plan.image_size, plan.client_views * plan.batch_size)
    weights = size_in_bytes(params)
    if plan.frozen:
        return Memory(weights, weights, gradient=0, sgd_buffer=0, activations=0, queue=0)
    activations = kept_bytes(model.client, params, batch, of_input=False)
    return Memory(weights, weights, weights, weights, activations, queue=0)


def server_memory(model: SplitModel, plan: Plan) -> Memory:
    """Bytes of the server, for the concatenated smashed data of the cohort."""
    images = plan.server_views * plan.cohort * plan.batch_size
    _, params, _, merged = shapes_of(model, plan.image_size, images)
    weights = size_in_bytes(params)
    activations = kept_bytes(_projection(model), params, merged, of_input=not plan.frozen)
    keys = plan.keys * (1 if plan.feature_sharing else plan.num_clients)
    return Memory(weights, weights, weights, weights, activations, queue=4 * keys * model.key_dim)


def _projection(model: SplitModel) -> Callable[[Any, Any], Any]:
    return lambda params, smashed: model.server(params, smashed).projection


def client_traffic(model: SplitModel, plan: Plan) -> ClientBytes:
    """Bytes sent between one client and the server, without the first download of the model.

    The client sends the smashed data of queries and keys and receives the gradients of the queries only, and
    none where it has no parameters. A frozen client receives no gradients and does not synchronize.
    """
    params, _, _, smashed = shapes_of(model, plan.image_size, plan.client_views * plan.batch_size)
    if plan.frozen:
        return ClientBytes(2 * size_in_bytes(smashed), smashed_down=0, weights_up=0, weights_down=0)
    weights = size_in_bytes(params) * (1 + plan.momentum_models + plan.buffers)
    gradients = size_in_bytes(smashed) if weights else 0
    return ClientBytes(2 * size_in_bytes(smashed), gradients, weights, weights)


def paper_costs(
    model: SplitModel, image_size: int, *, images: int, epochs: int, syncs: int, frozen: bool = False
) -> Paper:
    """The costs of one client's run in the accounting of Li et al. 2023 (table 1, where a MB is 2^20 bytes).

    A FLOP is a multiply-add and a backward pass counts as two forward passes. The momentum model, its smashed
    data and the download of the weights are left out. A frozen client only has the forward pass and only
    sends smashed data.

    Args:
      model: the network, split at the cut layer.
      image_size: in pixels.
      images: number of the client's images.
      epochs: number of epochs in which the client takes part.
      syncs: synchronizations in these epochs; the official calculator has epochs // sync period.
      frozen: the client-side models are not trained.

    Example:
      >>> from mocosfl_jax import split_model
      >>> paper = paper_costs(split_model("resnet18", cut_layer=1), 32, images=50, epochs=200, syncs=200)
      >>> round(paper.weights / 2**20, 2), round(paper.smashed / 2**20)
      (1.42, 5000)
    """
    params, _, image, smashed = shapes_of(model, image_size, 1)
    passes, directions = (1, 1) if frozen else (3, 2)
    flops_per_image = passes * forward_flops(model.client, params, image) // 2
    return Paper(
        flops_per_image=flops_per_image,
        flops=epochs * images * flops_per_image,
        weights=0 if frozen else syncs * size_in_bytes(params),
        smashed=directions * epochs * images * size_in_bytes(smashed),
    )


def costs(model: SplitModel, plan: Plan) -> Costs:
    """Return what a run costs, with the paper's accounting for comparison."""
    clients, cohort = plan.num_clients, plan.cohort
    traffic = client_traffic(model, plan)
    smashed_up, smashed_down = plan.steps * traffic.smashed_up, plan.steps * traffic.smashed_down
    weights_up, weights_down = plan.syncs * traffic.weights_up, plan.syncs * traffic.weights_down

    def taking_part(epoch: int) -> int:
        """The run of the average client, given one of its epochs in the cohort."""
        return plan.epochs * cohort * epoch // clients

    flops = client_flops(model, plan)
    step = plan.batch_size * sum(flops)
    client = Side(
        flops_per_image=flops,
        flops=Span(step, plan.steps * step, taking_part(plan.steps * step)),
        memory=client_memory(model, plan),
        up=Span(traffic.smashed_up, smashed_up + weights_up, taking_part(smashed_up + weights_up)),
        down=Span(
            traffic.smashed_down,
            smashed_down + weights_down,
            taking_part(smashed_down) + plan.epochs * weights_down,  # also outside the cohort
        ),
    )

    def span(step: int, epoch: int) -> Span:
        return Span(step, epoch, plan.epochs * epoch)

    flops = server_flops(model, plan)
    step = cohort * plan.batch_size * sum(flops)
    server = Side(
        flops_per_image=flops,
        flops=span(step, plan.steps * step),
        memory=server_memory(model, plan),
        up=span(cohort * traffic.smashed_up, cohort * (smashed_up + weights_up)),
        down=span(cohort * traffic.smashed_down, cohort * smashed_down + clients * weights_down),
    )
    epochs = taking_part(1)
    paper = paper_costs(
        model,
        plan.image_size,
        images=plan.images // clients,
        epochs=epochs,
        syncs=epochs * plan.syncs,
        frozen=plan.frozen,
    )
    params = shapes_of(model, plan.image_size, 1).client_params
    return Costs(plan, sum(leaf.size for leaf in jax.tree.leaves(params)), client, server, paper)


def from_config(config: Resolved, images: int | None = None, image_size: int | None = None) -> Costs:
    """Return what the run of a configuration costs.

    Args:
      config: the resolved configuration.
      images: number of training images; None: the known number for config.data.name.
      image_size: in pixels; None: the known size for config.data.name. config.data.image_size overrides
        both.

    Raises:
      UserError: if the size of the data set is unknown, or the clients or the model do not fit it.

    Example:
      >>> from mocosfl_jax.config import quickstart, resolve
      >>> costs = from_config(resolve(quickstart()))
      >>> costs.parameters, costs.plan.steps, costs.client.memory.parameters  # 4 bytes per parameter
      (240, 60, 960)
    """
    clients, moco = config.clients, config.moco
    for field, value, allowed in (
        ("algorithm", config.algorithm, "mocosfl"),
        ("clients.rich", clients.rich, 0),
        ("moco.concatenate", moco.concatenate, True),
        # With a threshold, the traffic of a run depends on its loss.
        ("saving.loss_threshold", config.saving.loss_threshold, 0),
        ("resist.strength", config.resist.strength, 0),
        ("resist.source", config.resist.source, None),
        ("resist.target_share", config.resist.target_share, 1),
    ):
        if value != allowed:
            raise UserError(
                f"config.{field}: found {value}, allowed: {allowed} (other costs are not modelled)"
            )
    if config.own.algorithm is not None:
        found = name_of(config.own.algorithm)
        raise UserError(f"config.own.algorithm: found {found}, allowed: None (other costs are not modelled)")
    known_images, known_size = data.SIZES.get(config.data.name, (None, None))
    given, images = images, images or known_images
    image_size = config.data.image_size or image_size or known_size
    if images is None:
        raise UserError(
            f"--images: found None for {config.data.name}, allowed: its number of training images"
        )
    if image_size is None:
        raise UserError(f"--image_size: found None for {config.data.name}, allowed: its image size in pixels")
    most = images // clients.batch_size
    if not most and given:
        raise UserError(
            f"--images: found {given}, allowed: {clients.num * clients.batch_size} or more (a batch of "
            f"{clients.batch_size} for each of {clients.num} clients)"
        )
    if not most:
        raise UserError(
            f"config.clients.batch_size: found {clients.batch_size}, allowed: 1 to {images} (images of "
            f"{config.data.name})"
        )
    if clients.num > most:
        raise UserError(
            f"config.clients.num: found {clients.num}, allowed: 1 to {most} "
            f"({images} images in batches of {clients.batch_size} per client)"
        )
    model = build_model(config, image_size, PLAIN)
    steps = math.ceil(images / (clients.num * clients.batch_size))
    plan = Plan(
        image_size=image_size,
        images=images,
        num_clients=clients.num,
        cohort=clients.cohort,
        batch_size=clients.batch_size,
        epochs=config.total_epochs,
        steps=steps,
        syncs=math.ceil(steps / max(1, steps // config.sync.frequency)),
        queue_size=moco.queue_size,
        symmetric=moco.symmetric,
        frozen=config.optim.client_lr == 0,
        momentum_models=config.sync.momentum_models,
        buffers=config.sync.buffers == "average",
        full_symmetric=moco.full_symmetric,
        feature_sharing=moco.feature_sharing,
    )
    return costs(model, plan)
