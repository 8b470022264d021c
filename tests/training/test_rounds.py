"""The compiled step is traced once, transfers nothing to the host, and is the same in a loop and a scan."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from mocosfl_jax import CohortState, Forms, MomentumContrast, SplitModel, StepInfo, Views, mocosfl, one_device
from mocosfl_jax.config import Clients, Config, Data, Moco, Synchronization
from mocosfl_jax.evaluation.features import make_encode
from mocosfl_jax.feed import batches
from mocosfl_jax.models.forms import CPU, GPU
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.training import rounds
from mocosfl_jax.training.programs import compile_programs
from tests.support.small_run import write_images
from tests.support.toy import IMAGE, make_toy_model
from tests.support.training import prepare

N, M, B, R = 4, 2, 3, 4
RunSteps = Callable[[CohortState, np.ndarray], tuple[CohortState, rounds.Curve]]

PLACE = SingleDeviceSharding(jax.devices()[0])


def make_views(rng: jax.Array, images: jax.Array) -> Views:
    noise = jax.random.normal(rng, (2, *images.shape))
    return Views(*(images[None].astype(noise.dtype) / 255 + 0.1 * noise))


def build(
    model: SplitModel,
    *,
    scan: bool,
    whole_pool: bool,
    traces: list[int] | None = None,
    forms: Forms = CPU,
) -> tuple[RunSteps, CohortState]:
    moco = MomentumContrast(queue_size=24, temperature=1.0)
    algorithm = mocosfl(model, num_clients=N, moco=moco, placement=one_device(forms))

    def counted(state: CohortState, views: Views) -> tuple[CohortState, StepInfo]:
        if traces is not None:
            traces.append(1)
        return algorithm.step(state, views)

    images = np.random.default_rng(1).integers(0, 256, (40, *IMAGE), np.uint8)
    size = R if scan else 1
    cohort = None if whole_pool else jnp.array([0, 3])
    state = jax.jit(lambda rng: algorithm.enter(algorithm.init(rng), cohort))(jax.random.key(0))
    run = rounds.make_run_steps(
        algorithm._replace(step=counted),
        make_views,
        jax.random.key(2),
        state=state,
        images=jax.ShapeDtypeStruct((size, N if whole_pool else M, B, *IMAGE), jnp.uint8),
        spread=lambda images: images,
    )

    def run_steps(state: CohortState, indices: np.ndarray) -> tuple[CohortState, rounds.Curve]:
        feed = batches.resident(jax.device_put(images), lambda epoch: indices, size, PLACE)
        return run(state, feed(0, range(len(indices))))

    return run_steps, state


def indices(seed: int, steps: int, clients: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40, (steps, clients, B)).astype(np.int32)


@pytest.mark.parametrize("scan", [True, False])
def test_a_program_is_traced_once_for_all_calls(toy_model: SplitModel, scan: bool) -> None:
    traces: list[int] = []
    run, state = build(toy_model, scan=scan, whole_pool=False, traces=traces)
    assert len(traces) == 1
    for round_, steps in enumerate((R, R, 1, 3, R)):
        state = state._replace(cohort=jnp.sort(jax.random.choice(jax.random.key(round_), N, (M,), False)))
        state, curve = run(state, indices(round_, steps, M))
        assert sum(map(len, curve.loss)) == sum(map(len, curve.top1)) == steps
    assert int(state.step) == 3 * R + 4
    assert len(traces) == (2 if scan else 1)  # where rounds are scanned, shorter ones run step by step


@pytest.mark.parametrize("whole_pool", [True, False])
def test_scan_equals_loop(toy_model: SplitModel, whole_pool: bool, forms: Forms, x64: None) -> None:
    ends = []
    for scan in (True, False):
        run, state = build(toy_model, scan=scan, whole_pool=whole_pool, forms=forms)
        assert all(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(state))
        clients = N if whole_pool else M
        losses: list[float] = []
        for round_, steps in enumerate((R, 3)):
            state, curve = run(state, indices(round_, steps, clients))
            losses += np.concatenate(jax.device_get(curve.loss)).tolist()
        ends.append((losses, jax.device_get(state)))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-9)
    for a, b in zip(*(jax.tree.leaves(end[1]) for end in ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_nothing_is_fetched(toy_model: SplitModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = build(toy_model, scan=False, whole_pool=True)
    batches = indices(0, 3, N)

    def fetched(*args: Any) -> None:
        raise AssertionError("an array was fetched to the host")

    with monkeypatch.context() as patch:
        for name in ("__array__", "__float__", "__int__", "__bool__", "item", "tolist", "block_until_ready"):
            patch.setattr(type(state.step), name, fetched)
        patch.setattr(jax, "device_get", fetched)
        state, curve = run(state, batches)
        with pytest.raises(AssertionError, match="fetched"):
            float(curve.loss[0][0])
    assert all(np.isfinite(float(loss[0])) for loss in curve.loss)


def test_the_state_is_donated(toy_model: SplitModel) -> None:
    run, state = build(toy_model, scan=False, whole_pool=True)
    new, _ = run(state, indices(0, 1, N))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_each_step_draws_views_by_its_number(toy_model: SplitModel) -> None:
    """Two calls of one step equal one call of two: results do not depend on where a run was interrupted."""
    batches = indices(0, 2, N)
    run, state = build(toy_model, scan=False, whole_pool=True)
    together, _ = run(state, batches)
    run, state = build(toy_model, scan=False, whole_pool=True)
    for batch in batches:
        state, _ = run(state, batch[None])
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("forms", [CPU, GPU], ids=["steps", "scanned"])
def test_steps_and_synchronization_move_nothing(forms: Forms, tmp_path: pathlib.Path) -> None:
    """Neither to or from the host nor between devices, once the images are there."""
    config = Config(
        data=Data(name="npz", dir=write_images(tmp_path / "images.npz", IMAGE)),
        clients=Clients(num=4, batch_size=2, noniid_ratio=0.5),
        moco=Moco(key_dim=8, queue_size=32),
        sync=Synchronization(frequency=2),
    )
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:2])
    run = prepare(config, mesh, forms, model=make_toy_model())
    rng_init, rng_views = jax.random.split(jax.random.key(0))
    state = jax.jit(run.algorithm.init)(rng_init)
    encode = make_encode(run.algorithm, run.dataset.mean, run.dataset.std)
    programs = compile_programs(run, state, rng_views, encode)
    at_work = programs.turn.enter(state, None)
    for first in range(0, 2 * run.steps_per_round, run.steps_per_round):
        pieces = jax.block_until_ready(list(programs.feed(0, range(first, first + run.steps_per_round))))
        with jax.transfer_guard("disallow"):
            at_work, curve = programs.run_steps(at_work, pieces)
            at_work, _ = programs.turn.sync(at_work)
    assert all(np.isfinite(loss).all() for loss in curve.loss)
