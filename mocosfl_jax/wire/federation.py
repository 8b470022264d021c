"""The programs of a run whose clients are elsewhere. The training loop drives them as the simulation's.

The server holds what the simulation holds: the server-side model, the queue, and, as of the last epoch, the
state of every client. So its checkpoints are those of the simulation.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from mocosfl_jax.algorithm.interface import CohortState, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.algorithm.moco import momentum_update
from mocosfl_jax.config import Resolved
from mocosfl_jax.errors import NonFiniteError, UserError
from mocosfl_jax.evaluation.features import Encode
from mocosfl_jax.models import check_independence
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import experiment, rounds
from mocosfl_jax.training.experiment import Loaded, Run
from mocosfl_jax.training.programs import Programs
from mocosfl_jax.wire import codec, messages
from mocosfl_jax.wire.codec import Misfit
from mocosfl_jax.wire.contract import Terms, make_contract
from mocosfl_jax.wire.hub import Hub

# Between two looks at who is connected.
_PATIENCE = 0.5  # seconds
_ABANDONED = "the round has too few clients; it is taken up from the newest checkpoint"
_NAMED = 10  # clients in a line


class Abandoned(Exception):
    """The run was to stop, and no client was there to end the round."""


def check(config: Resolved) -> None:
    """Raise UserError for what clients over a network cannot do."""
    allowed: dict[str, tuple[Any, Any]] = {
        "algorithm": (config.algorithm, "mocosfl"),
        "own.algorithm": (config.own.algorithm, None),
        "moco.feature_sharing": (config.moco.feature_sharing, True),
        "moco.concatenate": (config.moco.concatenate, True),
        "sync.divergence_lambda": (config.sync.divergence_lambda, None),
        "saving.loss_threshold": (config.saving.loss_threshold, 0.0),
        "resist.strength": (config.resist.strength, 0.0),
        "resist.source": (config.resist.source, None),
        "resist.target_share": (config.resist.target_share, 1.0),
        "privacy.noise": (config.privacy.noise, 0.0),  # the server's programs would draw it
        "clients.rich": (config.clients.rich, 0.0),
    }
    for field, (found, wanted) in allowed.items():
        if found != wanted:
            raise UserError(f"config.{field}: found {found!r}, allowed with real clients: {wanted!r}")
    if config.moco.head == "mlp_bn":
        raise UserError(
            "config.moco.head: found 'mlp_bn', allowed with real clients: linear, mlp; its statistics would "
            "contain the rows of clients that are left out"
        )
    if config.model.cut_layer == 0:
        raise UserError(
            "config.model.cut_layer: found 0, allowed with real clients: 1 or more; clients without layers "
            "would send their images"
        )


def plan(config: Resolved, mesh: Mesh, loaded: Loaded, images: Mapping[int, int]) -> Run:
    """The run of clients that hold so many images each.

    Args:
      config: the resolved configuration.
      mesh: of the server.
      loaded: the server's own data set. It serves to evaluate, and its mean and standard deviation normalise
        the images of all clients.
      images: of each of the N clients.

    Raises:
      UserError: if a part of the configuration is impossible.
    """
    run = experiment.of_real_clients(config, mesh, loaded, images)
    if config.own.network is not None:
        height, width, channels = run.dataset.x_train.shape[1:]
        # The rows of clients that are left out must not change those of the others.
        check_independence(run.model, (height, width, channels), head=True)
    return run


def make_programs(
    run: Run,
    state: TrainState,
    rng_views: Array,
    encode: Encode,
    *,
    hub: Hub,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> Programs:
    """The programs for the training loop. The contract is offered to the clients.

    Args:
      run: from `plan`.
      state: the shapes, dtypes and placement of its state.
      rng_views: key of all augmentations of the run.
      encode: from `make_encode`.
      hub: of the clients.
      stop: whether the run should stop; then a wait for clients ends.
      say: prints a line.
    """
    contract, terms = make_contract(run, state, rng_views)
    hub.offer(contract)
    turn = rounds.make_turn(run.algorithm, state, None if run.whole_pool else run.cohort)
    server_step = compile_server_step(run, turn.state, terms.smashed)
    settings = run.config.wire
    config = run.config
    missing: Counter[int] = Counter()  # steps of an epoch that each client had no part in
    shares = np.array([len(part) if config.sync.weighted else 1 for part in run.parts])
    # The parts of its state that a client sends at a synchronization and at the end of its turn.
    averaged: list[str] = []
    own: list[str] = []
    if not terms.frozen:
        averaged.append("params")
        (averaged if config.sync.momentum_models else own).append("key_params")
        if config.sync.buffers != "reset":
            (averaged if config.sync.buffers == "average" else own).append("opt_state")

    def members(state: CohortState) -> list[int]:
        numbers = range(config.clients.num) if state.cohort is None else jax.device_get(state.cohort)
        return [int(number) for number in numbers]

    def feed(epoch: int, steps: range) -> Iterator[Any]:
        """The numbers of the steps: the clients know their images."""
        for step in steps:
            yield np.array([epoch * run.steps_per_epoch + step])

    def enter(state: TrainState, cohort: np.ndarray | None) -> CohortState:
        at_work = turn.enter(state, cohort)
        await_clients(hub, members(at_work), settings.deadline_s, settings.least, stop, say)
        return at_work

    def run_steps(state: CohortState, pieces: Iterable[Any]) -> tuple[CohortState, rounds.Curve]:
        curves = []
        for piece in pieces:
            state, curve = step(state, int(piece[0]))
            curves.append(curve)
        return state, rounds.joined(curves)

    def step(state: CohortState, number: int) -> tuple[CohortState, rounds.Curve]:
        cohort = members(state)
        form = terms.smashed
        while True:
            await_clients(hub, cohort, 0.0, settings.least, stop, say)
            bring_up_to_date(hub, cohort, state)
            requests = {
                client: messages.ToClient(forward=messages.Forward(step=number, place=place))
                for place, client in enumerate(cohort)
                if hub.current(client)
            }
            answers = hub.ask(requests, settings.deadline_s)
            found = {
                client: smashed
                for client, answer in answers.items()
                if (smashed := fitting(hub, client, partial(_smashed, answer, form))) is not None
            }
            if terms.frozen:  # it has moved its momentum model, and the server has not
                for client in requests.keys() - found.keys():
                    hub.doubt(client)
            if found:
                break
            if stop():
                raise Abandoned(_ABANDONED)
        missing.update(set(cohort) - found.keys())
        rows = form.shape[0]
        shape = (len(cohort), *form.shape)
        views = [np.zeros(shape, jnp.dtype(form.dtype)) for _ in range(2)]
        arrived = np.zeros((len(cohort), rows), bool)
        for place, client in enumerate(cohort):
            if client in found:
                arrived[place] = True
                for view, sent in zip(views, found[client], strict=True):
                    view[place] = sent
        query, key = (view.reshape(-1, *form.shape[1:]) for view in views)
        state, curve, gradient = server_step(state, (query, key), arrived.reshape(-1))
        loss = float(jax.device_get(curve.loss[0])[0])
        if not np.isfinite(loss):  # before its gradients reach the clients
            raise NonFiniteError(f"the loss of step {number + 1:,} is {loss}")
        if not terms.frozen:
            gradients = np.asarray(jax.device_get(gradient)).reshape(shape)
            hub.tell(
                {
                    client: messages.ToClient(
                        backward=messages.Backward(gradient=codec.pack(gradients[place], form))
                    )
                    for place, client in enumerate(cohort)
                    if client in found
                }
            )
        return state, curve

    def sync(state: CohortState) -> tuple[CohortState, SyncInfo]:
        cohort = members(state)
        if averaged:
            state = collect(hub, state, cohort, averaged, terms, settings.deadline_s, shares)
        state, info = turn.sync(state)
        if averaged:  # all receive the average, as in the simulation
            rows = jax.device_get([getattr(state.clients, part) for part in averaged])
            means = {
                name: codec.pack_leaves([leaf[0] for leaf in jax.tree.leaves(part)])
                for name, part in zip(averaged, rows, strict=True)
            }
            for_cohort, for_others = (
                messages.ToClient(load=messages.State(**means, reset=reset))
                for reset in (config.sync.buffers == "reset", False)
            )
            at_work = set(cohort)
            hub.tell(
                {
                    client: for_cohort if client in at_work else for_others
                    for client in range(config.clients.num)
                }
            )
        return state, info

    def leave(state: CohortState) -> TrainState:
        cohort = members(state)
        if own:
            state = collect(hub, state, cohort, own, terms, settings.deadline_s)
        if terms.frozen:  # one momentum model is that of all clients: the mean, if some have missed a step
            everybody = set(range(config.clients.num))
            for client in everybody if missing else everybody.difference(cohort):
                hub.doubt(client)
        if missing:
            say(f"left out of some steps: {left_out(missing)}")
            missing.clear()
        return turn.leave(state)

    return Programs(feed, run_steps, None, rounds.Turn(enter, sync, leave, turn.state), encode)


def compile_server_step(run: Run, state: CohortState, of_client: codec.Format) -> Any:
    """Compile the server's half of a step.

    Args:
      run: from `plan`.
      state: the shapes, dtypes and placement of the cohort at work.
      of_client: how a client sends the smashed data of one kind of view.

    Returns:
      A function (state, smashed queries and keys of the cohort [n, h, w, c] each, which rows have arrived [n]
      bool) -> state, curve, gradient of the smashed queries [n, h, w, c]. The state is donated.
    """
    replay = run.algorithm.replay
    assert replay is not None

    def server_step(
        state: CohortState, smashed: tuple[Array, Array], arrived: Array
    ) -> tuple[CohortState, rounds.Curve, Array]:
        if run.config.optim.client_lr == 0:  # what frozen clients do to their momentum models is known here
            members = state.clients
            moved = momentum_update(members.key_params, members.params, run.config.moco.momentum)
            there = arrived.reshape(run.cohort, -1)[:, 0]
            rows = len(jax.tree.leaves(moved)[0])  # the cohort is padded, so that the devices can share it
            there = jnp.pad(there, (0, rows - run.cohort))
            key_params = jax.tree.map(
                lambda new, old: jnp.where(jnp.expand_dims(there, range(1, new.ndim)), new, old),
                moved,
                members.key_params,
            )
            state = state._replace(clients=members._replace(key_params=key_params))
        state, info = replay.train(state, SmashedData(*smashed), arrived)
        assert info.smashed_grad is not None
        return state, rounds.Curve([info.loss[None]], [info.top1[None]]), info.smashed_grad

    rows, *shape = of_client.shape
    one = jax.ShapeDtypeStruct((run.cohort * rows, *shape), of_client.dtype)
    arrived = jax.ShapeDtypeStruct(one.shape[:1], np.bool_)
    return (
        jax.jit(server_step, donate_argnums=0)
        .lower(state, (one, one), arrived)
        .compile(compiler_options=compiler.options(meshes.platform(run.mesh)))
    )


def await_clients(
    hub: Hub,
    cohort: list[int],
    seconds: float,
    least: int,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Wait until a cohort can be asked: for some seconds all of it, then the least number of clients."""
    start, told = time.monotonic(), False
    while len(present := hub.ready() & set(cohort)) < len(cohort):
        late = time.monotonic() - start > seconds
        if late and len(present) >= min(least, len(cohort)):
            break
        if stop():
            if len(present) < min(least, len(cohort)):
                raise Abandoned(_ABANDONED)
            break
        if late and not told:
            say(f"waiting for clients: {len(present)} of {len(cohort)} are there, {least} are needed")
            told = True
        hub.wait(_PATIENCE)


