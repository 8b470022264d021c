"""What a client computes: agreed upon by both sides before any work.

The server exports the client's half of a step as two programs (`jax.export`). A client needs no code of the
network, and runs the same program on a CPU, a GPU or a TPU.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mocosfl_jax.algorithm import clients
from mocosfl_jax.algorithm.clients import ClientState
from mocosfl_jax.algorithm.interface import TrainState
from mocosfl_jax.algorithm.messages import Views
from mocosfl_jax.errors import UserError, one_line
from mocosfl_jax.models.forms import ACCELERATOR
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training.build import build_model, client_optimizer, network_record
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.wire import messages
from mocosfl_jax.wire.codec import Format

PLATFORMS = ("cpu", "cuda", "tpu")
_COMPILING = threading.Lock()

Shapes = list[tuple[tuple[int, ...], str]]  # shape and dtype of each array of a tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What both sides have to know besides the programs. JSON on the wire."""

    protocol: int
    network: dict[str, Any]  # arguments of `split_model`, with the cut layer
    image_size: int  # pixels a side
    normalisation: dict[str, list[float]]  # mean and std of each channel, for images in [0, 1]
    augmentation: dict[str, Any]  # version and min_crop_scale
    rng: list[int]  # key data of all augmentations of the run
    num_clients: int  # N
    cohort: int  # M
    batch_size: int  # B
    steps_per_epoch: int  # S
    epochs: int
    seed: int  # of the order in which a client takes its images
    params: Shapes  # of each array of a client's online model
    opt_state: Shapes
    smashed_shape: tuple[int, ...]  # of the smashed data of one kind of view in a step
    smashed_dtype: str
    sent_as: str  # the dtype of smashed data and gradients on the wire
    frozen: bool  # clients are not trained, and receive no gradients
    x64: bool  # whether float64 is enabled
    versions: dict[str, str]

    @property
    def smashed(self) -> Format:
        """How the smashed data of one kind of view are sent, and their gradient."""
        return Format(tuple(self.smashed_shape), self.smashed_dtype, self.sent_as)

    def shapes(self, part: str) -> Shapes:
        """Shapes and dtypes of a part of a client's state."""
        return self.opt_state if part == "opt_state" else self.params


class Contract(NamedTuple):
    """The terms and the programs of a client, serialised."""

    terms: str
    forward: bytes
    backward: bytes  # empty if the clients are frozen

    @property
    def digest(self) -> bytes:
        """SHA-256 of terms and programs."""
        return hashlib.sha256(
            b"".join(hashlib.sha256(part).digest() for part in (self.terms.encode(), *self[1:]))
        ).digest()


class Programs(NamedTuple):
    """The client's half of a step, compiled. Trees are lists of their arrays."""

    # params, key_params, images [B, H, W, 3] uint8, key data of the run's views, step, place in the cohort
    # -> key_params, smashed queries, smashed keys, query views
    forward: Callable[..., Any]
    # params, opt_state, query views, gradient of the smashed queries, step -> params, opt_state
    backward: Callable[..., Any] | None  # None: the clients are frozen


