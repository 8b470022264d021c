"""A result as one line of JSON for programs, and all of them as a table for a person."""

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEADING = ("ours_s", "baseline_s", "ratio")


class Result(NamedTuple):
    """What was measured in one case."""

    benchmark: str
    case: str
    numbers: Mapping[str, float]  # ours_s, and where there is a baseline baseline_s and ratio; then others


def result(benchmark: str, case: str, seconds: Mapping[str, float], **more: float) -> Result:
    """Of the seconds of "ours" and, if there is one, of "baseline"."""
    numbers = {f"{name}_s": value for name, value in seconds.items()}
    if "baseline" in seconds:
        numbers["ratio"] = seconds["baseline"] / seconds["ours"]
    return Result(benchmark, case, numbers | more)


def json_line(of: Result) -> str:
    numbers = {name: float(f"{value:.4g}") for name, value in of.numbers.items()}
    return json.dumps({"benchmark": of.benchmark, "case": of.case} | numbers)


def table(results: Sequence[Result]) -> str:
    """A line for each result; what only some benchmarks have stands at its end, with its name."""
    width = max(len(each.case) for each in results)
    lines = [f"{'benchmark':<10}{'case':<{width}}" + "".join(f"{name:>12}" for name in LEADING)]
    for each in results:
        numbers = {name: f"{value:.4g}" for name, value in each.numbers.items()}
        leading = "".join(f"{numbers.pop(name, ''):>12}" for name in LEADING)
        others = "".join(f"  {name} {value}" for name, value in numbers.items())
        lines.append(f"{each.benchmark:<10}{each.case:<{width}}{leading}{others}")
    return "\n".join(lines)


def machine() -> str:
    """Cores and versions."""
    names = ("jax", "jaxlib", "numpy", "torch", "torchvision", "pillow")
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in names
        if importlib.util.find_spec(_module(name))
    ]
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {platform.machine()}, python {platform.python_version()}, {', '.join(versions)}"


def _module(distribution: str) -> str:
    return {"pillow": "PIL"}.get(distribution, distribution)
