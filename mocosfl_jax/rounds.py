"""The compiled programs of a training run: a step, several steps, synchronization.

Only here is the algorithm's step jitted and its state donated.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mocosfl_jax.augment import Views
from mocosfl_jax.mocosfl import Algorithm, TrainState


class Curve(NamedTuple):
    """What is kept of each step: scalars, or S of them, as one array or as a list."""

    loss: Array | list[Array]
    top1: Array | list[Array]


RunSteps = Callable[[TrainState, np.ndarray, np.ndarray | None], tuple[TrainState, Curve]]
MakeViews = Callable[[Array, Array], Views]  # rng, images [M, B, H, W, 3] uint8 -> Views


def scans_steps(backend: str) -> bool:
    """Whether the steps between two synchronizations run as one program.

    An accelerator saves the dispatch of each step. On a CPU a convolution inside a loop of the program
    is some twenty times slower than outside of it, so there the host dispatches every step.
    """
    return backend != "cpu"


def make_run_steps(
    algorithm: Algorithm,
    make_views: MakeViews,
    rng: Array,
    images: Array,
    *,
    state: TrainState,
    batch_shape: tuple[int, int],
    max_steps: int,
    whole_pool: bool,
    scan: bool,
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
      max_steps: the most steps of a call. Any number up to it runs the same compiled program.
      whole_pool: every client takes part in every step.
      scan: one program for all steps of a call (see `scans_steps`), or one for each.

    Returns:
      state, indices [S, M, B] int32 into the images, cohort [M] int32 (None if `whole_pool`) -> new
      state and Curve of S steps. The state is donated.
    """

    def step(
        state: TrainState, images: Array, indices: Array, cohort: Array | None
    ) -> tuple[TrainState, Curve]:
        views = make_views(jax.random.fold_in(rng, state.step), images[indices])
        state, info = algorithm.step(state, views, cohort)
        return state, Curve(info.loss, info.top1)

    def steps(
        state: TrainState, images: Array, indices: Array, count: Array, cohort: Array | None
    ) -> tuple[TrainState, Curve]:
        _, shapes = jax.eval_shape(step, state, images, indices[0], cohort)
        idle = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def body(state: TrainState, item: tuple[Array, Array]) -> tuple[TrainState, Curve]:
            i, batch = item
            return jax.lax.cond(
                i < count, lambda s: step(s, images, batch, cohort), lambda s: (s, idle), state
            )

        return jax.lax.scan(body, state, (jnp.arange(max_steps), indices))

    batch = np.zeros(batch_shape, np.int32)
    clients = None if whole_pool else np.arange(batch_shape[0], dtype=np.int32)
    if scan:
        batches = np.zeros((max_steps, *batch_shape), np.int32)
        all_steps = jax.jit(steps, donate_argnums=0).lower(state, images, batches, np.int32(0), clients)
        run_all = all_steps.compile()
    else:
        one_step = jax.jit(step, donate_argnums=0).lower(state, images, batch, clients)
        run_one = one_step.compile()

    def run_together(
        state: TrainState, indices: np.ndarray, cohort: np.ndarray | None
    ) -> tuple[TrainState, Curve]:
        count = len(indices)
        padding = np.zeros((max_steps - count, *batch_shape), np.int32)
        state, curve = run_all(state, images, np.concatenate([indices, padding]), np.int32(count), cohort)
        return state, jax.tree.map(lambda x: x[:count], curve)

    def run_each(
        state: TrainState, indices: np.ndarray, cohort: np.ndarray | None
    ) -> tuple[TrainState, Curve]:
        curves = []
        for batch in indices:
            state, curve = run_one(state, images, batch, cohort)
            curves.append(curve)
        return state, Curve([c.loss for c in curves], [c.top1 for c in curves])

    return run_together if scan else run_each
