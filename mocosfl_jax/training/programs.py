"""The compiled programs of a run, and the images that feed the compiled step."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from mocosfl_jax.algorithm.interface import TrainState
from mocosfl_jax.data.images import in_memory
from mocosfl_jax.evaluation.features import Encode
from mocosfl_jax.feed import batches
from mocosfl_jax.feed.batches import Feed
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import rounds
from mocosfl_jax.training.experiment import Run


class Programs(NamedTuple):
    """The compiled programs of a run."""

    feed: Feed
    run_steps: rounds.RunSteps
    replaying: rounds.Replaying | None  # None: clients take part in every step
    turn: rounds.Turn
    encode: Encode


def compile_programs(run: Run, state: TrainState, rng_views: Array, encode: Encode) -> Programs:
    """Compile the training step, which takes the longest. The other programs compile when first used.

    Args:
      run: the run.
      state: the shapes, dtypes and placement of its state.
      rng_views: key of all augmentations of the run.
      encode: from `make_encode`.
    """
    turn = rounds.make_turn(run.algorithm, state, None if run.whole_pool else run.cohort)
    # Otherwise each call would copy the key to the devices. Several processes cannot use `device_put` here.
    rng_views = jax.jit(lambda rng: rng, out_shardings=meshes.everywhere(run.mesh))(rng_views)
    size = piece_steps(run)
    spread = meshes.make_spread(run.mesh, run.cohort, int(run.batch_sizes.max()))
    run_steps = rounds.make_run_steps(
        run.algorithm,
        run.make_views,
        rng_views,
        state=turn.state,
        images=piece(run, size),
        spread=spread,
        options=compiler.options(meshes.platform(run.mesh)),
    )
    replay = run.algorithm.replay if run.config.saving.loss_threshold else None
    replaying = rounds.make_replaying(replay, run.make_views, rng_views, spread) if replay else None
    return Programs(make_feed(run, size), run_steps, replaying, turn, encode)


def round_programs(run: Run) -> tuple[Any, Any]:
    """Return the jitted training of one step and of a whole piece, see `rounds.round_programs`."""
    spread = meshes.make_spread(run.mesh, run.cohort, int(run.batch_sizes.max()))
    return rounds.round_programs(run.algorithm, run.make_views, spread)


def piece_steps(run: Run) -> int:
    """Return the number of steps that one program trains."""
    if not run.forms.scan_rounds:
        return 1
    batch = (*places(run), *run.views.shape[1:])
    return batches.steps_per_piece(math.prod(batch), run.steps_per_round)


def piece(run: Run, steps: int) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding of the images of some steps."""
    shape = (steps, *places(run), *run.views.shape[1:])
    return jax.ShapeDtypeStruct(shape, np.uint8, sharding=meshes.of_images(run.mesh, run.cohort))


def places(run: Run) -> tuple[int, int]:
    """Return M and B of a step's images, padded so that the devices can share them."""
    return meshes.padded(run.mesh, run.cohort, int(run.batch_sizes.max()))


def make_feed(run: Run, piece_steps: int) -> Feed:
    """Return the feed of the run's images, resident on the device or streamed."""
    images = run.views
    place = meshes.of_images(run.mesh, run.cohort)

    def indices(epoch: int) -> np.ndarray:
        """Pad the cohort and the batch with image 0, which the step ignores."""
        dealt = run.indices(epoch)
        return np.pad(
            dealt, [(0, n - m) for n, m in zip((len(dealt), *places(run)), dealt.shape, strict=True)]
        )

    if run.residence.resident:
        return batches.resident(meshes.replicate(run.mesh, in_memory(images)), indices, piece_steps, place)
    return batches.streamed(
        images,
        indices,
        piece_steps,
        place,
        epochs=run.config.total_epochs,
        steps_per_epoch=run.steps_per_epoch,
        steps_per_round=run.steps_per_round,
    )
