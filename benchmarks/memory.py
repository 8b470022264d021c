"""Bytes of training state on each device, for meshes of simulated devices. Nothing is allocated or run.

There are 1,000 clients, ResNet-50 with its first five layers on the clients, and K = 6,000, in float32. The
state that a device holds between steps is the state argument of a compiled program (`argument_size_in_bytes`
in XLA's memory analysis). The program is synchronization, which takes the whole state and compiles in a
second. `clients` and `server` are the two sides of the state, by the shapes of their shards. `share` is
relative to what a single device holds.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.results import Result, result
from mocosfl_jax import MomentumContrast, config, mocosfl, split_model
from mocosfl_jax.models.forms import ACCELERATOR
from mocosfl_jax.parallel import exchange
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.parallel import state as states

NEEDS = ()
CLIENTS, QUEUE = 1000, 6000
MESHES = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, 4), (1, 8))  # data x model


def held_bytes(data: int, model: int, num_clients: int = CLIENTS, width: int = 64) -> dict[str, int]:
    """Bytes of state on each device of a mesh while all clients train: clients, server, both together."""
    network = split_model("resnet50", cut_layer=5, width=width)
    mesh = meshes.make_mesh(config.Mesh(data=data, model=model), jax.devices())
    algorithm = states.distribute(
        mocosfl(
            network,
            num_clients=num_clients,
            moco=MomentumContrast(queue_size=QUEUE),
            placement=exchange.make_placement(mesh, ACCELERATOR),
        ),
        mesh,
    )
    state = jax.eval_shape(lambda rng: algorithm.enter(algorithm.init(rng)), jax.random.key(0))
    state = states.placed(mesh, algorithm.homes, state)
    program = jax.jit(algorithm.sync, donate_argnums=0, keep_unused=True).lower(state).compile()

    def shard_bytes(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    analysis = program.memory_analysis()
    assert analysis is not None
    clients, server = (sum(map(shard_bytes, jax.tree.leaves(side))) for side in (state.clients, state.server))
    return {"clients": clients, "server": server, "state": analysis.argument_size_in_bytes}


def results(repeats: int) -> Iterator[Result]:
    """Runs in its own process, since devices must be simulated before JAX is initialized."""
    del repeats  # the bytes do not vary
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "benchmarks.memory"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        alone = None
        for line in process.stdout:
            sizes, held = json.loads(line)
            alone = alone or held
            yield result(
                "memory",
                f"resnet50 cut5 {CLIENTS} clients, mesh {sizes[0]}x{sizes[1]}",
                {},
                **{f"{name}_mib": count / 2**20 for name, count in held.items()},
                **{f"{name}_share": count / alone[name] for name, count in held.items()},
            )
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


if __name__ == "__main__":
    for sizes in MESHES:
        print(json.dumps([sizes, held_bytes(*sizes)]), flush=True)
