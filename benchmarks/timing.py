"""Time of one call, of several contenders in turn, so that a slow minute of the machine hits all of them."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax

Call = Callable[[], Any]  # returns when its work is done


def medians(
    contenders: Mapping[str, Call],
    repeats: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[], None] = lambda: time.sleep(0.05),
) -> dict[str, float]:
    """Median seconds of a call of each contender, from `repeats` rounds in which each is called once.

    A first round warms up and is not counted. In the pauses before each call the threads of the one before
    come to rest, which after their work look for more for a while.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + 1):
        for name, call in contenders.items():
            pause()
            start = clock()
            call()
            if round_:
                seconds[name].append(clock() - start)
    return {name: median(times) for name, times in seconds.items()}


def finished(function: Callable[..., Any], *args: Any) -> Call:
    """function(*args) of JAX, which returns only when its results are there."""
    return lambda: jax.block_until_ready(function(*args))


def stepper(step: Callable[..., Any], state: Any, *args: Any) -> Call:
    """Each call is one more step of state, *args -> state, output. The state may be donated."""

    def call() -> None:
        nonlocal state
        state, output = step(state, *args)
        jax.block_until_ready((state, output))

    return call
