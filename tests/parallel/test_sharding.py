"""Eight simulated devices, in meshes of every shape, against one device; and the traffic between devices."""

import functools
import math
import pathlib
import re
import threading
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from mocosfl_jax import (
    Algorithm,
    CohortState,
    Forms,
    MomentumContrast,
    SplitModel,
    TrainState,
    Views,
    flmoco,
    mocosfl,
    one_device,
)
from mocosfl_jax.algorithm.clients import Sync
from mocosfl_jax.algorithm.noise import Noise
from mocosfl_jax.algorithm.pool import online_model
from mocosfl_jax.config import Clients, Config, Data, Eval, Mesh, Moco, Model
from mocosfl_jax.errors import UserError
from mocosfl_jax.feed import batches
from mocosfl_jax.models import convolution
from mocosfl_jax.models.convolution import direct_conv, patches_conv
from mocosfl_jax.models.forms import CPU
from mocosfl_jax.models.norms import batch_norm, group_norm
from mocosfl_jax.parallel.exchange import make_placement
from mocosfl_jax.parallel.mesh import make_mesh, make_spread, of_images, of_views, padded, replicate, sharding
from mocosfl_jax.parallel.state import distribute, rest
from mocosfl_jax.train import main
from mocosfl_jax.training import experiment, loop, rounds, workdir
from mocosfl_jax.training.journal import Output
from tests.support.small_run import arguments
from tests.support.toy import make_toy_model, with_toy
from tests.support.training import prepare, single

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
SIZE, CHANNELS, KEY_DIM = 6, 4, 8


def conv_model(stacked_server: bool = False) -> SplitModel:
    """One convolution on each side of the cut, group norm, and a large V2 head with batch norm."""
    server_conv = patches_conv if stacked_server else direct_conv

    def init(rng: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        draws = [jax.random.normal(r, s) for r, s in zip(jax.random.split(rng, 4), SHAPES, strict=True)]
        client, server, hidden, out = draws
        scale, bias = jnp.ones(CHANNELS), jnp.zeros(CHANNELS)
        return (
            {"kernel": 0.3 * client, "scale": scale, "bias": bias},
            {"kernel": 0.2 * server, "hidden": 0.5 * hidden, "scale": jnp.ones(16), "out": 0.3 * out},
        )

    def client(params: dict[str, Array], images: Array) -> Array:
        x = patches_conv(images, params["kernel"], stride=1, padding=1)
        return jnp.tanh(group_norm(x, params["scale"], params["bias"]))

    def backbone(params: dict[str, Array], smashed: Array) -> Array:
        images = smashed.reshape(-1, *smashed.shape[-3:])
        x = jnp.tanh(server_conv(images, params["kernel"], stride=2, padding=1))
        return jnp.mean(x, axis=(1, 2)).reshape(*smashed.shape[:-3], -1)

    def head(params: dict[str, Array], backbone: Array) -> Array:
        hidden = batch_norm(backbone @ params["hidden"], params["scale"], jnp.zeros(16))
        return jnp.tanh(hidden) @ params["out"]

    return SplitModel(init, client, backbone, head, KEY_DIM)


SHAPES = [(3, 3, 3, CHANNELS), (3, 3, CHANNELS, 8), (8, 16), (16, KEY_DIM)]


class Case(NamedTuple):
    num_clients: int
    cohort: int | None = None  # M; None: the whole pool
    batch: int = 2
    moco: dict[str, Any] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    baseline: bool = False  # FL-MoCo


UNEVEN = {"batch_sizes": [3, 3, 1, 1, 1]}
CASES = {
    "whole pool": Case(8),
    "pool that does not divide": Case(10, options={"sync": Sync(divergence_lambda=0.5)}),
    "sampled cohort": Case(19, 10, options={"sync": Sync(momentum_models=True, buffers="average")}),
    "sampled, rich and poor, queues per client": Case(
        9,
        5,
        3,
        {"full_symmetric": True, "feature_sharing": False},
        UNEVEN | {"sync": Sync(np.arange(1.0, 10.0))},
    ),
    "FL-MoCo": Case(10, 5, baseline=True),
    "batch of 1, asymmetric": Case(11, batch=1, moco={"symmetric": False}),
    "rich and poor": Case(5, batch=3, moco={"full_symmetric": True}, options=UNEVEN),
    "queues per client": Case(10, moco={"feature_sharing": False}),
    "one client": Case(1, batch=12),
    "noise": Case(10, options={"noise": Noise(jax.random.key(1), std=0.3, clip=0.5)}),
    # Batch norm over two rows is a step function, in which rounding grows.
    "without concatenation": Case(10, batch=4, moco={"concatenate": False}),
    "without concatenation, queues per client": Case(
        9, 5, 3, {"concatenate": False, "feature_sharing": False, "symmetric": False}
    ),
}
QUICK = [(name, *mesh) for name in list(CASES)[1:4] for mesh in MESHES]
QUICK += [("noise", 4, 2), ("whole pool", 8, 1), ("whole pool", 2, 4), ("FL-MoCo", 4, 2)]
# Here the smashed data of the whole cohort go to every device.
GATHERED = [("without concatenation", 4, 2), ("without concatenation, queues per client", 8, 1)]
ALL = [(name, *mesh) for name in CASES for mesh in MESHES]


def build(case: Case, mesh: jax.sharding.Mesh, forms: Forms = CPU) -> Algorithm:
    placement = make_placement(mesh, forms)
    moco = MomentumContrast(queue_size=80, temperature=1.0, **case.moco)
    settings: dict[str, Any] = {"num_clients": case.num_clients, "moco": moco, "placement": placement}
    if case.baseline:
        algorithm = flmoco(conv_model(stacked_server=True), **settings)
    else:
        algorithm = mocosfl(conv_model(), **settings, **case.options)
    return distribute(algorithm, mesh)


def diverse(state: TrainState) -> TrainState:
    """A state in float64 in which clients differ in what they have of their own."""
    wide = jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state)
    own = wide.pool.own

    def noisy(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), tree
        )

    own = own._replace(
        params=noisy(own.params), key_params=noisy(own.key_params), opt_state=noisy(own.opt_state)
    )
    return wide._replace(pool=wide.pool._replace(own=own))


