"""Print what a configuration costs each client and the server: computation, memory and traffic.

    python -m mocosfl_jax.costs [--config=FILE[:PARAMETER]] [--config.FIELD=VALUE ...]
                                [--images=NUMBER] [--image_size=PIXELS] [--json]

Nothing is trained and no data is read. --images (the number of training images) and --image_size are needed
for data sets of unknown size; the size of imagenet12 is approximate. --json prints the same numbers as JSON,
in bytes and FLOPs.
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
    """Format costs as a table: client left, server right, the paper's accounting below."""
    plan, client, server, paper = result.plan, result.client, result.server, result.paper
    cohort = "all" if plan.cohort == plan.num_clients else f"{plan.cohort:,}"

    def spans(name: str, amount: Callable[[int], str], one: Span, other: Span) -> str:
        left, right = ("".join(f"{amount(count):>12}" for count in side) for side in (one, other))
        return f"{name:<16}{left}   {right}"

    def both(name: str, amount: Callable[[int], str], one: int, other: int) -> str:
        return f"{name:<16}{amount(one):>12}{amount(other):>12}"

    lines = [
        f"{plan.images:,} images of {plan.image_size} px; {plan.num_clients:,} clients, {cohort} in each "
        f"epoch, batch {plan.batch_size}; a client-side model has {result.parameters:,} parameters",
        f"{plan.epochs:,} epochs of {plan.steps:,} steps; synchronizations per epoch: {plan.syncs:,}; "
        f"epochs per client: {plan.epochs * plan.cohort / plan.num_clients:,.4g}",
        "",
        f"{'':<16}{'client':>12}{'':<27}{'server':>12}",
        f"{'':<16}" + "   ".join(2 * ["".join(f"{name:>12}" for name in Span._fields)]),
        spans("FLOPs", _flops, client.flops, server.flops),
        spans("sent up", _binary, client.up, server.up),
        spans("sent down", _binary, client.down, server.down),
        "",
        f"{'':<16}{'client':>12}{'server':>12}",
        both("FLOPs per image", _flops, sum(client.flops_per_image), sum(server.flops_per_image)),
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
        "one client's run, counted as in Li et al. 2023, table 1 (a FLOP is a multiply-add, a MB is 2^20 B)",
        f"FLOPs per image {_flops(paper.flops_per_image):>12}",
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
    """Convert costs to nested plain values, as --json prints them."""
    if hasattr(result, "_asdict"):
        return {name: as_dict(value) for name, value in result._asdict().items()}
    return result


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, commandline.help_text(__doc__), print_costs)


def print_costs(argv: Sequence[str]) -> None:
    """Print the costs requested on the command line.

    Raises:
      UserError: if an argument is wrong, or as for `from_config`.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("images", None, "Training images.", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("image_size", None, "Image size in pixels.", lower_bound=1, flag_values=values)
        flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)

    config, _, values = commandline.parse(argv, USAGE, define)
    result = from_config(resolve(config), values.images, values.image_size)
    say(json.dumps(as_dict(result), indent=2) if values.json else table(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
