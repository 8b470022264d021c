"""Measure how fast it is.

    python -m benchmarks [--only=NAME[,NAME]] [--repeats=NUMBER]

  step      a whole training step, against a plain PyTorch loop over clients
  clients   the client side alone, for 10 to 1,000 clients, against the same
  augment   views, against torchvision and PIL in one process
  scaling   time and memory of a step over numbers of clients and of images a client
  memory    bytes of training state on each of 1 to 8 simulated devices
  epoch     an epoch of the quickstart, and what of it is not the compiled step
  data      an epoch with images streamed from the host, against resident ones
  limit     a training step as a share of what a matrix product reaches on this machine
  eval      features and kNN, against PyTorch

A line of JSON for each case goes to stdout, a table at the end to stderr. Seconds are medians of --repeats
(5), of both contenders in turn; ratio is baseline_s / ours_s, above 1 where we are faster. Results are
kept in the header of each file here. PyTorch comes with the extra: pip install -e '.[bench]'. Run it from the
root of the repository on a machine that does nothing else.
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
MODULES = {  # each has NEEDS, the packages beside our own, and results(repeats)
    "step": "benchmarks.step",
    "clients": "benchmarks.clients",
    "augment": "benchmarks.augment",
    "scaling": "benchmarks.scaling",
    "memory": "benchmarks.memory",
    "epoch": "benchmarks.epoch",
    "data": "benchmarks.data",
    "limit": "benchmarks.limit",
    "eval": "benchmarks.evaluation",
}


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status, as `commandline.answer` has it."""
    return commandline.answer(argv, __doc__ or "", measure)


def measure(argv: Sequence[str]) -> None:
    names, repeats = parse(argv)
    # Before JAX's first operation, as for training.
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
    """The benchmarks to run, and the repeats.

    Raises:
      UserError: naming the first argument that is not understood.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("only", ",".join(MODULES), "Benchmarks to run.", flag_values=values)
        flags.DEFINE_integer("repeats", 5, "Of each case.", lower_bound=1, flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define)
    names = values.only.split(",")
    for name in names:
        if name not in MODULES:
            raise UserError(f"--only: found {name!r}, allowed: {', '.join(MODULES)}")
    return names, values.repeats


def load(name: str) -> Any:
    """The module of a benchmark.

    Raises:
      UserError: if a package that it needs is not installed.
    """
    module = importlib.import_module(MODULES[name])
    for package in module.NEEDS:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{name}: found no {package}, allowed: pip install -e '.[bench]'")
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv))
