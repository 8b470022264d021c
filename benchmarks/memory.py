"""Bytes of training state on each device, over meshes of simulated devices; nothing is allocated or run.

1,000 clients, ResNet-50 whose first five layers are the clients', K = 6,000, float32. What a device holds
between steps is what a compiled program takes as its state (`argument_size_in_bytes` of XLA's memory
analysis): here that of synchronization, which takes all of it and compiles in a second. Of it, `clients` and
`server` are the two sides, by the shapes of their pieces; `share` is that of what one device alone holds.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

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
    """Bytes of state on each device of a mesh: of the clients, of the server and of both."""
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
        num_clients,
    )
    state = jax.eval_shape(algorithm.init, jax.random.key(0))
    state = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
        state,
        states.specs(mesh, state),
    )
    program = jax.jit(algorithm.sync, donate_argnums=0, keep_unused=True).lower(state).compile()

    def piece(leaf: Any) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    analysis = program.memory_analysis()
    assert analysis is not None
    clients, server = (sum(map(piece, jax.tree.leaves(side))) for side in (state.clients, state.server))
    return {"clients": clients, "server": server, "state": analysis.argument_size_in_bytes}


def results(repeats: int) -> Iterator[Result]:
    """In a process of its own, since devices can only be simulated before JAX has found some."""
    del repeats  # bytes are always the same
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
