"""The compiled programs of training: a cohort enters, takes the steps of a round, is synchronized and leaves.

They are jitted only here, and their state is donated.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mocosfl_jax.algorithm.interface import Algorithm, CohortState, Replay, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views

# Pieces queued on the device. Each holds its images, so the host must not run ahead without limit.
WAITING = 4


class Curve(NamedTuple):
    """Loss and contrastive accuracy of S consecutive steps, in pieces."""

    loss: list[Array]  # each [s]
    top1: list[Array]


RunSteps = Callable[[CohortState, Iterable[Array]], tuple[CohortState, Curve]]
Spread = Callable[[Array], Array]  # images [M, B, H, W, 3] -> the same, on several devices
MakeViews = Callable[[Array, Array], Views]  # rng, images [M, B, H, W, 3] uint8 -> Views


class Replaying(NamedTuple):
    """The steps that train the server alone. Their state is donated."""

    # state, images [M, B, H, W, 3] uint8 -> state, Curve, the smashed data that the clients have sent
    keep: Callable[[CohortState, Array], tuple[CohortState, Curve, SmashedData]]
    # state, SmashedData that its cohort has sent -> state, Curve
    train: Callable[[CohortState, SmashedData], tuple[CohortState, Curve]]


def joined(curves: Iterable[Curve]) -> Curve:
    """Concatenate the curves of consecutive steps."""
    each = list(curves)
    return Curve([x for curve in each for x in curve.loss], [x for curve in each for x in curve.top1])


class Turn(NamedTuple):
    """The programs at the start and the end of a cohort's turn, and at the end of each of its rounds."""

    enter: Callable[[TrainState, np.ndarray | None], CohortState]  # state, cohort [M] or None
    sync: Callable[[CohortState], tuple[CohortState, SyncInfo]]
    leave: Callable[[CohortState], TrainState]
    state: CohortState  # shapes, dtypes and placement of the state that has entered


def outputs(compiled: Any) -> Any:
    """Shapes, dtypes and placement of what a compiled program returns."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        compiled.out_info,
        compiled.output_shardings,
    )


def make_turn(algorithm: Algorithm, state: TrainState, cohort: int | None) -> Turn:
    """Compile the algorithm's `enter` and `leave`, and jit its `sync`.

    Args:
      algorithm: from `mocosfl` or `flmoco`.
      state: shapes, dtypes and placement of the states that the cohort enters.
      cohort: M; None: every client takes part in every step.
    """
    members = None if cohort is None else jax.ShapeDtypeStruct((cohort,), np.int32)
    enter, sync, leave = (
        jax.jit(f, donate_argnums=0) for f in (algorithm.enter, algorithm.sync, algorithm.leave)
    )
    with warnings.catch_warnings():
        # What all clients share has another shape in the cohort, so its memory is not reused.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        entering: Any = enter.lower(state, members).compile()
        leaving: Any = leave.lower(outputs(entering)).compile()
    return Turn(entering, sync, leaving, outputs(entering))


def make_replaying(replay: Replay, make_views: MakeViews, rng: Array, spread: Spread) -> Replaying:
    """Return the steps that train the server alone. Each is compiled when first called.

    Args:
      replay: of the algorithm.
      make_views: augmentation, as for `make_run_steps`. The views drawn are the same.
      rng: key of all augmentations of the run.
      spread: places a step's images on several devices.
    """

    def keep(state: CohortState, images: Array, rng: Array) -> tuple[CohortState, Curve, SmashedData | None]:
        views = make_views(jax.random.fold_in(rng, state.step), spread(images))
        state, info = replay.keep(state, views)
        return state, Curve([info.loss[None]], [info.top1[None]]), info.smashed

    def train(state: CohortState, smashed: SmashedData) -> tuple[CohortState, Curve]:
        state, info = replay.train(state, smashed)
        return state, Curve([info.loss[None]], [info.top1[None]])

    keeping: Any = jax.jit(keep, donate_argnums=0)
    return Replaying(lambda state, images: keeping(state, images, rng), jax.jit(train, donate_argnums=0))


def round_programs(algorithm: Algorithm, make_views: MakeViews, spread: Spread) -> tuple[Any, Any]:
    """Jit the training of one step, and of the steps of a whole piece as one program.

    The arguments are those of `make_run_steps`. A step makes the views of its images and trains. Its random
    numbers depend on its number in the run, so a resumed run draws the same ones as an uninterrupted run.

    Returns:
      Two functions (state, images [s, M, B, H, W, 3] uint8, rng) -> state, Curve: the first for s = 1, the
      second for any s. The state is donated.
    """

    def step(state: CohortState, images: Array, rng: Array) -> tuple[CohortState, Curve]:
        views = make_views(jax.random.fold_in(rng, state.step), spread(images))
        state, info = algorithm.step(state, views)
        return state, Curve([info.loss], [info.top1])

    def one(state: CohortState, images: Array, rng: Array) -> tuple[CohortState, Curve]:
        state, curve = step(state, images[0], rng)
        return state, jax.tree.map(lambda x: x[None], curve)

    def several(state: CohortState, images: Array, rng: Array) -> tuple[CohortState, Curve]:
        return jax.lax.scan(lambda state, images: step(state, images, rng), state, images)

    return jax.jit(one, donate_argnums=0), jax.jit(several, donate_argnums=0)


def make_run_steps(
    algorithm: Algorithm,
    make_views: MakeViews,
    rng: Array,
    *,
    state: CohortState,
    images: jax.ShapeDtypeStruct,
    spread: Spread,
    options: Mapping[str, str | bool] = {},
) -> RunSteps:
    """Compile the function that runs some steps of training.

    Nothing is fetched: the call returns while the device works on the last `WAITING` pieces.

    Args:
      algorithm: from `mocosfl` or `flmoco`.
      make_views: augmentation.
      rng: key of all augmentations of the run.
      state: with the shapes and the placement of those that the function will receive.
      images: [s, M, B, H, W, 3] uint8, shape and sharding of most pieces. If s > 1, the steps of a piece run
        as one program (see `Forms.scan_rounds`).
      spread: places a step's images on several devices, from `parallel.mesh.make_spread`.
      options: of the compiler.

    Returns:
      A function (state, pieces of images) -> state, Curve. Each piece has s steps or one. The state is
      donated.
    """
    piece_steps = images.shape[0]

    run_one, run_several = round_programs(algorithm, make_views, spread)
    if piece_steps > 1:
        run_several = run_several.lower(state, images, rng).compile(compiler_options=dict(options))
    else:
        run_one = run_one.lower(state, images, rng).compile(compiler_options=dict(options))

    def run(state: CohortState, pieces: Iterable[Array]) -> tuple[CohortState, Curve]:
        curves: list[Curve] = []
        for piece in pieces:
            program = run_several if len(piece) == piece_steps > 1 else run_one
            state, curve = program(state, piece, rng)
            curves.append(curve)
            if len(curves) > WAITING:
                jax.block_until_ready(curves[-WAITING - 1])
        return state, joined(curves)

    return run
