"""Time and memory of a step for each of its images, over numbers of clients and of images a client.

The network is the quickstart's. Memory is what the compiled program holds at most: arguments, results and
temporary arrays. Nothing to compare with: what counts is that both stay level.
"""

from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import settings
from benchmarks.results import Result, result
from benchmarks.settings import QUICKSTART, Setting, Step
from benchmarks.timing import medians, stepper

NEEDS = ()
NETWORK = QUICKSTART._replace(queue_size=6000)
SETTINGS = (
    *(NETWORK._replace(clients=count, batch=1000 // count) for count in (10, 100, 1000)),
    *(NETWORK._replace(clients=100, batch=batch) for batch in (1, 2, 4, 8)),
)


def held_bytes(program: Any) -> int:
    """Bytes that a compiled program holds at most, on all devices; donated arguments count once."""
    plan = program.memory_analysis()
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return jax.device_count() * (kept + plan.temp_size_in_bytes)


def measure(setting: Setting, step: Step, repeats: int) -> Result:
    program, state, views = step
    seconds = medians({"ours": stepper(program, state, views)}, repeats)
    return result(
        "scaling",
        setting.case,
        seconds,
        ms_per_image=1e3 * seconds["ours"] / setting.images,
        mib_per_image=held_bytes(program) / setting.images / 2**20,
    )


def results(repeats: int) -> Iterator[Result]:
    for setting in SETTINGS:
        yield measure(setting, settings.compile_step(setting), repeats)
