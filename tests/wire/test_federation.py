"""Clients over a network compute what simulated clients compute."""

import contextlib
import dataclasses
import pathlib
import random
import socket
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from mocosfl_jax import serve
from mocosfl_jax.algorithm.clients import ClientState
from mocosfl_jax.algorithm.fedavg import average
from mocosfl_jax.algorithm.interface import CohortState, TrainState
from mocosfl_jax.config import (
    Clients,
    Config,
    Data,
    Moco,
    Model,
    Optim,
    Own,
    Resolved,
    Synchronization,
    Wire,
    quickstart,
    resolve,
)
from mocosfl_jax.costs.accounting import Plan, costs
from mocosfl_jax.errors import NonFiniteError
from mocosfl_jax.evaluation.features import Encode, make_encode
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.training import experiment
from mocosfl_jax.training.build import constant_network
from mocosfl_jax.training.programs import compile_programs
from mocosfl_jax.wire import federation, member, messages
from mocosfl_jax.wire.codec import Format, pack, pack_leaves, unpack_leaves
from mocosfl_jax.wire.contract import read_contract
from tests.support.algorithms import in_float64
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


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small cohort": {"clients": Clients(num=4, cohort=2, batch_size=2, noniid_ratio=0.5)},
    "small cohort, the official schedule": {
        "clients": Clients(num=4, cohort=2, batch_size=2, noniid_ratio=0.5),
        "optim": Optim(server_lr=0.03, schedule="cosine", client_schedule="official_per_step"),
    },
    "MonAcoSFL": {"sync": Synchronization(frequency=3, momentum_models=True, buffers="average")},
    "weighted, buffers reset": {"sync": Synchronization(frequency=2, weighted=True, buffers="reset")},
    # Views are drawn in float32, and V2's, which are blurred, may round differently for one client's images.
    "symmetric": {"moco": Moco(preset="v2", augmentation="v1", key_dim=8, queue_size=40)},
    "full symmetric": {"moco": Moco(preset="v1", key_dim=8, queue_size=40, full_symmetric=True)},
    "frozen": {"optim": Optim(server_lr=0.03, client_lr=0.0)},
    "frozen, small cohort": {
        "optim": Optim(server_lr=0.03, client_lr=0.0),
        "moco": Moco(preset="v1", key_dim=8, queue_size=40, momentum=0.9),
        "clients": Clients(num=4, cohort=2, batch_size=2, noniid_ratio=0.5),
    },
    "the quickstart's network": {
        "own": Own(),
        "model": quickstart().model,
        "moco": dataclasses.replace(quickstart().moco, queue_size=40),
        "optim": quickstart().optim,
        "clients": Clients(num=5, batch_size=2, noniid_ratio=0.5),
    },
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case == "the quickstart's network" else case
        for case in CASES
    ],
)
def test_training_is_that_of_simulated_clients(case: str, tmp_path: pathlib.Path) -> None:
    size = IMAGE if "own" not in CASES[case] else (32, 32, 3)
    resolved = resolve(config(write_images(tmp_path / "set.npz", size), **CASES[case]))
    mesh = meshes.make_mesh(resolved.mesh, jax.devices()[:1])
    simulated = experiment.prepare(resolved, mesh)
    rng_init, rng_views = jax.random.split(jax.random.key(0))
    state = in_float64(jax.jit(simulated.algorithm.init)(rng_init))
    if case.startswith("frozen"):  # as from an expert, whose momentum model is another than the online one
        shared = state.pool.shared
        moved = jax.tree.map(lambda leaf: leaf + 0.1, shared.key_params)
        state = state._replace(pool=state.pool._replace(shared=shared._replace(key_params=moved)))
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
        hub.finish("done", len(counts), 30)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()

    assert found.step == EPOCHS * run.steps_per_epoch
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), found, expected)