def draw(case: Case, mesh: jax.sharding.Mesh, seed: int) -> Views:
    shape = (2, case.cohort or case.num_clients, case.batch, SIZE, SIZE, 3)
    return Views(*(replicate(mesh, x) for x in np.random.default_rng(seed).standard_normal(shape)))


class Trained(NamedTuple):
    results: Any  # all outputs of the algorithm, and the final state, as numpy arrays
    step: list["Collective"]  # of the compiled step
    sync: list["Collective"]
    enter: list["Collective"]
    leave: list["Collective"]


@functools.cache
def train(name: str, data: int, model: int) -> Trained:
    """Train two rounds of two steps in float64 on a mesh."""
    case, mesh = CASES[name], make_mesh(Mesh(data=data, model=model), jax.devices())
    algorithm = build(case, mesh)
    state = diverse(jax.tree.map(jnp.array, initial(name)))
    if mesh.size > 1:
        state = jax.jit(partial(rest, mesh, algorithm.homes))(state)
    cohorts: list[Any] = [None, None]
    if case.cohort is not None:
        draws = (
            np.random.default_rng(i).choice(case.num_clients, case.cohort, replace=False) for i in (0, 1)
        )
        cohorts = [np.sort(members).astype(np.int32) for members in draws]

    def scalars(state: CohortState, views: Views) -> tuple[CohortState, Any]:
        state, info = algorithm.step(state, views)
        return state, (info.loss, info.top1)

    turn: Any = rounds.make_turn(algorithm, state, case.cohort)
    step: Any = jax.jit(scalars, donate_argnums=0).lower(turn.state, draw(case, mesh, 0)).compile()
    sync: Any = turn.sync.lower(turn.state).compile()
    outputs: list[Any] = []
    for round_, cohort in enumerate(cohorts):
        at_work = turn.enter(state, cohort)
        for i in range(2):
            at_work, info = step(at_work, draw(case, mesh, 2 * round_ + i))
            outputs.append(info)
        at_work, info = sync(at_work)
        outputs.append(info)
        state = turn.leave(at_work)
    results = jax.tree.map(np.asarray, (outputs, trimmed(case, state)))
    programs = (step, sync, turn.enter, turn.leave)
    return Trained(results, *(collectives(program.as_text()) for program in programs))


