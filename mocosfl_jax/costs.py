"""What a configuration costs each client and the server: computation, memory and traffic. Nothing is trained.

    python -m mocosfl_jax.costs [--config=FILE[:PARAMETER]] [--config.FIELD=VALUE ...]
                                [--images=NUMBER] [--image_size=PIXELS] [--json]

No data is read: --images (training images of the data set) and --image_size are for data sets whose size is
not known here (imagenet12's is known approximately). --json prints the same numbers, in bytes and FLOPs.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.extend import core

from mocosfl_jax import commandline, data
from mocosfl_jax.commandline import say
from mocosfl_jax.config import Config
from mocosfl_jax.errors import UserError
from mocosfl_jax.experiment import build_model
from mocosfl_jax.models import SplitModel, convolution

USAGE = "--config=FILE, --config.FIELD=VALUE, --images=NUMBER, --image_size=PIXELS, --json, --help"


class Plan(NamedTuple):
    """The numbers of a run, beside its network, that set what it costs."""

    image_size: int  # pixels a side
    images: int  # of the training set, dealt evenly to the clients
    num_clients: int  # N
    cohort: int  # M, clients in an epoch
    batch_size: int  # B, images a client and step
    epochs: int  # of the run; a client takes part in epochs * M / N of them
    steps: int  # an epoch
    syncs: int  # synchronizations an epoch
    queue_size: int  # K
    symmetric: bool = True  # the server contrasts both views
    frozen: bool = False  # the client-side models are not trained
    momentum_models: bool = False  # synchronizations average the momentum models too (MonAcoSFL)
    buffers: bool = False  # they average the SGD buffers too
    full_symmetric: bool = False  # the clients run both models on both views
    feature_sharing: bool = True  # one queue for all clients; else each has K // N keys

    @property
    def keys(self) -> int:
        """In the queue that a query meets."""
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
    """FLOPs of training on one image: two for a multiply-add of a convolution or a matrix product.

    Element-wise work, reductions and augmentation are not counted.
    """

    online: int  # forward passes of the online model
    momentum: int  # forward passes of the momentum model
    backward: int  # gradients of the parameters, and the server's of the smashed data
    contrast: int  # queries times queue and the gradient of that; the server's only


class Memory(NamedTuple):
    """Bytes that one side holds in a training step.

    Not counted: what a pass needs for a moment, momentum forward passes, program and images as stored.
    """

    parameters: int
    momentum_model: int
    gradient: int
    sgd_buffer: int
    activations: int  # all arrays that jax.vjp keeps for the backward pass; compilers may keep fewer
    queue: int  # the server's only


class Traffic(NamedTuple):
    """Bytes between one client and the server."""

    smashed_up: int  # a step, of a client in the cohort: smashed data of query and key views
    smashed_down: int  # a step, of a client in the cohort: gradients of smashed data
    weights_up: int  # a synchronization, of a client in the cohort
    weights_down: int  # a synchronization, of every client


class Span(NamedTuple):
    """The same amount in three spans of time."""

    step: int
    epoch: int
    run: int


class Side(NamedTuple):
    """One client, or the server with all its clients.

    A client's step and epoch are those of a client in the cohort, its run is the mean client's.
    """

    flops_per_image: Flops
    flops: Span
    memory: Memory
    up: Span  # bytes from the client, or from all clients
    down: Span  # bytes to the client, or to all clients


class Paper(NamedTuple):
    """One client's run in the accounting of Li et al. 2023, table 1: see `paper_costs`."""

    flops_per_image: int  # one for a multiply-add
    flops: int
    weights: int  # bytes
    smashed: int  # bytes


class Costs(NamedTuple):
    """What a run costs, on either side of the cut."""

    plan: Plan
    parameters: int  # of one client-side model
    client: Side
    server: Side
    paper: Paper


def forward_flops(function: Callable[..., Any], *shapes: Any) -> int:
    """FLOPs of function(*shapes): twice the multiply-adds of its convolutions and matrix products.

    Zeros of the padding count as in every forward pass, zeros that a dilation puts between elements do
    not: a backward pass costs what its forward pass costs, for each of its gradients.

    Args:
      function: of arrays.
      shapes: trees of arrays or jax.ShapeDtypeStruct.

    Raises:
      ValueError: if the function has a loop of unknown length.
    """
    return 2 * _multiply_adds(jax.make_jaxpr(function)(*shapes).jaxpr)