def test_clients_that_stall_are_left_out_and_come_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client answers too late again and again, and is never given up for it."""
    resolved = resolve(config(write_images(tmp_path / "set.npz", IMAGE), wire=Wire(deadline_s=0.2)))
    mesh, images, state, rng_views, encode = prepared(resolved)
    counts = {client: len(each) for client, each in enumerate(images)}
    run = federation.plan(resolved, mesh, experiment.load(resolved, mesh), counts)
    rng = random.Random(1)

    def stalling(message: Any, platform: str) -> Any:
        contract, terms, programs = read_contract(message, platform)

        def forward(*args: Any) -> Any:
            time.sleep(0.5 if rng.random() < 0.2 else 0.0)
            return programs.forward(*args)

        return contract, terms, programs._replace(forward=forward)

    monkeypatch.setattr(member, "read_contract", stalling)
    lines: list[str] = []
    with hub_of(run) as (hub, access):
        threads = joined(access, images)
        programs = federation.make_programs(
            run, state, rng_views, encode, hub=hub, stop=lambda: False, say=lines.append
        )
        found, losses = train(programs, run, state, EPOCHS)
        hub.finish("done", len(counts), 30)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert found.step == len(losses) == EPOCHS * run.steps_per_epoch
    assert np.isfinite(losses).all()
    assert any(line.startswith("left out of some steps: client") for line in lines)


def test_a_loss_that_is_not_finite_ends_the_training_before_it_reaches_the_clients(
    tmp_path: pathlib.Path,
) -> None:
    diverging = Optim(server_lr=1e30, client_lr=0.1, schedule="cosine")
    resolved = resolve(config(write_images(tmp_path / "set.npz", IMAGE), optim=diverging))
    mesh, images, state, rng_views, encode = prepared(resolved)
    run = federation.plan(resolved, mesh, experiment.load(resolved, mesh), dict(enumerate(map(len, images))))
    said: list[str] = []
    with hub_of(run) as (hub, access):
        threads = joined(access, images, said.append)
        programs = federation.make_programs(
            run, state, rng_views, encode, hub=hub, stop=lambda: False, say=lambda line: None
        )
        with pytest.raises(NonFiniteError, match=r"the loss of step [23] is (nan|inf)"):
            train(programs, run, state, EPOCHS)
        hub.finish("the loss was not finite", len(images), 30)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
    assert said.count("the loss was not finite") == len(images)


def test_the_largest_message_has_room_for_the_dtype_on_the_wire(tmp_path: pathlib.Path) -> None:
    images = write_images(tmp_path / "set.npz", (32, 32, 3))
    for dtype, size in (("exact", 2), ("float32", 4), ("int8", 1)):
        resolved = resolve(
            config(
                images,
                own=Own(),
                model=Model(name="vgg11", width=16, cut_layer=1, compute_dtype="bfloat16"),
                wire=Wire(dtype=dtype),
            )
        )
        mesh = meshes.make_mesh(resolved.mesh, jax.devices()[:1])
        run = federation.plan(resolved, mesh, experiment.load(resolved, mesh), dict.fromkeys(range(4), 12))
        # Queries and keys of two images, 16 channels of 32 x 32 pixels.
        assert serve.largest_message(run) == 2 * 2 * 16 * 32 * 32 * size


def prepared(resolved: Resolved) -> tuple[Mesh, list[np.ndarray], TrainState, jax.Array, Encode]:
    """A mesh of one device, each client's images, the first state, the key of the views, and `encode`."""
    mesh = meshes.make_mesh(resolved.mesh, jax.devices()[:1])
    simulated = experiment.prepare(resolved, mesh)
    rng_init, rng_views = jax.random.split(jax.random.key(0))
    images = [np.asarray(simulated.dataset.x_train[part]) for part in simulated.parts]
    encode = make_encode(simulated.algorithm, simulated.dataset.mean, simulated.dataset.std)
    return mesh, images, jax.jit(simulated.algorithm.init)(rng_init), rng_views, encode


