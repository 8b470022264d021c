"""SGD against PyTorch's definition written out, and schedules against known values."""

import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.algorithm import optim


def test_sgd_equals_the_definition(x64: None) -> None:
    rng = np.random.default_rng(0)
    p, m, rate = rng.normal(size=5), np.zeros(5), 0.06
    params = {"p": jnp.asarray(p)}
    optimizer = optim.sgd(rate, momentum=0.9, weight_decay=5e-4)
    state = optimizer.init(params)
    for _ in range(5):
        g = rng.normal(size=5)
        params, state = optim.descend(optimizer, {"p": jnp.asarray(g)}, state, params, 0)
        m = 0.9 * m + g + 5e-4 * p
        p = p - rate * m
        np.testing.assert_allclose(params["p"], p, rtol=1e-13)


def rates(name: str, decay: float = 0.1) -> list[float]:
    schedule = optim.schedule(name, 0.5, epochs=10, steps_per_epoch=3, decay=decay)
    return [float(schedule(jnp.int32(step))) for step in range(30)]


def test_cosine_changes_by_epoch_and_ends_near_zero() -> None:
    # PyTorch's CosineAnnealingLR from 0.5 to zero over 10 epochs.
    epochs = [0.5, 0.487764, 0.452254, 0.396946, 0.327254, 0.25, 0.172746, 0.103054, 0.0477458, 0.0122359]
    np.testing.assert_allclose(rates("cosine"), np.repeat(epochs, 3), rtol=1e-5)


@pytest.mark.parametrize("decay", [0.1, 0.2])
def test_multistep_drops_at_60_and_80_percent(decay: float) -> None:
    got = rates("multistep", decay)
    np.testing.assert_allclose(got, [0.5] * 18 + [0.5 * decay] * 6 + [0.5 * decay**2] * 6, rtol=1e-6)


def test_milestones_are_rounded_down() -> None:
    schedule = optim.schedule("multistep", 1.0, epochs=13, steps_per_epoch=1)
    assert schedule(0) == 1.0  # a whole number, as an array
    got = [float(schedule(jnp.int32(epoch))) for epoch in range(13)]
    np.testing.assert_allclose(got, [1] * 7 + [0.1] * 3 + [0.01] * 3, rtol=1e-6)


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="found 'linear', allowed: cosine, multistep, constant"):
        optim.schedule("linear", 1.0, epochs=1, steps_per_epoch=1)


def test_constant_is_constant() -> None:
    assert set(rates("constant")) == {0.5}
