"""Times contenders in turn, so that a slow minute of the machine affects all of them."""

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
    """Median seconds of a call of each contender, over `repeats` rounds in which each is called once.

    A first round warms up and is not counted. The pause before each call lets the threads of the previous
    contender
    come to rest: they keep spinning for a while after their work.
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
    """A call of function(*args) that returns only when its results in JAX are ready."""
    return lambda: jax.block_until_ready(function(*args))


def stepper(step: Callable[..., Any], state: Any, *args: Any) -> Call:
    """A call that does one more step: state, *args -> state, output. The state may be donated."""

    def call() -> None:
        nonlocal state
        state, output = step(state, *args)
        jax.block_until_ready((state, output))

    return call