class Answering:
    """Stands for a hub: some clients answer with the given parameters, the others are silent."""

    def __init__(self, params: dict[int, np.ndarray]) -> None:
        self.params = params
        self.doubted: list[int] = []

    def current(self, client: int) -> bool:
        return True

    def doubt(self, client: int) -> None:
        self.doubted.append(client)

    def ask(self, requests: dict[int, Any], seconds: float) -> dict[int, Any]:
        return {
            client: messages.FromClient(state=messages.State(params=pack_leaves([self.params[client]])))
            for client in requests
            if client in self.params
        }


@pytest.mark.parametrize("shares", [[1, 1, 1, 1], [3, 5, 1, 2]])
def test_a_silent_client_has_no_part_in_the_average(shares: list[int]) -> None:
    rng = np.random.default_rng(0)
    sent = {client: rng.normal(size=3).astype(np.float32) for client in (0, 1, 3)}
    hub: Any = Answering(sent)
    clients = ClientState({"kernel": jnp.full((4, 3), 9.0)}, None, None, None, None)
    state = CohortState(jnp.zeros((), jnp.int32), clients, None, None, None)
    terms: Any = SimpleNamespace(shapes=lambda part: [((3,), "float32")])
    cohort = [0, 1, 2, 3]
    weights = np.array(shares)
    found = federation.collect(hub, state, cohort, ["params"], terms, 1.0, weights)
    mean = average(found.clients.params, jnp.asarray(weights, jnp.float32))["kernel"]
    expected = np.average([sent[c] for c in (0, 1, 3)], axis=0, weights=[shares[c] for c in (0, 1, 3)])
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    assert hub.doubted == [2]
    kept = federation.collect(hub, state, cohort, ["params"], terms, 1.0).clients.params["kernel"]
    np.testing.assert_array_equal(kept, np.stack([sent[0], sent[1], np.full(3, 9.0), sent[3]]))


def test_frozen_clients_on_several_devices_are_those_on_one(tmp_path: pathlib.Path) -> None:
    """Three clients on two devices are padded to four. The second has not sent its rows."""
    sections: dict[str, Any] = CASES["frozen"] | {
        "clients": Clients(num=3, batch_size=2, noniid_ratio=0.5),
        "moco": Moco(preset="v1", key_dim=8, queue_size=40, momentum=0.5),
    }
    resolved = resolve(config(write_images(tmp_path / "set.npz", IMAGE), **sections))
    found = []
    for devices in (1, 2):
        mesh = meshes.make_mesh(resolved.mesh, jax.devices()[:devices])
        counts = dict.fromkeys(range(3), 10)
        run = federation.plan(resolved, mesh, experiment.load(resolved, mesh), counts)
        state = jax.jit(run.algorithm.init)(jax.random.key(0))
        moved = jax.tree.map(lambda leaf: leaf + 0.1, state.pool.shared.key_params)
        state = state._replace(pool=state.pool._replace(shared=state.pool.shared._replace(key_params=moved)))
        at_work = run.algorithm.enter(state)
        params, _ = jax.eval_shape(run.model.init, jax.random.key(0))
        smashed = jax.eval_shape(run.model.client, params, jax.ShapeDtypeStruct((2, *IMAGE), jnp.float32))
        of_client = Format(smashed.shape, "float32", "float32")
        program = federation.compile_server_step(run, at_work, of_client)
        sent = np.random.default_rng(0).normal(size=(2, 6, *smashed.shape[1:])).astype(np.float32)
        arrived = np.repeat([True, False, True], 2)
        new, curve, grad = program(at_work, tuple(jnp.asarray(sent)), jnp.asarray(arrived))
        key_params = jax.tree.map(lambda leaf: np.asarray(leaf)[:3], new.clients.key_params)
        found.append((key_params, np.asarray(grad), [np.asarray(loss) for loss in curve.loss]))
        (first, second, third), *_ = jax.tree.leaves(key_params)
        np.testing.assert_array_equal(first, third)
        assert np.any(first != second)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *found)


