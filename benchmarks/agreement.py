"""Checks that both contenders compute the same, before every benchmark that has a PyTorch loop."""

from typing import Any

import jax
import numpy as np

from benchmarks import settings
from mocosfl_jax import Views
from mocosfl_jax.errors import UserError

SMALL = settings.Setting(cut_layer=2, clients=3, batch=2, width=8, key_dim=8, queue_size=20, image_size=16)
STEPS = 3
TOLERANCE = 1e-6


def check(tolerance: float = TOLERANCE) -> None:
    """Trains a small network with both, from the same weights and with a synchronization after each step.

    The losses of the second and third step agree only if updates, momentum models, the queue (which wraps
    around) and synchronization agree too. The check is in float64, because each of the first steps of so
    small a network magnifies the rounding errors of float32 a hundredfold.

    Raises:
      UserError: If a loss differs by more than `tolerance`.
    """
    with jax.enable_x64(True):
        _check(tolerance)


def _check(tolerance: float) -> None:
    from benchmarks import torch_loop

    _, algorithm = settings.build(SMALL)
    state = jax.tree.map(
        _double, jax.jit(lambda rng: algorithm.enter(algorithm.init(rng)))(jax.random.key(1))
    )
    assert state.server is not None and state.server.queue is not None
    client, server = torch_loop.split_resnet18(SMALL)
    client.to(torch_loop.device()).double()
    server.to(torch_loop.device()).double()
    torch_loop.load(client, jax.tree.map(lambda leaf: leaf[0], state.clients.params))
    server_params = dict(state.server.params)
    torch_loop.load(server.head, server_params.pop("head"))
    torch_loop.load(server.layers, server_params)
    queue = torch_loop.torch.from_numpy(np.array(state.server.queue.keys)).to(torch_loop.device())
    loop = torch_loop.Loop(SMALL, client, server, queue)
    step, sync = jax.jit(algorithm.step), jax.jit(algorithm.sync)
    for number in range(STEPS):
        views = Views(*map(_double, settings.views(SMALL, seed=number)))
        state, info = step(state, views)
        state, _ = sync(state)
        theirs = loop.step(*map(torch_loop.images, views))
        loop.clients.synchronize()
        if not abs(float(info.loss) - theirs) <= tolerance:
            raise UserError(
                f"torch_loop computes something different: found loss {theirs:.9f} at step {number + 1}, "
                f"mocosfl_jax has {float(info.loss):.9f}, allowed: a difference of {tolerance:g}"
            )


def _double(leaf: Any) -> Any:
    return leaf.astype("float64") if leaf.dtype == "float32" else leaf
