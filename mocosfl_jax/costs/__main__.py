"""What a configuration costs each client and the server: computation, memory and traffic. Nothing is trained.

    python -m mocosfl_jax.costs [--config=FILE[:PARAMETER]] [--config.FIELD=VALUE ...]
                                [--images=NUMBER] [--image_size=PIXELS] [--json]

No data is read: --images (training images of the data set) and --image_size are for data sets whose size is
not known here (imagenet12's is known approximately). --json prints the same numbers, in bytes and FLOPs.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.config import resolve
from mocosfl_jax.costs.accounting import Costs, Span, from_config

USAGE = "--config=FILE, --config.FIELD=VALUE, --images=NUMBER, --image_size=PIXELS, --json, --help"


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
    result = from_config(resolve(config), values.images, values.image_size)
    say(json.dumps(as_dict(result), indent=2) if values.json else table(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
