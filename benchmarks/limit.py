"""The FLOP/s of a training step, compared with those of a matrix product in the same run.

The FLOPs of a step are those of the algorithm (`mocosfl_jax.costs`): each product and each convolution counts
once, even if the compiler computes it again. share_of_peak is relative to the faster matrix product.

Last results: two cores of an AMD EPYC, jax 0.10.2, torch 2.13.0, 2026-11-23, --repeats=3

                               ours_s  jax_gflop_per_s  numpy_gflop_per_s  gflop  gflop_per_s  share_of_peak
    matmul 4096 f32            0.8494            161.8              190.5
    resnet18 cut1 100x1 f32     4.965                                      894.3        180.1         0.9456
    resnet18 cut2 100x1 f32     4.306                                      833.9        193.7          1.017
    resnet18/16 cut1 20x5 f32  0.1995                                      14.16           71         0.3727
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import settings, step
from benchmarks.results import Result
from benchmarks.settings import NARROW, Setting
from benchmarks.timing import Call, finished, medians

NEEDS = ()
SIDE = 4096
SETTINGS = (Setting(cut_layer=1), Setting(cut_layer=2), NARROW)


def products(side: int) -> dict[str, float]:
    """Seconds of a float32 product of two square matrices, in JAX and in NumPy."""
    square = np.random.default_rng(0).standard_normal((side, side), np.float32)
    on_device = jnp.asarray(square)
    return medians(
        {
            "jax": finished(jax.jit(jnp.matmul), on_device, on_device),
            "numpy": lambda: square @ square,
        },
        repeats=5,
    )


def measure(setting: Setting, call: Call, repeats: int, peak: float) -> Result:
    """Measures a step of this setting. `peak` is in FLOP/s."""
    seconds = medians({"ours": call}, repeats)["ours"]
    flops = settings.step_flops(setting)
    numbers = {"ours_s": seconds, "gflop": flops / 1e9, "gflop_per_s": flops / seconds / 1e9}
    return Result("limit", setting.case, numbers | {"share_of_peak": flops / seconds / peak})


def results(repeats: int) -> Iterator[Result]:
    seconds = products(SIDE)
    speeds = {name: 2 * SIDE**3 / value for name, value in seconds.items()}
    peak = max(speeds.values())
    numbers = {f"{name}_gflop_per_s": speed / 1e9 for name, speed in speeds.items()}
    yield Result("limit", f"matmul {SIDE} f32", {"ours_s": seconds["jax"], **numbers})
    for setting in SETTINGS:
        yield measure(setting, step.ours(setting), repeats, peak)
