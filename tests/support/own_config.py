"""A network and an algorithm that are not of the package, in a config file as a user would write it.

The algorithm counts the steps of each client in the pool, and trains the whole network on the server by
InfoNCE within the batch. Its states hold nothing of MocoSFL's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mocosfl_jax import Algorithm, CohortState, Features, SplitModel, StepInfo, SyncInfo, TrainState, Views
from mocosfl_jax.algorithm.interface import EVERYWHERE, SERVER, Models, of_clients
from mocosfl_jax.config import Clients, Config, Data, Eval, Moco, Own

N, M, B = 6, 4, 2
KEY_DIM = 8


def network(config: Any, image_size: int, forms: Any) -> SplitModel:
    def init(rng: Array) -> tuple[Any, Any]:
        rng_client, rng_server = jax.random.split(rng)
        client = 0.5 * jax.random.normal(rng_client, (3, 5))
        return {"mix": client}, {"dense": 0.3 * jax.random.normal(rng_server, (5, KEY_DIM))}

    def backbone(params: Any, smashed: Array) -> Array:
        return jnp.mean(smashed, axis=(-3, -2))

    return SplitModel(
        init,
        client=lambda params, images: jnp.tanh(images @ params["mix"]),
        backbone=backbone,
        head=lambda params, features: features @ params["dense"],
        key_dim=KEY_DIM,
    )


def algorithm(config: Any, model: SplitModel, arguments: dict[str, Any]) -> Algorithm:
    num_clients = arguments["num_clients"]

    def init(rng: Array, models: Models | None = None) -> TrainState:
        params = models.online if models else model.init(rng)
        return TrainState(jnp.zeros((), jnp.int32), {"steps": jnp.zeros(num_clients, jnp.int32)}, params)

    def enter(state: TrainState, cohort: Any = None) -> CohortState:
        steps = state.pool["steps"]
        members = steps if cohort is None else steps[cohort]
        return CohortState(state.step, members, state.server, cohort, state.pool)

    def project(params: Any, images: Array) -> Array:
        backbone = model.backbone(params[1], model.client(params[0], images))
        rows = model.head(params[1], backbone)
        return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)

    def step(state: CohortState, views: Views) -> tuple[CohortState, StepInfo]:
        def loss(params: Any) -> tuple[Array, Array]:
            query, key = (project(params, view.reshape(-1, *view.shape[2:])) for view in views)
            logits = query @ key.T / 0.5
            correct = jnp.arange(len(query))
            top1 = jnp.mean(jnp.argmax(logits, axis=1) == correct)
            return -jnp.mean(jax.nn.log_softmax(logits)[correct, correct]), top1

        (value, top1), grads = jax.value_and_grad(loss, has_aux=True)(state.server)
        server = jax.tree.map(lambda p, g: p - 0.1 * g, state.server, grads)
        state = state._replace(step=state.step + 1, clients=state.clients + 1, server=server)
        return state, StepInfo(value, top1, smashed=None, smashed_grad=None)

    def leave(state: CohortState) -> TrainState:
        steps = state.clients
        if state.cohort is not None:
            steps = state.pool["steps"].at[state.cohort].set(steps)
        return TrainState(state.step, {"steps": steps}, state.server)

    def encode(state: TrainState, images: Array) -> Features:
        backbone = model.backbone(state.server[1], model.client(state.server[0], images))
        return Features(backbone, model.head(state.server[1], backbone))

    def homes(state: Any) -> Any:
        if isinstance(state, TrainState):
            return TrainState(EVERYWHERE, of_clients(num_clients), SERVER)
        members = num_clients if state.cohort is None else len(state.cohort)
        return CohortState(EVERYWHERE, of_clients(members), SERVER, EVERYWHERE, of_clients(num_clients))

    return Algorithm(
        init=init,
        enter=enter,
        step=step,
        sync=lambda state: (state, SyncInfo(jnp.zeros(()))),
        leave=leave,
        encode=encode,
        models=lambda state: Models(state.server, state.server),
        homes=homes,
    )


def get_config(images: str) -> Config:
    return Config(
        epochs=2,
        data=Data(name="npz", dir=images),
        clients=Clients(num=N, cohort=M, batch_size=B, noniid_ratio=1.0),
        moco=Moco(key_dim=KEY_DIM, queue_size=0),
        eval=Eval(every=1, knn_k=3, probe_epochs=2),
        own=Own(network=network, algorithm=algorithm),
    )
