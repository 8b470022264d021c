"""Measures speed and memory.

    python -m benchmarks [--only=NAME[,NAME]] [--repeats=NUMBER]

  step      a whole training step, compared with a plain PyTorch loop over clients
  clients   the client side alone, for 10 to 1,000 clients, compared with the same loop
  augment   views, compared with torchvision and PIL in one process
  scaling   time and memory of a step, for different numbers of clients and of images per client
  memory    bytes of training state on each of 1 to 8 simulated devices
  epoch     an epoch of a narrow network, and the part of it that is outside the compiled step
  data      an epoch with images streamed from the host, compared with resident images
  host      what the host does for pools of 1,000 to 1,000,000 clients
  limit     FLOP/s of a training step, compared with a matrix product on this machine
  eval      features and kNN, compared with PyTorch
  wire      a step with 5 to 100 clients over a network, compared with simulated ones

Each case prints a line of JSON to stdout. A table of all cases follows on stderr. Seconds are medians over
--repeats (default 5), where the contenders take turns. ratio is baseline_s / ours_s: above 1, mocosfl_jax is
faster. The headers of most files in benchmarks/ have results; docs/speed.md has the newest. Some benchmarks
need PyTorch: pip install -e '.[bench]'. Run them from the root of the repository, on a machine that is
otherwise idle.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks.results import Result, json_line, machine, table
from mocosfl_jax import commandline
from mocosfl_jax.errors import UserError
from mocosfl_jax.runtime import compiler

USAGE = "--only=NAME[,NAME], --repeats=NUMBER, --help"
MODULES = {  # each has NEEDS, the further packages it needs, and results(repeats)
    "step": "benchmarks.step",
    "clients": "benchmarks.clients",
    "augment": "benchmarks.augment",
    "scaling": "benchmarks.scaling",
    "memory": "benchmarks.memory",
    "epoch": "benchmarks.epoch",
    "data": "benchmarks.data",
    "host": "benchmarks.host",
    "limit": "benchmarks.limit",
    "eval": "benchmarks.evaluation",
    "wire": "benchmarks.wire",
}


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit status, that of `commandline.answer`."""
    return commandline.answer(argv, __doc__ or "", measure)


def measure(argv: Sequence[str]) -> None:
    """Runs the benchmarks and prints their results.

    Raises:
      UserError: If an argument is wrong or a package is missing.
    """
    names, repeats = parse(argv)
    # As in training, this must precede JAX's first operation.
    compiler.set_up()
    modules = [load(name) for name in names]
    print(machine(), file=sys.stderr)
    measured: list[Result] = []
    for module in modules:
        for each in module.results(repeats):
            print(json_line(each), flush=True)
            measured.append(each)
    print(table(measured), file=sys.stderr)


def parse(argv: Sequence[str]) -> tuple[list[str], int]:
    """Parses the arguments into the names of the benchmarks and the number of repeats.

    Raises:
      UserError: If an argument is wrong. The message names the first one.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("only", ",".join(MODULES), "Benchmarks to run.", flag_values=values)
        flags.DEFINE_integer("repeats", 5, "Repeats of each case.", lower_bound=1, flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define)
    names = values.only.split(",")
    for name in names:
        if name not in MODULES:
            raise UserError(f"--only: found {name!r}, allowed: {', '.join(MODULES)}")
    return names, values.repeats


def load(name: str) -> Any:
    """Imports the module of a benchmark.

    Raises:
      UserError: If a package that it needs is not installed.
    """
    module = importlib.import_module(MODULES[name])
    for package in module.NEEDS:
        if importlib.util.find_spec(package) is None:
            extra = "wire" if name == "wire" else "bench"
            raise UserError(f"{name}: found no {package}, allowed: pip install -e '.[{extra}]'")
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv))
