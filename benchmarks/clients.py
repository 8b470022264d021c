"""The client side alone, compared with the loop over client modules in `torch_loop`.

One call maps views to smashed data, takes their gradient, and does SGD, momentum update and synchronization.
The network is ResNet-18, the batch size 1.

Last results: two cores of an AMD EPYC, jax 0.10.2, torch 2.13.0, 2026-11-23, --repeats=3

                              ours_s  baseline_s  ratio  clients_per_s
    resnet18 cut1 10x1 f32    0.006094     0.03106  5.097          1,641
    resnet18 cut1 100x1 f32   0.0291      0.1137  3.907          3,437
    resnet18 cut1 1000x1 f32   0.435       1.105   2.54          2,299
    resnet18 cut2 10x1 f32    0.04695     0.08412  1.792            213
    resnet18 cut2 100x1 f32   0.4624      0.8045   1.74          216.3
    resnet18 cut2 1000x1 f32   5.594       9.296  1.662          178.8
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from benchmarks import settings
from benchmarks.results import Result, result
from benchmarks.settings import Setting
from benchmarks.timing import Call, medians, stepper
from mocosfl_jax import SmashedData, Views
from mocosfl_jax.algorithm import clients, optim
from mocosfl_jax.parallel import exchange
from mocosfl_jax.parallel import mesh as meshes

NEEDS = ("torch",)
SETTINGS = tuple(Setting(cut_layer=cut, clients=count) for cut in (1, 2) for count in (10, 100, 1000))


def ours(setting: Setting) -> Call:
    model, algorithm = settings.build(setting)
    over_clients = exchange.make_placement(settings.mesh(), settings.platform_forms()).over_clients
    optimizer = optim.SGD

    def init(rng: Array) -> clients.ClientState:
        padded = algorithm.enter(algorithm.init(rng)).clients
        return jax.tree.map(lambda leaf: leaf[: setting.clients], padded)

    def work(
        state: clients.ClientState, views: Views, smashed_grad: Array
    ) -> tuple[clients.ClientState, SmashedData]:
        state, smashed, pullback = clients.forward(over_clients(model.client), state, views, 0.99)
        state = clients.backward(state, pullback, smashed_grad, optimizer, jax.numpy.zeros((), int))
        state, *_ = clients.synchronize(state, None, clients.FEDAVG, optimizer)
        return state, smashed

    place = meshes.of_clients(settings.mesh(), setting.clients)
    state = jax.jit(init, out_shardings=place)(jax.random.key(0))
    program = jax.jit(work, donate_argnums=0, in_shardings=place, out_shardings=place)
    return stepper(
        program, state, *jax.device_put((settings.views(setting), smashed_gradient(setting)), place)
    )


def baseline(setting: Setting) -> Call:
    from benchmarks import torch_loop

    client, _ = torch_loop.split_resnet18(setting)
    client.to(torch_loop.device())
    side = torch_loop.ClientSide(client, setting.clients, lr=0.06, momentum=0.99)
    query, key = map(torch_loop.images, settings.views(setting))
    gradient = torch_loop.images(smashed_gradient(setting)).flatten(0, 1)

    def call() -> None:
        side.forward(query, key)
        side.backward(gradient)
        side.synchronize()
        torch_loop.wait()

    return call


def smashed_gradient(setting: Setting) -> np.ndarray:
    """A gradient [M, B, h, w, c], random since the time does not depend on its values."""
    model, _ = settings.build(setting)
    params: Any = jax.eval_shape(model.init, jax.random.key(0))[0]
    images = jax.ShapeDtypeStruct((setting.batch, setting.image_size, setting.image_size, 3), np.float32)
    shape = jax.eval_shape(model.client, params, images).shape
    return 1e-3 * np.random.default_rng(2).standard_normal((setting.clients, *shape), np.float32)


def results(repeats: int) -> Iterator[Result]:
    from benchmarks import agreement, torch_loop

    torch_loop.use_all_cores()
    agreement.check()
    for setting in SETTINGS:
        seconds = medians({"ours": ours(setting), "baseline": baseline(setting)}, repeats)
        yield result("clients", setting.case, seconds, clients_per_s=setting.clients / seconds["ours"])
