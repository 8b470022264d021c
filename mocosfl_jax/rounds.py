"""The compiled programs of a training run: a step, the steps of a round, synchronization.

Only here are the algorithm's step and sync jitted and their state donated.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mocosfl_jax.augment import Views
from mocosfl_jax.clients import SmashedData
from mocosfl_jax.mocosfl import Algorithm, SyncInfo, TrainState


class Curve(NamedTuple):
    """What is kept of each step: scalars, or S of them, as one array or as a list."""

    loss: Any  # Array [S], or S times Array []
    top1: Any


Sync = Callable[[TrainState, np.ndarray | None], tuple[TrainState, SyncInfo]]
RunSteps = Callable[[TrainState, np.ndarray, np.ndarray | None], tuple[TrainState, Curve]]
KeepingStep = Callable[[TrainState, np.ndarray, np.ndarray | None], tuple[TrainState, Curve, SmashedData]]
ReplayStep = Callable[[TrainState, SmashedData, np.ndarray | None], tuple[TrainState, Curve]]
Take = Callable[[Array, Array], Array]  # images [n, H, W, 3], indices [M, B] -> [M, B, H, W, 3]
MakeViews = Callable[[Array, Array], Views]  # rng, images [M, B, H, W, 3] uint8 -> Views


def scans_steps(backend: str) -> bool:
    """Whether the steps between two synchronizations run as one program.

    An accelerator saves the dispatch of each step. On a CPU a convolution inside a loop of the program
    is some twenty times slower than outside of it, so there the host dispatches every step.
    """
    return backend != "cpu"


def make_sync(algorithm: Algorithm) -> Sync:
    """Synchronization as a program: state, cohort [M] (None for the whole pool). The state is donated."""
    return jax.jit(algorithm.sync, donate_argnums=0)


def make_keeping_step(
    algorithm: Algorithm, make_views: MakeViews, rng: Array, images: Array, take: Take = operator.getitem
) -> KeepingStep:
    """A step that trains the server alone and returns the smashed data that the clients sent.

    Arguments as in `make_run_steps`; it draws the same views. Compiled when first called.

    Returns:
      state, indices [M, B] int32, cohort [M] int32 or None -> state, Curve, SmashedData. The state is
      donated.
    """

    def step(
        state: TrainState, images: Array, rng: Array, indices: Array, cohort: Array | None
    ) -> tuple[TrainState, Curve, SmashedData | None]:
        views = make_views(jax.random.fold_in(rng, state.step), take(images, indices))
        state, info = algorithm.step(state, views, cohort, send_gradients=False)
        return state, Curve(info.loss, info.top1), info.smashed

    run_step: Any = jax.jit(step, donate_argnums=0)
    return lambda state, indices, cohort: run_step(state, images, rng, indices, cohort)


def make_replay_step(algorithm: Algorithm) -> ReplayStep:
    """A step of the server on smashed data that it has kept. Compiled when first called.

    Returns:
      state, SmashedData, the cohort [M] that sent it or None -> state, Curve. The state is donated.
    """

    def step(state: TrainState, smashed: SmashedData, cohort: Array | None) -> tuple[TrainState, Curve]:
        assert algorithm.replay is not None
        state, info = algorithm.replay(state, smashed, cohort)
        return state, Curve(info.loss, info.top1)

    replay: Any = jax.jit(step, donate_argnums=0)
    return replay


def make_run_steps(
    algorithm: Algorithm,
    make_views: MakeViews,
    rng: Array,
    images: Array,
    *,
    state: TrainState,
    batch_shape: tuple[int, int],
    steps_per_round: int,
    whole_pool: bool,
    scan: bool,
    take: Take = operator.getitem,
) -> RunSteps:
    """Compile the function that runs some steps of training.

    A step gathers its images on the device, makes their views and trains. Its randomness comes from
    its number in the run, so a resumed run draws what an uninterrupted one draws. Nothing is fetched:
    the call returns while the device works.

    Args:
      algorithm: as `mocosfl` returns it.
      make_views: augmentation.
      rng: key of all augmentations of the run.
      images: [n, H, W, 3] uint8, the training set on the device.
      state: a state as the function will get, for its shapes.
      batch_shape: (M, B).
      steps_per_round: steps of most calls.
      whole_pool: every client takes part in every step.
      scan: one program for the steps of a whole round (see `scans_steps`); other numbers of steps, and
        all if this is false, run one by one.
      take: how a step gets its images; of `sharding.make_take` on several devices.

    Returns:
      state, indices [S, M, B] int32 into the images, cohort [M] int32 (None if `whole_pool`) -> new
      state and Curve of S steps. The state is donated.
    """

    def step(
        state: TrainState, images: Array, rng: Array, indices: Array, cohort: Array | None
    ) -> tuple[TrainState, Curve]:
        views = make_views(jax.random.fold_in(rng, state.step), take(images, indices))
        state, info = algorithm.step(state, views, cohort)
        return state, Curve(info.loss, info.top1)

    def round_(
        state: TrainState, images: Array, rng: Array, indices: Array, cohort: Array | None
    ) -> tuple[TrainState, Curve]:
        return jax.lax.scan(lambda s, batch: step(s, images, rng, batch, cohort), state, indices)

    run_step: Any = jax.jit(step, donate_argnums=0)
    run_round: Any = jax.jit(round_, donate_argnums=0)
    batch = np.zeros(batch_shape, np.int32)
    cohort = None if whole_pool else np.arange(batch_shape[0], dtype=np.int32)
    if scan:
        batches = np.zeros((steps_per_round, *batch_shape), np.int32)
        run_round = run_round.lower(state, images, rng, batches, cohort).compile()
    else:
        run_step = run_step.lower(state, images, rng, batch, cohort).compile()

    def run(state: TrainState, indices: np.ndarray, cohort: np.ndarray | None) -> tuple[TrainState, Curve]:
        if scan and len(indices) == steps_per_round:
            return run_round(state, images, rng, indices, cohort)
        curves = []
        for batch in indices:
            state, curve = run_step(state, images, rng, batch, cohort)
            curves.append(curve)
        return state, Curve([c.loss for c in curves], [c.top1 for c in curves])

    return run
