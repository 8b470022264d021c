"""A whole training step, from views to the new state, compared with `torch_loop`.

Last results: two cores of an AMD EPYC, jax 0.10.2, torch 2.13.0, 2026-11-23, --repeats=3

                               ours_s  baseline_s  ratio  images_per_s
    resnet18 cut1 100x1 f32     5.438        5.63  1.035         18.39
    resnet18 cut2 100x1 f32     4.902       5.385  1.098          20.4
    resnet18 cut1 20x5 f32      5.675       6.678  1.177         17.62
    resnet18 cut1 5x20 f32      5.146       5.444  1.058         19.43
    resnet18/16 cut1 20x5 f32  0.1919      0.2154  1.122           521
"""

from collections.abc import Iterator

from benchmarks import settings
from benchmarks.results import Result, result
from benchmarks.settings import NARROW, Setting
from benchmarks.timing import Call, medians, stepper

NEEDS = ("torch",)
SETTINGS = (
    Setting(cut_layer=1),
    Setting(cut_layer=2),
    Setting(clients=20, batch=5),
    Setting(clients=5, batch=20),
    NARROW,
)


def ours(setting: Setting) -> Call:
    program, state, views = settings.compile_step(setting)
    return stepper(program, state, views)


def baseline(setting: Setting) -> Call:
    from benchmarks import torch_loop

    loop = torch_loop.new_loop(setting)
    query, key = map(torch_loop.images, settings.views(setting))
    return lambda: loop.step(query, key)


def results(repeats: int) -> Iterator[Result]:
    from benchmarks import agreement, torch_loop

    torch_loop.use_all_cores()
    agreement.check()
    for setting in SETTINGS:
        seconds = medians({"ours": ours(setting), "baseline": baseline(setting)}, repeats)
        yield result("step", setting.case, seconds, images_per_s=setting.images / seconds["ours"])
