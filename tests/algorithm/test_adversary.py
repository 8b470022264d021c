"""A decoder that is trained against the clients: the order of a step, its hinge, and several devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from mocosfl_jax import MomentumContrast, SplitModel, mocosfl, one_device
from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.adversary import Adversary, decoder_adversary
from mocosfl_jax.algorithm.server import ServerState
from mocosfl_jax.config import Mesh
from mocosfl_jax.models.decoders import Decoder, make_decoder
from mocosfl_jax.models.forms import ACCELERATOR
from mocosfl_jax.parallel.exchange import make_placement
from mocosfl_jax.parallel.mesh import make_mesh, make_spread
from mocosfl_jax.parallel.state import distribute
from mocosfl_jax.privacy.similarity import ssim
from tests.support.algorithms import Build, assert_trees_close, client
from tests.support.toy import random_views

N, B, K = 2, 3, 20
TAU, T, LR, DECAY, RATE = 0.9, 0.5, 0.1, 5e-4, 0.01
STRENGTH, TARGET = 3.0, 0.6
MEAN, SCALE = 0.5, 0.2


def toy_decoder() -> Decoder:
    """One layer on the smashed data minus their mean, which is that of the batch or a running one."""

    def init(rng: Array) -> tuple[Any, Any]:
        return {"w": jax.random.normal(rng, (5, 3)), "b": jnp.zeros(3)}, jnp.full(5, 0.3)

    def apply(params: Any, running: Any, smashed: Array, *, training: bool) -> tuple[Array, Any]:
        mean = jnp.mean(smashed, axis=(0, 1, 2)) if training else running
        centred = smashed - mean.reshape(1, 1, 1, -1)
        images = jax.nn.sigmoid(centred @ params["w"] + params["b"].reshape(1, 1, 1, -1))
        return images, 0.9 * running + 0.1 * mean if training else running

    return Decoder(init, apply)


def closeness(images: Array, others: Array) -> Array:
    return 1 - jnp.mean(jnp.abs(images - others), axis=(1, 2, 3))


def to_images(views: Array) -> Array:
    return jnp.clip(MEAN + SCALE * views, 0, 1)


def make(**changes: Any) -> Adversary:
    settings: dict[str, Any] = {
        "strength": STRENGTH,
        "target": TARGET,
        "optimizer": optim.adam(RATE),
        "steps_per_epoch": 2,
    }
    return decoder_adversary(toy_decoder(), closeness, to_images, **settings | changes)


def mapped(function: Any, *trees: Any) -> Any:
    return jax.tree.map(function, *trees)


class ByHand(NamedTuple):
    """What a loop in plain JAX trains."""

    clients: list[Any]
    key_clients: list[Any]
    client_speeds: list[Any]
    server: Any
    key_server: Any
    server_speed: Any
    queue: Array
    decoder: Any
    running: Array  # the decoder's statistics
    moments: tuple[Any, Any]  # of its Adam


def sgd(params: Any, speed: Any, grads: Any) -> tuple[Any, Any]:
    speed = mapped(lambda m, grad, p: 0.9 * m + grad + DECAY * p, speed, grads, params)
    return mapped(lambda p, m: p - LR * m, params, speed), speed


def toward(key: Any, online: Any) -> Any:
    return mapped(lambda k, p: TAU * k + (1 - TAU) * p, key, online)


def step_by_hand(
    model: SplitModel, now: ByHand, t: int, views: Any, hinge: str, batch_statistics: bool
) -> tuple[ByHand, Array, list[Array]]:
    """Decoder, regulariser, server, clients. Gives the gradient that is sent back, and the similarities."""
    apply, old = toy_decoder().apply, now.running
    images = jnp.concatenate([to_images(query) for query in views.query])
    hidden = jnp.concatenate([model.client(c, x) for c, x in zip(now.clients, views.query, strict=True)])
    key_clients = [toward(k, p) for k, p in zip(now.key_clients, now.clients, strict=True)]
    hidden_keys = jnp.concatenate([model.client(c, x) for c, x in zip(key_clients, views.key, strict=True)])

    # 1. the decoder, by Adam on minus the similarity, with the statistics of the batch
    def found(decoder: Any) -> Array:
        return jnp.mean(closeness(apply(decoder, old, hidden, training=True)[0], images))

    grads = mapped(jnp.negative, jax.grad(found)(now.decoder))
    running = 0.9 * old + 0.1 * jnp.mean(hidden, axis=(0, 1, 2))
    first = mapped(lambda m, grad: 0.9 * m + 0.1 * grad, now.moments[0], grads)
    second = mapped(lambda v, grad: 0.999 * v + 0.001 * grad**2, now.moments[1], grads)
    decoder = mapped(
        lambda p, m, v: p - RATE * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8),
        now.decoder,
        first,
        second,
    )

    # 2. the regulariser, against the updated decoder
    def each(hidden: Array) -> Array:
        return closeness(apply(decoder, running, hidden, training=batch_statistics)[0], images)

    def hinged(hidden: Array) -> Array:
        if hinge == "batch":
            return STRENGTH * jnp.maximum(jnp.mean(each(hidden)) - TARGET, 0)
        return STRENGTH * jnp.mean(jnp.maximum(each(hidden) - TARGET, 0))

    against = jax.grad(hinged)(hidden)
    assert np.any(against != 0)

    # 3. the server: its momentum model first
    key_server = toward(now.key_server, now.server)

    def unit(params: Any, hidden: Array) -> Array:
        rows = model.server(params, hidden).projection
        return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)

    keys = unit(key_server, hidden_keys)

    def contrast(params: Any, hidden: Array) -> Array:
        query = unit(params, hidden)
        logits = jnp.concatenate([jnp.sum(query * keys, 1, keepdims=True), query @ now.queue.T], axis=1) / T
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    server_grads, hidden_grad = jax.grad(contrast, argnums=(0, 1))(now.server, hidden)
    server, server_speed = sgd(now.server, now.server_speed, server_grads)
    oldest = (t - 1) * N * B
    queue = now.queue.at[(oldest + np.arange(N * B)) % K].set(keys)

    # 4. the clients, on both gradients
    clients, speeds = [], []
    for i, (params, speed) in enumerate(zip(now.clients, now.client_speeds, strict=True)):
        _, pull = jax.vjp(lambda p, i=i: model.client(p, views.query[i]), params)
        new = sgd(params, speed, *pull((hidden_grad + against)[i * B : (i + 1) * B]))
        clients.append(new[0])
        speeds.append(new[1])
    models = (clients, key_clients, speeds, server, key_server, server_speed)
    seen = [found(now.decoder), jnp.mean(each(hidden))]
    return ByHand(*models, queue, decoder, running, (first, second)), hidden_grad + against, seen


@pytest.mark.parametrize("hinge, batch_statistics", [("image", True), ("batch", False)])
def test_a_step_is_that_of_a_loop(
    build: Build, toy_model: SplitModel, hinge: str, batch_statistics: bool
) -> None:
    """Three steps in the official order, written out."""
    algorithm, state = build(
        toy_model,
        num_clients=N,
        queue_size=K,
        temperature=T,
        momentum=TAU,
        symmetric=False,
        adversary=make(hinge=hinge, batch_statistics=batch_statistics),
    )
    one, server, attacker = client(state.clients.params, 0), state.server.params, state.server.adversary
    zeros = [mapped(jnp.zeros_like, tree) for tree in (one, server, attacker.params)]
    models = ([one] * N, [one] * N, [zeros[0]] * N, server, server, zeros[1])
    now = ByHand(*models, state.server.queue.keys, attacker.params, attacker.statistics, (zeros[2], zeros[2]))
    for t in range(1, 4):
        views = random_views(t, N, B)
        now, sent_back, seen = step_by_hand(toy_model, now, t, views, hinge, batch_statistics)
        state, info = algorithm.step(state, views)
        assert info.smashed_grad is not None
        np.testing.assert_allclose(info.smashed_grad, sent_back, rtol=1e-3, atol=1e-5)
    attacker = state.server.adversary
    assert_trees_close(attacker.params, now.decoder, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(attacker.statistics, now.running, rtol=1e-4, atol=1e-6)
    assert_trees_close(state.server.params, now.server, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.server.queue.keys, now.queue, rtol=1e-3, atol=1e-5)
    for i in range(N):
        assert_trees_close(client(state.clients.params, i), now.clients[i], rtol=1e-3, atol=1e-5)
    # The third step begins another epoch of two steps.
    np.testing.assert_allclose(attacker.similarity, seen, rtol=1e-4)


def test_the_similarities_are_means_over_the_epoch() -> None:
    adversary = make(steps_per_epoch=3, optimizer=optim.adam(0.0))
    state = adversary.init(jax.random.key(0))
    found = []
    for number in range(3):
        smashed = jax.random.normal(jax.random.key(number), (4, 4, 4, 5))
        views = jax.random.normal(jax.random.key(9 + number), (4, 4, 4, 3))
        alone, _ = adversary.step(state, smashed, views, jnp.array(0))
        found.append(np.asarray(alone.similarity))
        state, _ = adversary.step(state, smashed, views, jnp.array(number))
    np.testing.assert_allclose(state.similarity, np.mean(found, axis=0), rtol=1e-5)


def test_the_hinge_has_no_gradient_below_the_target() -> None:
    """Of single images or of the mean of the batch."""
    smashed = jax.random.normal(jax.random.key(0), (6, 4, 4, 5))
    views = jax.random.normal(jax.random.key(1), (6, 4, 4, 3)) * jnp.arange(6.0).reshape(6, 1, 1, 1)
    still = {"optimizer": optim.adam(0.0), "batch_statistics": False}
    state = make(**still).init(jax.random.key(2))
    pictures, _ = toy_decoder().apply(state.params, state.statistics, smashed, training=True)
    new, _ = make(**still).step(state, smashed, views, jnp.array(0))
    pictures, _ = toy_decoder().apply(state.params, new.statistics, smashed, training=False)
    each = np.asarray(closeness(pictures, to_images(views)))
    target = float(np.sort(each)[[2, 3]].mean())  # three images are above it

    _, grad = make(target=target, hinge="image", **still).step(state, smashed, views, jnp.array(0))
    moved = np.any(np.asarray(grad) != 0, axis=(1, 2, 3))
    np.testing.assert_array_equal(moved, each > target)
    above = float(each.mean()) + 1e-3
    assert (each > above).any()
    _, grad = make(target=above, hinge="batch", **still).step(state, smashed, views, jnp.array(0))
    assert not np.any(grad)
    _, grad = make(target=above - 2e-3, hinge="batch", **still).step(state, smashed, views, jnp.array(0))
    assert np.all(np.any(np.asarray(grad) != 0, axis=(1, 2, 3)))


def test_other_clients_and_strength_zero_change_nothing(build: Build, toy_model: SplitModel) -> None:
    plain, start = build(toy_model, num_clients=N, queue_size=K)
    with_one, state = build(toy_model, num_clients=N, queue_size=K, adversary=make(strength=0.0))
    views = random_views(1, N, B)
    expected, _ = plain.step(start, views)
    new, _ = with_one.step(state, views)
    assert_trees_close(new._replace(server=ServerState(*new.server[:4])), expected, rtol=1e-6)
    assert not hasattr(start.server, "adversary")  # so that checkpoints have the layout of earlier versions


@pytest.mark.parametrize("sizes, clients, batch", [((2, 1), 1, 6), ((2, 2), 1, 6), ((4, 1), 4, 2)])
def test_several_devices_equal_one(
    toy_model: SplitModel, sizes: tuple[int, int], clients: int, batch: int
) -> None:
    """The batch norms and the hinge are over the batch of all devices.

    The decoder learns by SGD, as Adam makes steps of the rounding errors of biases before batch norms.
    """

    def train(mesh: Any, placement: Any) -> Any:
        adversary = decoder_adversary(
            make_decoder("conv_normN0C4", (4, 4, 5), 4, ACCELERATOR, stacked=False),
            ssim,
            to_images,
            strength=STRENGTH,
            target=0.01,
            optimizer=optim.sgd(LR),
            steps_per_epoch=2,
        )
        algorithm = mocosfl(
            toy_model,
            num_clients=clients,
            moco=MomentumContrast(queue_size=24, temperature=1.0),
            adversary=adversary,
            client_optimizer=optim.sgd(LR),
            placement=placement,
        )
        if mesh is not None:
            algorithm = distribute(algorithm, mesh)
            spread = make_spread(mesh, clients, batch)
        else:

            def spread(images: Array) -> Array:
                return images

        state = jax.jit(lambda rng: algorithm.enter(algorithm.init(rng)))(jax.random.key(0))
        step = jax.jit(lambda state, views: algorithm.step(state, type(views)(*map(spread, views))))
        for seed in (1, 2):
            state, info = step(state, random_views(seed, clients, batch))
        return jax.device_get((jax.jit(algorithm.leave)(state), info.smashed_grad))

    mesh = make_mesh(Mesh(data=sizes[0], model=sizes[1]), jax.devices())
    one = train(None, one_device(ACCELERATOR))
    several = train(mesh, make_placement(mesh, ACCELERATOR))
    assert_trees_close(several[0].server, one[0].server, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(several[1], one[1], rtol=2e-3, atol=2e-5)
    assert np.any(one[1])


def test_the_official_decoders_rate() -> None:
    """1e-3, times 0.2 at epochs 60, 120 and 160 of 200."""
    rate = optim.schedule(
        "multistep", 1e-3, epochs=200, steps_per_epoch=10, decay=0.2, milestones=(0.3, 0.6, 0.8)
    )
    epochs = np.array([0, 59, 60, 119, 120, 159, 160, 199])
    found = [float(rate(jnp.array(10 * epoch + 9))) for epoch in epochs]
    np.testing.assert_allclose(found, 1e-3 * 0.2 ** np.array([0, 0, 1, 1, 2, 2, 3, 3]), rtol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strength": -1.0}, "strength: found -1.0, allowed: 0 or more"),
        ({"target": 1.0}, "target: found 1.0, allowed: more than 0, less than 1"),
        ({"target": 0.0}, "target: found 0.0"),
        ({"hinge": "mean"}, "hinge: found 'mean', allowed: image, batch"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make(**settings)
    assert str(error.value).startswith(message)


def test_clients_that_cannot_learn_are_refused(toy_model: SplitModel) -> None:
    with pytest.raises(ValueError, match="adversary: found one of frozen clients"):
        mocosfl(toy_model, num_clients=N, client_optimizer=None, adversary=make())

    def init(rng: Array) -> tuple[Any, Any]:
        return {}, toy_model.init(rng)[1]

    algorithm = mocosfl(toy_model._replace(init=init), num_clients=N, adversary=make())
    with pytest.raises(ValueError, match="adversary: found one of clients without parameters"):
        algorithm.init(jax.random.key(0))
