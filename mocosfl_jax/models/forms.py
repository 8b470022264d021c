"""The forms of one computation: what is fast on a CPU differs from what is fast on an accelerator.

All forms give the same numbers, up to rounding. `forms` chooses by platform; the choice is then passed down as a
value, so that any form can be run, and tested, on any platform.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mocosfl_jax.models.convolution import PLAIN, Lowering, cpu_conv, matmul_conv


def at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one client, for all clients as one batched operation."""
    return jax.vmap(function)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one client, for client after client in a loop of the program.

    What one client works on stays in a CPU's cache. The backward pass computes the forward pass of each client
    again, which takes no longer than to write its intermediate results to memory and read them back.
    """
    again = jax.checkpoint(function, prevent_cse=False)  # loops keep apart what is computed twice
    return lambda *stacked: jax.lax.map(lambda client: again(*client), stacked)


class Forms(NamedTuple):
    """How a training program is written for a platform."""

    convolutions: Lowering
    # A function of one client -> the same of stacks of clients [M, ...]
    over_clients: Callable[[Callable[..., Any]], Callable[..., Any]]
    # The steps between two synchronizations are one program. An accelerator saves the dispatch of each step; on a
    # CPU a convolution inside a loop of the program is about twenty times slower than outside.
    scan_rounds: bool


ACCELERATOR = Forms(PLAIN, at_once, scan_rounds=True)
CPU = Forms(Lowering(cpu_conv, matmul_conv), one_by_one, scan_rounds=False)


def forms(platform: str) -> Forms:
    """The fast forms on a platform.

    Args:
      platform: as `jax.Device.platform` names it: "cpu", "gpu" or "tpu".
    """
    return CPU if platform == "cpu" else ACCELERATOR
