"""Compiles a program and reads off what it needs: memory, operations, time by estimate, traffic."""

import re
import time
import warnings
from collections import defaultdict
from typing import Any, NamedTuple

import jax

from mocosfl_jax.costs.flops import multiply_adds
from mocosfl_jax.preflight import hlo
from mocosfl_jax.preflight.devices import Kind
from mocosfl_jax.preflight.programs import Plan

LAUNCH = 2e-6  # seconds that a GPU takes to start a kernel, about
ESTIMATES = {
    "tpu": "the compiler's cycles over the clock",
    "cuda": "a bound: bytes of all kernels over the bandwidth and 2 us a kernel, or FLOPs over the peak",
}


class Cost(NamedTuple):
    """What the operations of one place in the model cost."""

    place: str  # a layer, in the forward or backward pass
    milliseconds: float  # per training step
    kernels: float


class Figures(NamedTuple):
    """What a program needs on each device."""

    program: str
    memory: int  # bytes
    state: int  # bytes of `memory` that are arguments: state, parameters, features
    images: int
    temporary: int
    fits: bool
    seconds: float  # to compile
    work: "Work | None"  # None if the compiler refuses the program because it does not fit


class Work(NamedTuple):
    """What a device does, per training step."""

    flops: float
    milliseconds: float  # an estimate
    share: float  # of the device's peak, at the estimated time
    kernels: int
    moved: int  # bytes that its kernels read and write
    costs: tuple[Cost, ...]  # the ten most expensive places
    collectives: dict[str, float]  # kind -> bytes that the device receives


def measure(plan: Plan, kind: Kind, devices: int) -> Figures:
    """Compile a program for `devices` of a kind and read its figures."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            compiled = plan.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        temporary = _refused(str(error))
        if temporary is None:
            raise
        seconds = time.perf_counter() - start
        memory = plan.arguments + temporary + plan.elsewhere
        state = memory - temporary - plan.images
        return Figures(plan.name, memory, state, plan.images, temporary, False, seconds, None)
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    arguments = analysis.argument_size_in_bytes
    own = analysis.output_size_in_bytes - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes
    # Of a TPU's program, the temporary memory of loops counts only in the peak.
    temporary = max(own, analysis.peak_memory_in_bytes - arguments)
    memory = arguments + temporary + plan.elsewhere
    state = memory - temporary - plan.images
    fits = memory <= kind.memory
    work = _work(compiled.as_text(), plan, kind, devices)
    return Figures(plan.name, memory, state, plan.images, temporary, fits, seconds, work)


def _work(text: str, plan: Plan, kind: Kind, devices: int) -> Work:
    program = hlo.read(text, plan.steps)
    seconds: dict[str, float] = defaultdict(float)
    kernels: dict[str, float] = defaultdict(float)
    for operation in program.operations:
        place = operation.place.rpartition("/")[0] or operation.place or operation.name
        seconds[place] += _seconds(operation, kind) / plan.steps
        kernels[place] += operation.times / plan.steps if _is_kernel(operation) else 0
    flops = 2 * multiply_adds(plan.trace()) / devices / plan.steps
    total = max(sum(seconds.values()), flops / kind.peak)
    dearest = sorted(seconds.items(), key=lambda pair: -pair[1])[:10]
    return Work(
        flops=flops,
        milliseconds=1e3 * total,
        share=flops / kind.peak / total if total else 0.0,
        kernels=round(sum(kernels.values())),
        moved=round(sum(o.moved * o.times for o in program.operations) / plan.steps),
        costs=tuple(Cost(place, 1e3 * each, round(kernels[place], 2)) for place, each in dearest),
        collectives={name: count / plan.steps for name, count in program.collectives.items()},
    )


def _is_kernel(operation: hlo.Operation) -> bool:
    return not operation.opcode.endswith(("-done", "-update"))


def _seconds(operation: hlo.Operation, kind: Kind) -> float:
    if kind.platform == "tpu":
        return operation.times * operation.cycles / kind.clock
    return operation.times * (operation.moved / kind.bandwidth + LAUNCH) if _is_kernel(operation) else 0.0


def _refused(message: str) -> int | None:
    """Temporary bytes of a program that its compiler refused because they do not fit."""
    found = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMG]?)", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return int(float(found[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[found[2]])


def as_dict(figures: Figures, kind: Kind, devices: int) -> dict[str, Any]:
    """The figures as plain values, as --json prints them."""
    work = figures.work
    return {
        "program": figures.program,
        "device": kind.name,
        "devices": devices,
        "memory_bytes": figures.memory,
        "limit_bytes": kind.memory,
        "state_bytes": figures.state,
        "images_bytes": figures.images,
        "temporary_bytes": figures.temporary,
        "fits": figures.fits,
        "flops": work and work.flops,
        "estimated_ms": work and work.milliseconds,
        "estimate": ESTIMATES[kind.platform],
        "share_of_peak": work and work.share,
        "kernels": work and work.kernels,
        "moved_bytes": work and work.moved,
        "costs": work and [cost._asdict() for cost in work.costs],
        "collectives": work and work.collectives,
        "compile_s": round(figures.seconds, 1),
    }