def bring_up_to_date(hub: Hub, cohort: list[int], state: CohortState) -> None:
    """Give the clients that have come, or have missed something, the state that the server has of them."""
    behind = [client for client in sorted(hub.ready() & set(cohort)) if not hub.current(client)]
    if not behind:
        return
    rows: dict[str, Any] = jax.device_get({part: getattr(state.clients, part) for part in messages.PARTS})
    for client in behind:
        place = cohort.index(client)
        parts = {
            name: codec.pack_leaves([leaf[place] for leaf in jax.tree.leaves(part)])
            for name, part in rows.items()
        }
        hub.load(client, messages.ToClient(load=messages.State(**parts)))


def left_out(missing: Mapping[int, int]) -> str:
    """Say which clients had no part in how many steps, at most ten of them.

    Example:
      >>> left_out({3: 2, 1: 5})
      'client 1 (5), client 3 (2)'
    """
    parts = [f"client {client} ({missing[client]:,})" for client in sorted(missing)]
    more = [f"and {len(parts) - _NAMED:,} more"] if len(parts) > _NAMED else []
    return ", ".join([*parts[:_NAMED], *more])


def collect(
    hub: Hub,
    state: CohortState,
    cohort: list[int],
    parts: list[str],
    terms: Terms,
    seconds: float,
    shares: np.ndarray | None = None,
) -> CohortState:
    """Replace parts of the cohort's state by what its clients send.

    Args:
      hub: of the clients.
      state: the cohort at work.
      cohort: numbers of its clients.
      parts: their names.
      terms: of the contract.
      seconds: for which an answer is awaited.
      shares: [N], the weights of an average that follows. Then a client that does not answer gets the average
        of the others, so that it has no part in it. None: it keeps what the server has of it.
    """
    request = {part: True for part in parts}
    current = [client for client in cohort if hub.current(client)]
    answers = hub.ask(
        {client: messages.ToClient(collect=messages.Collect(**request)) for client in current}, seconds
    )
    found = {
        client: leaves
        for client, answer in answers.items()
        if (leaves := fitting(hub, client, partial(_leaves, answer, parts, terms))) is not None
    }
    for client in cohort:
        if client not in found:
            hub.doubt(client)
    if not found:
        return state
    members = state.clients
    for number, name in enumerate(parts):
        part = getattr(members, name)
        leaves, structure = jax.tree.flatten(part)
        new = []
        for index, leaf in enumerate(leaves):
            rows = np.array(jax.device_get(leaf))
            if shares is not None and len(found) < len(cohort):
                sent = np.stack([leaves[number][index] for leaves in found.values()])
                rows[:] = np.average(sent, axis=0, weights=shares[list(found)])
            for place, client in enumerate(cohort):
                if client in found:
                    rows[place] = found[client][number][index]
            new.append(jax.device_put(rows, leaf.sharding))
        members = members._replace(**{name: jax.tree.unflatten(structure, new)})
    return state._replace(clients=members)


def fitting(hub: Hub, client: int, read: Callable[[], Any]) -> Any:
    """What a client has sent, or None if it does not fit; then its stream is ended."""
    try:
        return read()
    except Misfit as error:
        hub.drop(client, str(error))
        return None


def _smashed(answer: Any, form: codec.Format) -> list[np.ndarray]:
    if answer.WhichOneof("content") != "smashed":
        raise Misfit(f"message: found {answer.WhichOneof('content')}, allowed: smashed")
    return [codec.unpack(answer.smashed.query, form), codec.unpack(answer.smashed.key, form)]


def _leaves(answer: Any, parts: list[str], terms: Terms) -> list[list[np.ndarray]]:
    if answer.WhichOneof("content") != "state":
        raise Misfit(f"message: found {answer.WhichOneof('content')}, allowed: state")
    return [codec.unpack_leaves(getattr(answer.state, part), terms.shapes(part)) for part in parts]
