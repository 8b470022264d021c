"""A toy network, and the command with it in place of the ResNet: `python tests/toy.py ARGUMENTS`."""

import contextlib
import os
import pathlib
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mocosfl_jax import SplitModel, batches, checkpoint, experiment, hosts, train
from mocosfl_jax.data import Images
from mocosfl_jax.data.images import OnDisk

IMAGE = (4, 4, 3)
KEY_DIM = 8


def make_toy_model() -> SplitModel:
    """Two layers, one on each side of the cut: compiles in no time, and any network fits SplitModel."""

    def init(rng: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        rng_client, rng_server, rng_head = jax.random.split(rng, 3)
        return (
            {"kernel": 0.5 * jax.random.normal(rng_client, (IMAGE[-1], 5))},
            {
                "kernel": 0.3 * jax.random.normal(rng_server, (16 * 5, 12)),
                "head": 0.3 * jax.random.normal(rng_head, (12, KEY_DIM)),
            },
        )

    def client(params: dict[str, Array], images: Array) -> Array:
        return jnp.tanh(images @ params["kernel"])

    def backbone(params: dict[str, Array], smashed: Array) -> Array:
        return jnp.tanh(smashed.reshape(*smashed.shape[:-3], -1) @ params["kernel"])

    def head(params: dict[str, Array], backbone: Array) -> Array:
        return backbone @ params["head"]

    return SplitModel(init, client, backbone, head, KEY_DIM)


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Within, whatever network a configuration wants is the toy network."""
    build_model = experiment.build_model
    experiment.build_model = lambda *_, **__: make_toy_model()
    try:
        yield
    finally:
        experiment.build_model = build_model


def last_arrays(argv: Sequence[str], folder: pathlib.Path) -> list[np.ndarray]:
    """All arrays of the newest checkpoint of a run with the toy network, read on one device."""
    config, *_ = train.parse(argv)
    with in_place():
        run = experiment.prepare(config)
    state, _ = checkpoint.restore(folder / "checkpoints", None, run.algorithm.init)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def recording(images: Images, folder: str) -> OnDisk:
    """Images that note in a file of this process which of them are read."""
    path = pathlib.Path(folder) / f"rows_{jax.process_index()}"

    def read(rows: np.ndarray) -> np.ndarray:
        with path.open("a") as file:
            file.write("".join(f"{row}\n" for row in rows))
        return images[rows]

    return OnDisk(images.shape, read, lambda: images[:])


def fill_disk(process: int, steps: range) -> None:
    """Have the operating system let no file of a process become large while it saves one of these steps."""
    save = checkpoint.save
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def saving(manager: Any, state: Any, progress: checkpoint.Progress) -> None:
        checkpoint.finish(manager)
        full = jax.process_index() == process and progress.step in steps
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if full else hard, hard))
        save(manager, state, progress)

    checkpoint.save = saving
    checkpoint.AGREEING = 2


def main() -> int:
    if folder := os.environ.get("TOY_ROWS"):
        streamed = batches.streamed
        batches.streamed = lambda images, *rest, **how: streamed(recording(images, folder), *rest, **how)
    if full := os.environ.get("TOY_FULL_DISK"):
        process, first, end = map(int, full.split())
        fill_disk(process, range(first, end))
    # A process that is killed is noticed, and one that does not come is given up, within seconds.
    hosts.HEARTBEAT, hosts.MEETING, hosts.PARTING = int(os.environ.get("TOY_HEARTBEAT", "20")), 10, 20
    with in_place():
        return train.main(sys.argv)


if __name__ == "__main__":
    sys.exit(main())
