"""The forms in which a program is written: what is fast on a CPU is slow on an accelerator, and vice versa.

All forms give the same numbers, up to rounding. `forms` chooses by platform, and the choice is passed down as
a value. So any form can be run, and tested, on any platform.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from mocosfl_jax.models.convolution import (
    Lowering,
    cpu_conv,
    direct_conv,
    grouped_conv,
    images_in_lanes,
    matmul_conv,
    patches_conv,
)
from mocosfl_jax.models.norms import (
    GroupNorm,
    ImageBatchNorm,
    cpu_image_batch_norm,
    fused_group_norm,
    group_norm,
    image_batch_norm,
)


def at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one client, for all clients as one batched operation."""
    return jax.vmap(function)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one client, for one client after another in a loop of the program.

    The arrays of one client stay in a CPU's cache. The backward pass computes the forward pass of each client
    again, which takes no longer than to write its intermediate results to memory and read them back.
    """
    again = jax.checkpoint(
        function, prevent_cse=False
    )  # a loop needs no barrier against merging the two passes
    return lambda *stacked: jax.lax.map(lambda client: again(*client), stacked)


def as_it_is(x: Array) -> Array:
    """`x`, in an order in memory that XLA chooses."""
    return x


class Forms(NamedTuple):
    """How a training program is written for a platform."""

    convolutions: Lowering
    group_norm: GroupNorm
    # A function of one client -> the same function of stacked clients [M, ...]
    over_clients: Callable[[Callable[..., Any]], Callable[..., Any]]
    # Whether the steps between two synchronizations are one program. That saves an accelerator the dispatch
    # of each step. On a CPU a convolution is about twenty times slower inside a loop of the program than
    # outside.
    scan_rounds: bool
    arrange: Callable[[Array], Array] = as_it_is  # the order in memory of what enters the server's layers
    image_batch_norm: ImageBatchNorm = image_batch_norm  # of decoders


# For models without a platform: fast on accelerators but for the clients' convolutions; slower on a CPU.
ACCELERATOR = Forms(Lowering(direct_conv, patches_conv), fused_group_norm, at_once, scan_rounds=True)
GPU = ACCELERATOR._replace(convolutions=Lowering(direct_conv, grouped_conv))
TPU = GPU._replace(arrange=images_in_lanes)
# What the others are tested against, and what is counted as the cost of a network.
PLAIN = Forms(Lowering(direct_conv, patches_conv), group_norm, at_once, scan_rounds=False)
CPU = Forms(
    Lowering(cpu_conv, matmul_conv),
    group_norm,
    one_by_one,
    scan_rounds=False,
    image_batch_norm=cpu_image_batch_norm,
)


def forms(platform: str) -> Forms:
    """The fast forms for a platform.

    Example:
      >>> forms("cpu").scan_rounds, forms("tpu").scan_rounds
      (False, True)

    Args:
      platform: As in `jax.Device.platform`: "cpu", "gpu" or "tpu"; any other gets the forms of a GPU.
    """
    return {"cpu": CPU, "tpu": TPU}.get(platform, GPU)
