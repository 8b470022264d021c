"""The optimizers that a configuration gives to clients and server."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.algorithm import optim
from mocosfl_jax.config import quickstart, resolve
from mocosfl_jax.training.build import client_optimizer, server_optimizer


@pytest.mark.parametrize("cohort", [2, 4])
def test_the_official_schedule_follows_the_steps_in_which_a_client_is_trained(cohort: int) -> None:
    """In the official code each client's scheduler takes a step with each of its backward passes."""
    config = quickstart()
    config.epochs, config.clients.num, config.clients.cohort = 3, 4, cohort
    config.optim.client_schedule, config.optim.schedule = "official_per_step", "cosine"
    config.optim.momentum = config.optim.weight_decay = 0.0
    resolved = resolve(config)
    optimizer = client_optimizer(resolved, steps_per_epoch=10)
    assert optimizer is not None
    base, period = resolved.optim.client_lr, resolved.total_epochs
    assert period == 3 * 4 // cohort
    params, state = jnp.zeros(1), optimizer.init(jnp.zeros(1))
    trained = range(8) if cohort == 4 else [5, 6, 7, 30, 31, 32, 33, 50]  # steps of the run
    for count, step in enumerate(trained):
        new, state = optim.descend(optimizer, jnp.ones(1), state, params, step)
        rate = base * (1 + math.cos(math.pi * count / period)) / 2
        np.testing.assert_allclose(params - new, rate, rtol=1e-5, atol=1e-8)
        params = new
    # A run in which all clients are trained in all steps has no counters in its checkpoints.
    assert len(jax.tree.leaves(state)) == (1 if cohort == 4 else 2)


def test_other_schedules_follow_the_steps_of_the_run() -> None:
    """On both sides, so that a client that sits out an epoch follows the schedule of the run."""
    config = quickstart()
    config.epochs, config.clients.num, config.clients.cohort = 2, 4, 2
    config.optim.schedule, config.optim.momentum, config.optim.weight_decay = "cosine", 0.0, 0.0
    resolved = resolve(config)
    for optimizer in (client_optimizer(resolved, 10), server_optimizer(resolved, 10)):
        assert optimizer is not None
        state = optimizer.init(jnp.zeros(1))
        for step, epoch in ((0, 0), (19, 1), (35, 3)):  # of four epochs
            new, state = optim.descend(optimizer, jnp.ones(1), state, jnp.zeros(1), step)
            rate = resolved.optim.server_lr * (1 + math.cos(math.pi * epoch / 4)) / 2
            np.testing.assert_allclose(-new, rate, rtol=1e-5)
