"""Time and memory per image of a step, for different numbers of clients and of images per client.

The network is a narrow one, `settings.NARROW`. Memory is the most that the compiled program holds: arguments,
results and temporary arrays. There is no baseline: both numbers should stay constant.

Last results: two cores of an AMD EPYC, jax 0.10.2, torch 2.13.0, 2026-11-23, --repeats=3

                                 ours_s  ms_per_image  mib_per_image
    resnet18/16 cut1 10x100 f32   1.903         1.903         0.8953
    resnet18/16 cut1 100x10 f32   1.912         1.912         0.8959
    resnet18/16 cut1 1000x1 f32   2.118         2.118         0.9023
    resnet18/16 cut1 100x1 f32   0.1848         1.848          1.388
    resnet18/16 cut1 100x2 f32   0.3361         1.681          1.095
    resnet18/16 cut1 100x4 f32   0.7296         1.824         0.9602
    resnet18/16 cut1 100x8 f32    1.798         2.247           0.91
"""

from collections.abc import Iterator
from typing import Any

import jax

from benchmarks import settings
from benchmarks.results import Result, result
from benchmarks.settings import NARROW, Setting, Step
from benchmarks.timing import medians, stepper

NEEDS = ()
NETWORK = NARROW._replace(queue_size=6000)
SETTINGS = (
    *(NETWORK._replace(clients=count, batch=1000 // count) for count in (10, 100, 1000)),
    *(NETWORK._replace(clients=100, batch=batch) for batch in (1, 2, 4, 8)),
)


def held_bytes(program: Any) -> int:
    """The most bytes that a compiled program holds, on all devices. Donated arguments count once."""
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