@functools.cache
def initial(name: str) -> Any:
    """A fresh TrainState as numpy arrays, because jax's would be donated."""
    return jax.tree.map(np.asarray, jax.jit(build(CASES[name], single()).init)(jax.random.key(0)))


def trimmed(case: Case, state: TrainState) -> TrainState:
    """The state without its padding, which must be zeros."""

    def trim(leaf: Array) -> np.ndarray:
        assert not np.any(leaf[case.num_clients :])
        return np.asarray(leaf[: case.num_clients])

    return state._replace(pool=state.pool._replace(own=jax.tree.map(trim, state.pool.own)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name, data, model", QUICK)
def test_a_mesh_equals_one_device_and_gathers_nothing_large(name: str, data: int, model: int) -> None:
    assert_equals_one_device(name, data, model)
    assert_nothing_large_is_gathered(name, data, model)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name, data, model", GATHERED)
def test_a_mesh_without_concatenation_equals_one_device(name: str, data: int, model: int) -> None:
    assert_equals_one_device(name, data, model)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name, data, model", [case for case in ALL if case not in QUICK + GATHERED])
def test_every_mesh_equals_one_device(name: str, data: int, model: int) -> None:
    assert_equals_one_device(name, data, model)


def assert_equals_one_device(name: str, data: int, model: int) -> None:
    found, expected = train(name, data, model).results, train(name, 1, 1).results
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


# Communication between devices.


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    kind: str
    sizes: list[int]  # elements of each resulting array, on one device


def collectives(text: str | None) -> list[Collective]:
    """All collectives of a compiled program."""
    assert text is not None
    found = []
    for result, kind in re.findall(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", text):
        dims = re.findall(r"\w+\[([\d,]*)\]", re.sub(r"/\*.*?\*/", "", result))
        found.append(Collective(kind, [math.prod(int(n) for n in d.split(",") if n) for d in dims]))
    return found


def assert_nothing_large_is_gathered(name: str, data: int, model: int) -> None:
    """Assert that all data received in a step is smaller than the cohort, the batch and the queue.

    Also that FedAvg is an all-reduce of one client's parameters, and that members enter and leave one
    device's share at a time.
    """
    case, trained, state = CASES[name], train(name, data, model), initial(name)
    found = trained.step
    places = case.cohort or case.num_clients
    rows = sum(case.options.get("batch_sizes", [case.batch] * places))
    rows *= 2 if case.moco.get("full_symmetric") else 1
    smashed = rows * SIZE * SIZE * CHANNELS
    client = [leaf.size for leaf in jax.tree.leaves(online_model(state))]
    cohort = places * max(client)
    queue = (state.pool.own.queue or state.server.queue).keys
    if case.baseline:
        smashed = cohort  # no smashed data is sent
    assert all(max(c.sizes) < min(smashed, cohort, queue.size) for c in found), found
    largest = {kind: max((max(c.sizes) for c in found if c.kind == kind), default=0) for kind in KINDS}
    server_tensor = max(map(math.prod, SHAPES[1:]))
    embeddings = math.ceil(rows / 8) * 8 * KEY_DIM
    assert largest["all-gather"] <= max(server_tensor, embeddings), found
    assert largest["all-reduce"] <= server_tensor, found
    # Where clients differ, rows are exchanged one device's share at a time.
    assert largest["collective-permute"] <= math.ceil(rows / 8) * smashed // rows, found
    assert not largest["all-to-all"], found
    if (name, model) == ("whole pool", 1):  # only the keys of both views are gathered on all devices
        assert [c.sizes for c in found if c.kind == "all-gather"] == 2 * [[embeddings]], found

    share = math.ceil(places / 8) * max(*client, queue[0].size)
    turns = trained.enter + trained.leave
    assert all(max(c.sizes) <= max(share, *client) for c in turns), turns
    assert {c.kind for c in trained.enter} <= {"collective-permute"}, trained.enter

    averaged = [c for c in trained.sync if max(c.sizes) >= max(client)]
    trees = 3 if name == "sampled cohort" else 1  # momentum models and buffers are averaged too
    assert {c.kind for c in averaged} == {"all-reduce"}, averaged
    few = 3 * case.num_clients  # additional scalars, such as weights and divergences
    assert 0 <= sum(sum(c.sizes) for c in averaged) - trees * sum(client) <= few, averaged


def test_the_images_of_a_single_client_stay_where_they_are() -> None:
    """As in centralised MoCo: each device has a share of the batch, before and after concatenation."""
    mesh = make_mesh(Mesh(data=4, model=2), jax.devices())
    placement = make_placement(mesh, CPU)
    x = jax.device_put(np.random.default_rng(0).normal(size=(1, 16, 2, 3)), sharding(mesh, of_views(1)))

    def there_and_back(x: Array) -> tuple[Array, Array]:
        merged = placement.merge(x, None)
        return merged, placement.split(2 * merged, (1, 16), None)

    program: Any = jax.jit(there_and_back).lower(x).compile()
    assert not collectives(program.as_text())
    merged, split = program(x)
    np.testing.assert_array_equal(merged, x[0])
    np.testing.assert_array_equal(split, 2 * x)
    assert {shard.data.shape for shard in merged.addressable_shards} == {(2, 2, 3)}


@pytest.mark.usefixtures("x64")
def test_a_convolution_in_chunks_stays_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Winograd's loop over images with its gradients, on rows that do not divide; nothing is gathered."""
    monkeypatch.setattr(convolution, "CACHE_ELEMENTS", 1)
    mesh = make_mesh(Mesh(data=4, model=2), jax.devices())

    def server(conv: Any) -> Any:
        def model(kernel: Array, x: Array) -> Array:
            y = jnp.sin(conv(x.reshape(-1, *x.shape[-3:]), kernel))
            return jnp.mean(y, axis=(1, 2)).reshape(*x.shape[:-3], -1)

        return model

    def loss(model: Any, kernel: Array, x: Array) -> Array:
        return jnp.sum(model(kernel, x) ** 2)

    rng = np.random.default_rng(0)
    kernel, x = (replicate(mesh, rng.normal(size=s)) for s in ((3, 3, 2, 3), (2, 29, 8, 8, 2)))
    on_mesh = make_placement(mesh, CPU).over_rows(server(convolution.winograd_conv))
    plain = server(partial(direct_conv, stride=1, padding=1))
    found, expected = (
        jax.jit(jax.value_and_grad(partial(loss, model), (0, 1)))(kernel, x) for model in (on_mesh, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)

    def used(kernel: Array, x: Array) -> tuple[Array, Array]:
        """The gradients as a step uses them: the gradient of the rows stays on its device."""
        of_kernel, of_x = jax.grad(partial(loss, on_mesh), (0, 1))(kernel, jnp.cos(x))
        return of_kernel, jnp.sum(of_x**2)

    text: Any = jax.jit(used).lower(kernel, x).compile().as_text()
    assert "while(" in text
    passed = [c for c in collectives(text) if max(c.sizes) > 1]
    assert passed and all(c.kind == "all-reduce" and max(c.sizes) <= kernel.size for c in passed), passed


def test_state_is_sharded_evenly() -> None:
    """Bytes on each device: 1/8 of the pool on every mesh, 1/model of the server's large tensors."""
    for data, model in MESHES:
        mesh = make_mesh(Mesh(data=data, model=model), jax.devices())
        state = jax.jit(build(CASES["whole pool"], mesh).init)(jax.random.key(0))
        for leaf in jax.tree.leaves(state.pool.own):
            assert {s.data.nbytes for s in leaf.addressable_shards} == {leaf.nbytes // 8}
        for leaf in [*jax.tree.leaves(state.server.params), state.server.queue.keys]:
            assert {s.data.nbytes for s in leaf.addressable_shards} == {leaf.nbytes // model}


# The training loop and the command.


def prepared(path: pathlib.Path, mesh: jax.sharding.Mesh) -> experiment.Run:
    """Five of six clients per epoch, rounds of 3, 3 and 1 steps, with the toy network."""
    config = Config(
        epochs=3,
        data=Data(name="npz", dir=str(path)),
        clients=Clients(num=6, cohort=5, batch_size=2, noniid_ratio=1.0),
        model=Model(width=4),
        moco=Moco(key_dim=8, queue_size=24, temperature=1.0),
        eval=Eval(every=1, knn_k=3, probe_epochs=0),
    )
    config.sync.frequency = 2
    return prepare(config, mesh, CPU, model=make_toy_model())


def test_a_run_resumes_on_another_mesh(tmp_path: pathlib.Path) -> None:
    """An epoch on 8 x 1, one on 2 x 4 and one on one device give the metrics of one device alone."""
    path = tmp_path / "images.npz"
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (84, 4, 4, 3)).astype(np.uint8), np.arange(84) % 3
    np.savez(path, x_train=pictures, y_train=labels, x_test=pictures[:20], y_test=labels[:20])

    def go(folder: pathlib.Path, mesh: jax.sharding.Mesh, last_epoch: int) -> bool:
        run = prepared(path, mesh)
        workdir.claim(folder, run.config, {})
        stop = threading.Event()

        def watch(metrics: workdir.Metrics) -> None:
            if metrics["epoch"] == last_epoch:
                stop.set()

        return loop.train(run, stop.is_set, Output(folder, lambda line: None, watch)).finished

    assert not go(tmp_path / "many", make_mesh(Mesh(), jax.devices()), 1)
    assert not go(tmp_path / "many", make_mesh(Mesh(data=2, model=4), jax.devices()), 2)
    assert go(tmp_path / "many", single(), -1)
    assert go(tmp_path / "one", single(), -1)
    many, one = (workdir.read_metrics(tmp_path / name) for name in ("many", "one"))
    assert [m["step"] for m in many] == [m["step"] for m in one] == [0, 7, 14, 21]
    for a, b in zip(many[1:], one[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["divergence"] == pytest.approx(b["divergence"], rel=1e-3)
        assert a["knn_backbone"] == pytest.approx(b["knn_backbone"], abs=0.051)  # of 20 images


def test_a_scanned_round_on_a_mesh_equals_steps_on_one_device() -> None:
    """As on accelerators: one program for a whole round; it gathers the images, or they are streamed."""

    def make_views(rng: Array, images: Array) -> Views:
        noise = jax.random.normal(rng, (2, *images.shape))
        return Views(*(images[None].astype(jnp.float32) / 255 + 0.1 * noise))

    pictures = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3)).astype(np.uint8)
    indices = np.random.default_rng(1).integers(0, 40, (3, 5, 2)).astype(np.int32)
    cohort = np.array([0, 1, 3, 4, 6], np.int32)
    ends = []
    for mesh, scan in ((single(), False), (make_mesh(Mesh(data=4, model=2), jax.devices()), True)):
        placement = make_placement(mesh, CPU)
        algorithm = distribute(
            mocosfl(
                make_toy_model(),
                num_clients=7,
                moco=MomentumContrast(queue_size=24, temperature=1.0),
                placement=placement,
            ),
            mesh,
        )
        place, size = of_images(mesh, 5), 3 if scan else 1
        places = padded(mesh, 5, 2)
        filled = np.pad(indices, [(0, 0), (0, places[0] - 5), (0, 0)])
        state = jax.jit(algorithm.init)(jax.random.key(0))
        turn = rounds.make_turn(algorithm, state, 5)
        run = rounds.make_run_steps(
            algorithm,
            make_views,
            jax.random.key(2),
            state=turn.state,
            images=jax.ShapeDtypeStruct((size, *places, *pictures.shape[1:]), np.uint8, sharding=place),
            spread=make_spread(mesh, 5, 2),
        )
        dealt = {epoch: filled for epoch in range(2)}
        feeds = [
            batches.resident(replicate(mesh, pictures), dealt.__getitem__, size, place),
            batches.streamed(
                pictures,
                dealt.__getitem__,
                size,
                place,
                epochs=2,
                steps_per_epoch=3,
                steps_per_round=3,
            ),
        ]
        losses = []
        for epoch in range(2):
            at_work, curve = run(turn.enter(state, cohort), feeds[epoch](epoch, range(3)))
            state = turn.leave(at_work)
            losses += np.concatenate(curve.loss).tolist()
        ends.append((losses, jax.tree.map(np.asarray, online_model(state))["kernel"]))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-5)
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-4, atol=1e-6)


def test_the_command_trains_on_all_devices(
    toy_images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    argv = arguments(
        toy_images, tmp_path, "--config.mesh.data=None", "--config.mesh.model=2", "--config.epochs=1"
    )
    argv.append("--config.eval.probe_epochs=0")
    assert main(with_toy(argv)) == 0
    out = capsys.readouterr().out
    assert re.search(r"devices +8 x cpu \(cpu\), mesh of data 4 x model 2\n", out)
    assert main([*argv, "--config.mesh.model=8"]) == 2
    assert "config.moco.queue_size: found 20, allowed: multiples of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sizes, shape",
    [((None, None), (8, 1)), ((2, None), (2, 4)), ((None, 4), (2, 4)), ((2, 1), (2, 1)), ((3, 2), (3, 2))],
)
def test_open_sizes_use_the_remaining_devices(
    sizes: tuple[int | None, int | None], shape: tuple[int, int]
) -> None:
    mesh = make_mesh(Mesh(data=sizes[0], model=sizes[1]), jax.devices())
    assert mesh.devices.shape == shape


def test_on_one_device_nothing_is_distributed() -> None:
    mesh = make_mesh(Mesh(data=1, model=1), jax.devices()[3:])
    assert mesh.devices.tolist() == [[jax.devices()[3]]]
    algorithm = mocosfl(make_toy_model(), num_clients=2)
    assert distribute(algorithm, mesh) is algorithm
    assert make_placement(mesh, CPU) == one_device(CPU)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((3, None), r"config.mesh.data: found 3, allowed: 1, 2, 4, 8 \(divisors of 8"),
        ((None, 16), r"config.mesh.model: found 16, allowed: 1, 2, 4, 8"),
        ((4, 4), "config.mesh: found data 4 and model 4, allowed: a product of at most 8"),
    ],
)
def test_an_impossible_mesh_is_refused(sizes: tuple[int | None, int | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mesh(Mesh(data=sizes[0], model=sizes[1]), jax.devices())


def test_members_keep_their_truth_values() -> None:
    """As in the state of `optax.apply_if_finite`, when a sampled cohort enters."""
    mesh = make_mesh(Mesh(data=4, model=2), jax.devices())
    select = make_placement(mesh, CPU).select
    pool = {"last_finite": jnp.arange(16) % 3 == 0, "count": jnp.arange(16, dtype=jnp.int32)}
    cohort = jnp.array([0, 1, 3, 9, 10], jnp.int32)
    found = jax.jit(select)(pool, cohort)
    assert {name: leaf.dtype for name, leaf in found.items()} == {"last_finite": bool, "count": np.int32}
    np.testing.assert_array_equal(found["last_finite"], [True, False, True, True, False])
    np.testing.assert_array_equal(found["count"], cohort)
