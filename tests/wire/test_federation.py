"""Clients over a network compute what simulated clients compute."""

import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.config import Clients, Config, Data, Moco, Optim, Own, Synchronization, resolve
from mocosfl_jax.evaluation.features import make_encode
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.training import experiment
from mocosfl_jax.training.build import constant_network
from mocosfl_jax.training.programs import compile_programs
from mocosfl_jax.wire import federation, messages
from tests.support.federation import hub_of, joined, train
from tests.support.small_run import write_images
from tests.support.toy import IMAGE, make_toy_model

EPOCHS = 3


def config(images: str, **sections: Any) -> Config:
    given: dict[str, Any] = {
        "data": Data(name="npz", dir=images),
        "clients": Clients(num=4, batch_size=2, noniid_ratio=0.5),
        "sync": Synchronization(frequency=3),
        "own": Own(network=constant_network(make_toy_model())),
        "moco": Moco(preset="v1", key_dim=8, queue_size=40),
        "optim": Optim(server_lr=0.03, schedule="cosine"),
        "epochs": EPOCHS,
    }
    return Config(**given | sections)


def in_float64(state: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small cohort": {"clients": Clients(num=4, cohort=2, batch_size=2, noniid_ratio=0.5)},
    "MonAcoSFL": {"sync": Synchronization(frequency=3, momentum_models=True, buffers="average")},
    "weighted, buffers reset": {"sync": Synchronization(frequency=2, weighted=True, buffers="reset")},
    "symmetric": {"moco": Moco(preset="v2", key_dim=8, queue_size=40)},
    "full symmetric": {"moco": Moco(preset="v1", key_dim=8, queue_size=40, full_symmetric=True)},
    "frozen": {"optim": Optim(server_lr=0.03, client_lr=0.0)},
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_simulated_clients(case: str, tmp_path: pathlib.Path) -> None:
    resolved = resolve(config(write_images(tmp_path / "set.npz", IMAGE), **CASES[case]))
    mesh = meshes.make_mesh(resolved.mesh, jax.devices()[:1])
    simulated = experiment.prepare(resolved, mesh)
    rng_init, rng_views = jax.random.split(jax.random.key(0))
    state = in_float64(jax.jit(simulated.algorithm.init)(rng_init))
    encode = make_encode(simulated.algorithm, simulated.dataset.mean, simulated.dataset.std)
    start = jax.tree.map(np.asarray, state)
    programs = compile_programs(simulated, state, rng_views, encode)
    expected, expected_losses = train(programs, simulated, state, EPOCHS)

    counts = {client: len(part) for client, part in enumerate(simulated.parts)}
    loaded = experiment.load(resolved, mesh)
    run = federation.plan(resolved, mesh, loaded, counts)
    images = [np.asarray(simulated.dataset.x_train[part]) for part in simulated.parts]
    with hub_of(run) as (hub, access):
        threads = joined(access, images)
        programs = federation.make_programs(
            run, start, rng_views, encode, hub=hub, stop=lambda: False, say=lambda line: None
        )
        found, losses = train(programs, run, jax.tree.map(jnp.asarray, start), EPOCHS)
        goodbye = messages.ToClient(goodbye=messages.Goodbye(text="done"))
        hub.tell(dict.fromkeys(counts, goodbye))
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()

    assert found.step == EPOCHS * run.steps_per_epoch
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), found, expected)