class FrozenClients:
    """Stands for a hub with clients that move their momentum models by themselves, one number a client here.

    Args:
      silent: (step, client) of which the answer does not arrive. The client has moved its model all the same.
    """

    def __init__(self, clients: int, momentum: float, form: Format, silent: set[tuple[int, int]]) -> None:
        self.momentum, self.form, self.silent = momentum, form, silent
        self.params: dict[int, np.ndarray] = {}
        self.key_params: dict[int, np.ndarray] = {}
        self.clients = set(range(clients))
        self.behind = set(self.clients)

    def offer(self, contract: Any) -> None:
        pass

    def ready(self) -> set[int]:
        return self.clients

    def current(self, client: int) -> bool:
        return client not in self.behind

    def doubt(self, client: int) -> None:
        self.behind.add(client)

    def load(self, client: int, message: Any) -> None:
        shapes: list[tuple[tuple[int, ...], str]] = [((IMAGE[-1], 5), "float32")]
        [self.params[client]] = unpack_leaves(message.load.params, shapes)
        [self.key_params[client]] = unpack_leaves(message.load.key_params, shapes)
        self.behind.discard(client)

    def ask(self, requests: dict[int, Any], seconds: float) -> dict[int, Any]:
        sent = pack(np.ones(self.form.shape, np.float32), self.form)
        answers = {}
        for client, message in requests.items():
            moved = self.momentum * self.key_params[client] + (1 - self.momentum) * self.params[client]
            self.key_params[client] = moved
            if (message.forward.step, client) not in self.silent:
                answers[client] = messages.FromClient(smashed=messages.Smashed(query=sent, key=sent))
        return answers


@pytest.mark.parametrize("cohort", [None, 3])
@pytest.mark.parametrize("silent", [set(), {(1, 1)}, {(0, 0), (0, 2), (2, 1)}])
def test_frozen_clients_have_the_momentum_models_that_the_server_has_of_them(
    silent: set[tuple[int, int]], cohort: int | None, tmp_path: pathlib.Path
) -> None:
    """Also after a step in which the answer of some did not arrive, and in the next epoch."""
    sections: dict[str, Any] = CASES["frozen"] | {
        "moco": Moco(preset="v1", key_dim=8, queue_size=40, momentum=0.5),
        "clients": Clients(num=4, cohort=cohort, batch_size=2, noniid_ratio=0.5),
    }
    resolved = resolve(config(write_images(tmp_path / "set.npz", IMAGE), **sections))
    mesh, images, state, rng_views, encode = prepared(resolved)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, state.pool.shared.key_params)
    state = state._replace(pool=state.pool._replace(shared=state.pool.shared._replace(key_params=moved)))
    run = federation.plan(resolved, mesh, experiment.load(resolved, mesh), dict(enumerate(map(len, images))))
    hub: Any = FrozenClients(4, 0.5, Format((2, 4, 4, 5), "float32", "float32"), silent)
    programs = federation.make_programs(
        run, state, rng_views, encode, hub=hub, stop=lambda: False, say=lambda line: None
    )
    for epoch in range(2):
        members = np.arange(4) if cohort is None else run.members(epoch)
        at_work = programs.turn.enter(state, None if cohort is None else members)
        for step in range(run.steps_per_epoch):
            at_work, _ = programs.run_steps(at_work, programs.feed(epoch, range(step, step + 1)))
            of_server = jax.device_get(at_work.clients.key_params["kernel"])
            for place, client in enumerate(members.tolist()):
                if (epoch * run.steps_per_epoch + step, client) not in silent:
                    np.testing.assert_allclose(hub.key_params[client], of_server[place], rtol=1e-5, atol=1e-6)
        at_work, _ = programs.turn.sync(at_work)
        state = programs.turn.leave(at_work)


