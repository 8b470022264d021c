"""The compiled programs of training: a step, the steps of a round, synchronization.

The algorithm's step and sync are jitted only here, and their state is donated.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mocosfl_jax.algorithm.interface import Algorithm, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views

# Pieces queued on the device. Each holds its images, so the host must not run ahead without limit.
WAITING = 4


class Curve(NamedTuple):
    """Loss and contrastive accuracy of S consecutive steps, in pieces."""

    loss: list[Array]  # each [s]
    top1: list[Array]


SyncProgram = Callable[[TrainState, np.ndarray | None], tuple[TrainState, SyncInfo]]
RunSteps = Callable[[TrainState, Iterable[Array], np.ndarray | None], tuple[TrainState, Curve]]
KeepingStep = Callable[[TrainState, Array, np.ndarray | None], tuple[TrainState, Curve, SmashedData]]
ReplayStep = Callable[[TrainState, SmashedData, np.ndarray | None], tuple[TrainState, Curve]]
Spread = Callable[[Array], Array]  # images [M, B, H, W, 3] -> the same, on several devices
MakeViews = Callable[[Array, Array], Views]  # rng, images [M, B, H, W, 3] uint8 -> Views


def joined(curves: Iterable[Curve]) -> Curve:
    """Concatenate the curves of consecutive steps."""
    each = list(curves)
    return Curve([x for curve in each for x in curve.loss], [x for curve in each for x in curve.top1])


def _identity(images: Array) -> Array:
    return images


def make_sync(algorithm: Algorithm) -> SyncProgram:
    """Jit the synchronization: state, cohort [M] or None -> state, SyncInfo. The state is donated."""
    return jax.jit(algorithm.sync, donate_argnums=0)


def make_keeping_step(
    algorithm: Algorithm, make_views: MakeViews, rng: Array, spread: Spread = _identity
) -> KeepingStep:
    """Return a step that trains the server alone and returns the smashed data that the clients sent.

    The arguments are those of `make_run_steps`, and the views drawn are the same. Compiled when first called.

    Returns:
      A function (state, images [M, B, H, W, 3] uint8, cohort [M] int32 or None) -> state, Curve, SmashedData.
      The state is donated.
    """

    def step(
        state: TrainState, images: Array, rng: Array, cohort: Array | None
    ) -> tuple[TrainState, Curve, SmashedData | None]:
        views = make_views(jax.random.fold_in(rng, state.step), spread(images))
        state, info = algorithm.step(state, views, cohort, send_gradients=False)
        return state, Curve([info.loss[None]], [info.top1[None]]), info.smashed

    run_step: Any = jax.jit(step, donate_argnums=0)
    return lambda state, images, cohort: run_step(state, images, rng, cohort)


def make_replay_step(algorithm: Algorithm) -> ReplayStep:
    """Return a step of the server on smashed data that it has kept. Compiled when first called.

    Returns:
      A function (state, SmashedData, the cohort [M] that sent it or None) -> state, Curve. The state is
      donated.
    """

    def step(state: TrainState, smashed: SmashedData, cohort: Array | None) -> tuple[TrainState, Curve]:
        assert algorithm.replay is not None
        state, info = algorithm.replay(state, smashed, cohort)
        return state, Curve([info.loss[None]], [info.top1[None]])

    replay: Any = jax.jit(step, donate_argnums=0)
    return replay


def make_run_steps(
    algorithm: Algorithm,
    make_views: MakeViews,
    rng: Array,
    *,
    state: TrainState,
    images: jax.ShapeDtypeStruct,
    cohort: int | None,
    spread: Spread = _identity,
) -> RunSteps:
    """Compile the function that runs some steps of training.

    A step makes the views of its images and trains. Its random numbers depend on its number in the run, so a
    resumed run draws the same ones as an uninterrupted run. Nothing is fetched: the call returns while the
    device works on the last `WAITING` pieces.

    Args:
      algorithm: from `mocosfl` or `flmoco`.
      make_views: augmentation.
      rng: key of all augmentations of the run.
      state: a state with the shapes and the placement of those that the function will receive.
      images: [s, M, B, H, W, 3] uint8, shape and sharding of most pieces. If s > 1, the steps of a piece run
        as one program (see `Forms.scan_rounds`).
      cohort: M, which may be less than in `images`; None: every client takes part in every step.
      spread: places a step's images on several devices, from `parallel.mesh.make_spread`.

    Returns:
      A function (state, pieces of images, cohort [M] int32 or None) -> state, Curve. Each piece has s steps
      or one. The state is donated.
    """
    piece_steps = images.shape[0]

    def step(state: TrainState, images: Array, rng: Array, cohort: Array | None) -> tuple[TrainState, Curve]:
        views = make_views(jax.random.fold_in(rng, state.step), spread(images))
        state, info = algorithm.step(state, views, cohort)
        return state, Curve([info.loss], [info.top1])

    def one(state: TrainState, images: Array, rng: Array, cohort: Array | None) -> tuple[TrainState, Curve]:
        state, curve = step(state, images[0], rng, cohort)
        return state, jax.tree.map(lambda x: x[None], curve)

    def several(
        state: TrainState, images: Array, rng: Array, cohort: Array | None
    ) -> tuple[TrainState, Curve]:
        return jax.lax.scan(lambda s, batch: step(s, batch, rng, cohort), state, images)

    run_one: Any = jax.jit(one, donate_argnums=0)
    run_several: Any = jax.jit(several, donate_argnums=0)
    members = None if cohort is None else np.arange(cohort, dtype=np.int32)
    if piece_steps > 1:
        run_several = run_several.lower(state, images, rng, members).compile()
    else:
        run_one = run_one.lower(state, images, rng, members).compile()

    def run(
        state: TrainState, pieces: Iterable[Array], cohort: np.ndarray | None
    ) -> tuple[TrainState, Curve]:
        curves: list[Curve] = []
        for piece in pieces:
            program = run_several if len(piece) == piece_steps > 1 else run_one
            state, curve = program(state, piece, rng, cohort)
            curves.append(curve)
            if len(curves) > WAITING:
                jax.block_until_ready(curves[-WAITING - 1])
        return state, joined(curves)

    return run
