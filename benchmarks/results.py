"""Results: each as a line of JSON for programs, and all of them as a table for people."""

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEADING = ("ours_s", "baseline_s", "ratio")


class Result(NamedTuple):
    """The measurements of one case."""

    benchmark: str
    case: str
    numbers: Mapping[str, float]  # ours_s; baseline_s and ratio if there is a baseline; then others


def result(benchmark: str, case: str, seconds: Mapping[str, float], **more: float) -> Result:
    """Makes a result from the seconds of "ours" and, if there is one, of "baseline"."""
    numbers = {f"{name}_s": value for name, value in seconds.items()}
    if "baseline" in seconds:
        numbers["ratio"] = seconds["baseline"] / seconds["ours"]
    return Result(benchmark, case, numbers | more)


def json_line(of: Result) -> str:
    numbers = {name: float(f"{value:.4g}") for name, value in of.numbers.items()}
    return json.dumps({"benchmark": of.benchmark, "case": of.case} | numbers)


def table(results: Sequence[Result]) -> str:
    """A table with one line per result. Numbers of only some benchmarks come last, with their names."""
    width = max(len(each.case) for each in results)
    lines = [f"{'benchmark':<10}{'case':<{width}}" + "".join(f"{name:>12}" for name in LEADING)]
    for each in results:
        numbers = {name: f"{value:.4g}" for name, value in each.numbers.items()}
        leading = "".join(f"{numbers.pop(name, ''):>12}" for name in LEADING)
        others = "".join(f"  {name} {value}" for name, value in numbers.items())
        lines.append(f"{each.benchmark:<10}{each.case:<{width}}{leading}{others}")
    return "\n".join(lines)


def machine() -> str:
    """One line that describes the machine: its cores, and the versions of the packages."""
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