def _multiply_adds(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        match eqn.primitive.name:
            case "dot_general":
                total += _of_product(eqn)
            case "conv_general_dilated":
                total += _of_convolution(eqn)
            case "scan":
                total += eqn.params["length"] * _multiply_adds(eqn.params["jaxpr"].jaxpr)
            case "cond":
                total += max(_multiply_adds(branch.jaxpr) for branch in eqn.params["branches"])
            case "while":
                raise ValueError("found a while loop, whose length is not known before it runs")
            case _:
                total += sum(map(_multiply_adds, core.jaxprs_in_params(eqn.params)))
    return total


def _of_product(eqn: core.JaxprEqn) -> int:
    """Each output is a sum over the contracted axes."""
    lhs: Any = eqn.invars[0].aval
    out: Any = eqn.outvars[0].aval
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return out.size * math.prod(lhs.shape[axis] for axis in contracted)


def _of_convolution(eqn: core.JaxprEqn) -> int:
    """Each output is a sum over the window and the input channels of its group.

    Dilation of the input (in gradients of strides, and in transposed convolutions) leaves one in
    prod(lhs_dilation) of these inputs that is not a zero in between.
    """
    rhs: Any = eqn.invars[1].aval
    out: Any = eqn.outvars[0].aval
    channels_out = rhs.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return out.size * (rhs.size // channels_out) // math.prod(eqn.params["lhs_dilation"])


def backward_flops(model: Callable[[Any, Any], Any], params: Any, x: Any, *, of_input: bool) -> int:
    """FLOPs of the backward pass of model(params, x), without those of its forward pass.

    Args:
      model: of parameters and a batch.
      params: tree of shapes.
      x: shape of the batch.
      of_input: also the gradient of `x`.
    """
    out, pullback = jax.eval_shape(_vjp(model, of_input), params, x)
    return forward_flops(lambda pullback, grad: pullback(grad), pullback, out)


def kept_bytes(model: Callable[[Any, Any], Any], params: Any, x: Any, *, of_input: bool) -> int:
    """Bytes that model(params, x) keeps for its backward pass beside the parameters. Args as above."""

    def residuals(params: Any, x: Any) -> list[Any]:
        return jax.tree.leaves(_vjp(model, of_input)(params, x)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, x).jaxpr
    kept = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    return sum(_bytes(var.aval) for var in kept - set(jaxpr.invars[: len(jax.tree.leaves(params))]))


def _vjp(model: Callable[[Any, Any], Any], of_input: bool) -> Callable[[Any, Any], tuple[Any, Any]]:
    if of_input:
        return lambda params, x: jax.vjp(model, params, x)
    return lambda params, x: jax.vjp(lambda params: model(params, x), params)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


class Shapes(NamedTuple):
    """Of both sides of a model for n images; jax.ShapeDtypeStruct everywhere."""

    client_params: Any
    server_params: Any
    images: Any  # [n, H, W, 3]
    smashed: Any  # [n, h, w, c]


def shapes_of(model: SplitModel, image_size: int, n: int) -> Shapes:
    """The shapes with which a model works on n images."""
    client_params, server_params = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((n, image_size, image_size, 3), "float32")
    return Shapes(client_params, server_params, images, jax.eval_shape(model.client, client_params, images))


def client_flops(model: SplitModel, plan: Plan) -> Flops:
    """Of one client for one of its images. A frozen client has no backward pass."""
    params, _, image, _ = shapes_of(model, plan.image_size, 1)
    forward = plan.client_views * forward_flops(model.client, params, image)
    backward = plan.client_views * backward_flops(model.client, params, image, of_input=False)
    return Flops(online=forward, momentum=forward, backward=0 if plan.frozen else backward, contrast=0)


def server_flops(model: SplitModel, plan: Plan) -> Flops:
    """Of the server for one image of a client. Frozen clients need no gradient of their smashed data."""
    _, params, _, smashed = shapes_of(model, plan.image_size, 1)
    project = _projection(model)
    forward = plan.server_views * forward_flops(project, params, smashed)
    backward = plan.server_views * backward_flops(project, params, smashed, of_input=not plan.frozen)
    products = plan.server_views * 2 * model.key_dim * plan.keys  # of queries with the queue
    return Flops(online=forward, momentum=forward, backward=backward, contrast=2 * products)


def client_memory(model: SplitModel, plan: Plan) -> Memory:
    """Of one client. A frozen one holds a single model, which is its momentum model too."""
    params, _, batch, _ = shapes_of(model, plan.image_size, plan.client_views * plan.batch_size)
    weights = _bytes(params)
    if plan.frozen:
        return Memory(weights, momentum_model=0, gradient=0, sgd_buffer=0, activations=0, queue=0)
    activations = kept_bytes(model.client, params, batch, of_input=False)
    return Memory(weights, weights, weights, weights, activations, queue=0)


def server_memory(model: SplitModel, plan: Plan) -> Memory:
    """Of the server, for the concatenated smashed data of the cohort."""
    images = plan.server_views * plan.cohort * plan.batch_size
    _, params, _, merged = shapes_of(model, plan.image_size, images)
    weights = _bytes(params)
    activations = kept_bytes(_projection(model), params, merged, of_input=not plan.frozen)
    keys = plan.keys * (1 if plan.feature_sharing else plan.num_clients)
    return Memory(weights, weights, weights, weights, activations, queue=4 * keys * model.key_dim)


def _projection(model: SplitModel) -> Callable[[Any, Any], Any]:
    return lambda params, smashed: model.server(params, smashed).projection


def client_traffic(model: SplitModel, plan: Plan) -> Traffic:
    """What really passes between one client and the server; the first download of the model is not in it.

    Up go the smashed data of queries and of keys, down come the gradients of the queries' only. Frozen
    clients get no gradients, and have nothing to synchronize.
    """
    params, _, _, smashed = shapes_of(model, plan.image_size, plan.client_views * plan.batch_size)
    if plan.frozen:
        return Traffic(2 * _bytes(smashed), smashed_down=0, weights_up=0, weights_down=0)
    weights = _bytes(params) * (1 + plan.momentum_models + plan.buffers)
    return Traffic(2 * _bytes(smashed), _bytes(smashed), weights, weights)


def paper_costs(
    model: SplitModel, image_size: int, *, images: int, epochs: int, syncs: int, frozen: bool = False
) -> Paper:
    """One client's run as Li et al. 2023 account for it (table 1; MB are 2^20 bytes there).

    A FLOP is a multiply-add, a backward pass is two forward passes, and the momentum model, its smashed
    data and the download of the weights are left out. A frozen client has only the forward pass and sends
    only smashed data.

    Args:
      model: the network, cut in two.
      image_size: pixels a side.
      images: of the client.
      epochs: in which the client takes part.
      syncs: synchronizations in these epochs; the official calculator has epochs // sync period.
      frozen: the client-side models are not trained.
    """
    params, _, image, smashed = shapes_of(model, image_size, 1)
    passes, directions = (1, 1) if frozen else (3, 2)
    flops_per_image = passes * forward_flops(model.client, params, image) // 2
    return Paper(
        flops_per_image=flops_per_image,
        flops=epochs * images * flops_per_image,
        weights=0 if frozen else syncs * _bytes(params),
        smashed=directions * epochs * images * _bytes(smashed),
    )


def costs(model: SplitModel, plan: Plan) -> Costs:
    """What a run costs, also in the paper's accounting."""
    clients, cohort = plan.num_clients, plan.cohort
    traffic = client_traffic(model, plan)
    smashed_up, smashed_down = plan.steps * traffic.smashed_up, plan.steps * traffic.smashed_down
    weights_up, weights_down = plan.syncs * traffic.weights_up, plan.syncs * traffic.weights_down

    def taking_part(epoch: int) -> int:
        """A run of the mean client, from one of its epochs in the cohort."""
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
            taking_part(smashed_down) + plan.epochs * weights_down,  # in the cohort or not
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
    return Costs(plan, _size(shapes_of(model, plan.image_size, 1).client_params), client, server, paper)


def from_config(config: Config, images: int | None = None, image_size: int | None = None) -> Costs:
    """What the run of a configuration costs.

    Args:
      config: resolved.
      images: of the training set; None: as known for config.data.name.
      image_size: pixels a side; None: as known. config.data.image_size goes before both.

    Raises:
      UserError: if the size of the data is not known, or the clients or the model do not fit it.
    """
    clients, moco = config.clients, config.moco
    assert clients.cohort is not None and clients.batch_size is not None
    assert config.sync.frequency is not None and moco.symmetric is not None
    for field, value, allowed in (
        ("algorithm", config.algorithm, "mocosfl"),
        ("clients.rich", clients.rich, 0),
        ("saving.loss_threshold", config.saving.loss_threshold, 0),  # whose costs depend on the loss
    ):
        if value != allowed:
            raise UserError(f"config.{field}: found {value}, allowed: {allowed}, whose costs are known here")
    known_images, known_size = data.SIZES.get(config.data.name, (None, None))
    images = images or known_images
    image_size = config.data.image_size or image_size or known_size
    if images is None:
        raise UserError(
            f"--images: found None for {config.data.name}, allowed: its number of training images"
        )
    if image_size is None:
        raise UserError(f"--image_size: found None for {config.data.name}, allowed: pixels a side")
    most = images // clients.batch_size
    if clients.num > most:
        raise UserError(
            f"config.clients.num: found {clients.num}, allowed: 1 to {most} "
            f"(a batch of {clients.batch_size} each of {images} images)"
        )
    model = build_model(config, image_size, convolution.PLAIN)  # whatever a backend saves
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


def table(result: Costs) -> str:
    """The costs for a person: a client on the left, the server on the right, the paper's accounting below."""
    plan, client, server, paper = result.plan, result.client, result.server, result.paper
    in_epoch = "all" if plan.cohort == plan.num_clients else f"{plan.cohort:,}"

    def spans(name: str, amount: Callable[[int], str], one: Span, other: Span) -> str:
        left, right = ("".join(f"{amount(count):>12}" for count in side) for side in (one, other))
        return f"{name:<16}{left}   {right}"

    def both(name: str, amount: Callable[[int], str], one: int, other: int) -> str:
        return f"{name:<16}{amount(one):>12}{amount(other):>12}"

    lines = [
        f"{plan.images:,} images of {plan.image_size} px; {plan.num_clients:,} clients, {in_epoch} in an "
        f"epoch, batch {plan.batch_size}; a client-side model has {result.parameters:,} parameters",
        f"{plan.epochs:,} epochs of {plan.steps:,} steps; synchronizations an epoch: {plan.syncs:,}; "
        f"epochs of a client: {plan.epochs * plan.cohort / plan.num_clients:,.4g}",
        "",
        f"{'':<16}{'a client':>12}{'':<27}{'the server':>12}",
        f"{'':<16}" + "   ".join(2 * ["".join(f"{name:>12}" for name in Span._fields)]),
        spans("FLOPs", _flops, client.flops, server.flops),
        spans("sent up", _binary, client.up, server.up),
        spans("sent down", _binary, client.down, server.down),
        "",
        f"{'':<16}{'a client':>12}{'the server':>12}",
        both("FLOPs an image", _flops, sum(client.flops_per_image), sum(server.flops_per_image)),
        *(
            both(f"  {name}", _flops, getattr(client.flops_per_image, name), value)
            for name, value in server.flops_per_image._asdict().items()
        ),
        both("memory", _binary, sum(client.memory), sum(server.memory)),
        *(
            both(f"  {name.replace('_', ' ')}", _binary, getattr(client.memory, name), value)
            for name, value in server.memory._asdict().items()
        ),
        "",
        "a client's run as Li et al. 2023, table 1, account for it (a FLOP is a multiply-add, MB are 2^20 B)",
        f"FLOPs an image  {_flops(paper.flops_per_image):>12}",
        f"FLOPs           {_flops(paper.flops):>12}",
        f"weights         {paper.weights / 2**20:>12,.2f} MB",
        f"smashed data    {paper.smashed / 2**20:>12,.2f} MB",
    ]
    return "\n".join(lines)


def _flops(count: float) -> str:
    return _amount(count, 1000, ("", "k", "M", "G", "T", "P", "E"))


def _binary(count: float) -> str:
    return _amount(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _amount(count: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if count < base:
            return f"{count:.4g} {unit}".rstrip()
        count /= base
    return f"{count:.4g} {units[-1]}"


def as_dict(result: Any) -> Any:
    """A result as nested plain values: what --json prints."""
    if hasattr(result, "_asdict"):
        return {name: as_dict(value) for name, value in result._asdict().items()}
    return result


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status, as `commandline.answer` has it."""
    return commandline.answer(argv, commandline.help_text(__doc__), print_costs)


def print_costs(argv: Sequence[str]) -> None:
    """Print what the command line asks for.

    Raises:
      UserError: for a mistake in it, as `from_config` has them.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("images", None, "Training images.", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("image_size", None, "Pixels a side.", lower_bound=1, flag_values=values)
        flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)

    config, _, values = commandline.parse(argv, USAGE, define)
    result = from_config(config.resolved(), values.images, values.image_size)
    say(json.dumps(as_dict(result), indent=2) if values.json else table(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