def test_no_step_begins_with_fewer_clients_than_the_least() -> None:
    there = iter([{0}, {0}, {0, 5}, {0, 2}, {0}, {0, 1}])
    waits: list[float] = []
    said: list[str] = []
    hub: Any = SimpleNamespace(ready=lambda: next(there), wait=waits.append)
    federation.await_clients(hub, [0, 1, 2], 0.0, 2, lambda: False, said.append)
    assert len(waits) == 3
    assert said == ["waiting for clients: 1 of 3 are there, 2 are needed"]
    with pytest.raises(federation.Abandoned, match="too few clients"):  # nor if the run is to stop
        federation.await_clients(hub, [0, 1, 2], 0.0, 2, lambda: True, said.append)
    federation.await_clients(hub, [0, 1, 2], 5.0, 2, lambda: True, said.append)
    assert next(there, None) is None and len(waits) == 3


class Proxy:
    """Passes connections on to a port, and counts the bytes."""

    def __init__(self, port: int) -> None:
        self.target, self.bytes = port, 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with self.listening, contextlib.suppress(OSError):
            while True:
                one, _ = self.listening.accept()
                threading.Thread(target=self.connect, args=(one,), daemon=True).start()

    def connect(self, one: socket.socket) -> None:
        with one, socket.create_connection(("127.0.0.1", self.target)) as other:
            back = threading.Thread(target=self.copy, args=(other, one))
            back.start()
            self.copy(one, other)
            back.join()

    def copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.bytes += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)


def test_bytes_on_the_wire_are_those_of_costs(tmp_path: pathlib.Path) -> None:
    """Smashed data, gradients and averages are what `costs` counts. The rest is stated in docs/clients.md."""
    resolved = resolve(config(write_images(tmp_path / "set.npz", IMAGE)))
    mesh, images, state, rng_views, encode = prepared(resolved)
    counts = dict(enumerate(map(len, images)))
    run = federation.plan(resolved, mesh, experiment.load(resolved, mesh), counts)
    with hub_of(run) as (hub, access):
        proxy = Proxy(int(access.address.rpartition(":")[2]))
        threads = joined(access._replace(address=f"127.0.0.1:{proxy.port}"), images)
        programs = federation.make_programs(
            run, state, rng_views, encode, hub=hub, stop=lambda: False, say=lambda line: None
        )
        train(programs, run, state, EPOCHS)
        hub.finish("done", len(counts), 30)
        for thread in threads:
            thread.join(30)
    proxy.close()
    rounds = -(-run.steps_per_epoch // run.steps_per_round)
    plan = Plan(
        image_size=IMAGE[0],
        images=sum(counts.values()),
        num_clients=4,
        cohort=4,
        batch_size=2,
        epochs=EPOCHS,
        steps=run.steps_per_epoch,
        syncs=rounds,
        queue_size=40,
        symmetric=False,
    )
    server = costs(run.model, plan).server
    params = 4 * 15  # bytes of a client's kernel
    at_first, at_ends = 4 * 3 * params, 4 * EPOCHS * 2 * params  # three parts; momentum models and buffers
    assert hub.arrays["up smashed"] + hub.arrays["up state"] == server.up.run + at_ends
    assert hub.arrays["down backward"] + hub.arrays["down load"] == server.down.run + at_first
    assert hub.arrays["down load"] == 4 * EPOCHS * rounds * params + at_first
    messages_sent = 4 * EPOCHS * (3 * run.steps_per_epoch + 2 * rounds + 2)
    envelopes = sum(hub.traffic.values()) - sum(hub.arrays.values()) - hub.traffic["down contract"]
    assert envelopes < 30 * messages_sent
    assert (
        sum(hub.traffic.values()) < proxy.bytes < sum(hub.traffic.values()) + 60 * messages_sent + 4 * 2_000
    )