def make_contract(run: Run, state: TrainState, rng_views: Array) -> tuple[Contract, Terms]:
    """Export the client's half of a step.

    Args:
      run: whose steps per epoch are final.
      state: the shapes and dtypes of its state.
      rng_views: key of all augmentations of the run.
    """
    config = run.config
    model = build_model(config, run.dataset.x_train.shape[1], ACCELERATOR)
    cohort_model = jax.vmap(model.client)
    optimizer = client_optimizer(config, run.steps_per_epoch)
    batch_size = int(run.batch_sizes[0])
    params, _ = jax.eval_shape(run.algorithm.models, state).online
    opt_state = jax.eval_shape(lambda params: () if optimizer is None else optimizer.init(params), params)
    key_data = np.asarray(jax.random.key_data(rng_views))
    of_params, of_opt_state = jax.tree.structure(params), jax.tree.structure(opt_state)

    def alone(tree: Any) -> Any:
        """A cohort of one client."""
        return jax.tree.map(lambda leaf: leaf[None], tree)

    def leaves(tree: Any) -> list[Array]:
        """Of the only client."""
        return [leaf[0] for leaf in jax.tree.leaves(tree)]

    def member(params: Any, key_params: Any = None, opt_state: Any = None) -> ClientState:
        return ClientState(alone(params), alone(key_params), alone(opt_state), scales=None, queue=None)

    def forward(
        params: list, key_params: list, images: Array, rng: Array, step: Array, place: Array
    ) -> tuple[list, Array, Array, Array]:
        rng_step = jax.random.fold_in(jax.random.wrap_key_data(rng), step)
        # The views that the simulation would draw for this place.
        rngs = jax.random.split(rng_step, (2, run.cohort, batch_size))[:, place][:, None]
        views = run.make_views(rngs, images[None])
        if config.moco.full_symmetric:
            views = Views(*(jnp.concatenate(both, axis=1) for both in (views, views[::-1])))
        state = member(jax.tree.unflatten(of_params, params), jax.tree.unflatten(of_params, key_params))
        state, smashed, _ = clients.forward(cohort_model, state, views, config.moco.momentum)
        return leaves(state.key_params), smashed.query[0], smashed.key[0], views.query[0]

    def backward(
        params: list, opt_state: list, query: Array, gradient: Array, step: Array
    ) -> tuple[list, list]:
        state = member(
            jax.tree.unflatten(of_params, params), opt_state=jax.tree.unflatten(of_opt_state, opt_state)
        )
        _, pullback = jax.vjp(lambda params: cohort_model(params, query[None]), state.params)
        assert optimizer is not None
        state = clients.backward(state, lambda grad: pullback(grad)[0], gradient[None], optimizer, step)
        return leaves(state.params), leaves(state.opt_state)

    images = jax.ShapeDtypeStruct((batch_size, *run.views.shape[1:]), np.uint8)
    rng = jax.ShapeDtypeStruct(key_data.shape, key_data.dtype)
    number = jax.ShapeDtypeStruct((), np.int32)
    some_params, some_opt_state = jax.tree.leaves(params), jax.tree.leaves(opt_state)
    forwards = _export(forward, some_params, some_params, images, rng, number, number)
    _, smashed, _, query = jax.eval_shape(forward, some_params, some_params, images, rng, number, number)
    backwards = b""
    if optimizer is not None:
        backwards = _export(backward, some_params, some_opt_state, query, smashed, number)
    dtype = str(smashed.dtype)
    terms = Terms(
        protocol=messages.PROTOCOL,
        network=network_record(config, run.dataset.x_train.shape[1]),
        image_size=run.dataset.x_train.shape[1],
        normalisation={"mean": list(run.dataset.mean), "std": list(run.dataset.std)},
        augmentation={
            "version": config.moco.augmentation,
            "min_crop_scale": config.moco.min_crop_scale,
        },
        rng=key_data.tolist(),
        num_clients=config.clients.num,
        cohort=run.cohort,
        batch_size=batch_size,
        steps_per_epoch=run.steps_per_epoch,
        epochs=config.total_epochs,
        seed=config.seed,
        params=_shapes(params),
        opt_state=_shapes(opt_state),
        smashed_shape=smashed.shape,
        smashed_dtype=dtype,
        sent_as=dtype if config.wire.dtype == "exact" else config.wire.dtype,
        frozen=optimizer is None,
        x64=bool(jax.config.values["jax_enable_x64"]),
        versions=_versions(),
    )
    return Contract(json.dumps(dataclasses.asdict(terms), sort_keys=True), forwards, backwards), terms


def read_contract(message: Any, platform: str) -> tuple[Contract, Terms, Programs]:
    """Check the contract that a server has sent.

    Args:
      message: a `Contract` of schema.proto.
      platform: on which the programs will run, as in `jax.Device.platform`.

    Raises:
      UserError: if it is damaged, of another version, or needs what this process lacks.
    """
    contract = Contract(message.terms, message.forward, message.backward)
    if contract.digest != message.digest:
        raise UserError("contract: found another digest than the server's, allowed: the same")
    try:
        terms = Terms(**json.loads(contract.terms))
    except (TypeError, ValueError) as error:
        raise UserError(f"contract: found terms of another version ({one_line(error)})") from error
    if terms.x64 != jax.config.values["jax_enable_x64"]:
        raise UserError(f"JAX_ENABLE_X64: found {not terms.x64}, allowed: {terms.x64}, as at the server")
    with _COMPILING:  # clients that are threads of one process compile once for all of them
        programs = [_load(name, getattr(contract, name), platform) for name in ("forward", "backward")]
    if programs[0] is None:
        raise UserError("contract: found no forward program, allowed: one")
    return contract, terms, Programs(programs[0], programs[1])


def _export(function: Callable[..., Any], *arguments: Any) -> bytes:
    return bytes(jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments).serialize())


@lru_cache(4)  # a client that comes back does not compile again
def _load(name: str, data: bytes, platform: str) -> Callable[..., Any] | None:
    if not data:
        return None
    try:
        exported = jax.export.deserialize(bytearray(data))
    except Exception as error:  # a file of flatbuffers and MLIR fails in many ways
        raise UserError(
            f"contract: found a program that jax {jax.__version__} cannot read ({one_line(error)})"
        ) from error
    # A custom call runs code of this machine on whatever the server chooses. The list of disabled checks is
    # the server's own account, so the program is searched too.
    if exported.disabled_safety_checks or "custom_call" in exported.mlir_module():
        raise UserError("contract: found a program with custom calls, allowed: one without")
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in exported.in_avals]
    arguments, _ = jax.tree.unflatten(exported.in_tree, shapes)
    # As the simulation's programs are compiled, so that both round alike; now, before a deadline runs.
    try:
        return jax.jit(exported.call).lower(*arguments).compile(compiler_options=compiler.options(platform))
    except Exception as error:  # such as for another platform, or too large for this one
        raise UserError(f"contract: found a program that cannot be compiled ({one_line(error)})") from error


def _shapes(tree: Any) -> Shapes:
    return [(tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "mocosfl-jax")}
