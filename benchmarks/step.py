"""One whole training step, views in and new state out, against `torch_loop`."""

from collections.abc import Iterator

from benchmarks import settings
from benchmarks.results import Result, result
from benchmarks.settings import QUICKSTART, Setting
from benchmarks.timing import Call, medians, stepper

NEEDS = ("torch",)
SETTINGS = (
    Setting(cut_layer=1),
    Setting(cut_layer=2),
    Setting(clients=20, batch=5),
    Setting(clients=5, batch=20),
    QUICKSTART,
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
