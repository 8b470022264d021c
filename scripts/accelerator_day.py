"""Everything to find out in an hour on a machine with a GPU or TPU, in one command:

    python scripts/accelerator_day.py [--out=FOLDER] [--minutes=NUMBER] [--data_dir=FOLDER]
                                      [--estimates=FILE] [--toy]

Runs the tests for accelerators, times an epoch and, if torch is installed, steps, clients, augmentation and
evaluation against the PyTorch loop, and trains the headline of the paper for the rest of the time. Needs no
network, but CIFAR-10 in --data_dir. All results are in FOLDER/results.json, each with its device and
versions. The same command goes on where the last one stopped: what succeeded on the same device is not
measured again, and training resumes.

--estimates is the output of `python -m mocosfl_jax.preflight --json` for the headline: its estimate of a step
is put beside what was measured. --toy tries everything at a size for a laptop.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocosfl_jax.paths import replacing

HEADLINE = [
    "--config=configs/cifar10_noniid.py:1000",
    "--config.model.cut_layer=2",
    "--config.model.compute_dtype=bfloat16",
]
TOY = ["--config.model.width=4", "--config.epochs=3", "--config.eval.probe_epochs=1"]
# Prints the device and the versions of what computes.
DEVICE = """
import importlib.metadata as m, json, jax
versions = {name: m.version(name) for name in ("jax", "jaxlib", "flax", "mocosfl-jax")}
print(json.dumps({"device": jax.devices()[0].device_kind, "devices": len(jax.devices())} | versions))
"""
SAVING = 120  # seconds that training may take to end its round and save


def main(argv: Sequence[str]) -> int:
    """Run what is missing, and return 0 if everything that was run succeeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/accelerator_day"))
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--estimates", type=Path)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    failed = False
    here = run([sys.executable, "-c", DEVICE], 300)["results"]
    for name, command in measurements(options.toy):
        left = deadline - time.monotonic()
        known = results.get(name, {})
        if (known.get("status"), known.get("command"), known.get("on")) == (0, command, here) or left < 60:
            continue
        print(f"{name}: {' '.join(command)}", flush=True)
        results[name] = run(command, left) | {"on": here}
        failed |= results[name]["status"] != 0
        write(path, results)
    workdir = options.out / ("toy" if options.toy else "headline")
    already = len(metrics(workdir))
    left = deadline - time.monotonic() - SAVING
    if left > 60 or options.toy:
        command = [sys.executable, "-m", "mocosfl_jax.train", f"--workdir={workdir}"]
        command += TOY if options.toy else [*HEADLINE, f"--config.data.dir={options.data_dir}"]
        print(f"training: {' '.join(command)}", flush=True)
        status = train(command, max(left, 1))
        failed |= status not in (0, 128 + signal.SIGTERM)
    if "training" not in results or len(metrics(workdir)) > already:
        results["training"] = progress(workdir, options.estimates, already) | {"on": here}
    write(path, results)
    print(f"{path}: {', '.join(results)}")
    return int(failed)


def measurements(toy: bool) -> list[tuple[str, list[str]]]:
    """The name and the command of everything that is measured before training."""
    python = sys.executable
    # By name: to collect all tests takes packages that a bare machine lacks.
    test = [python, "-m", "pytest", "-q", "-m", "accelerator", "-n", "0", "tests/test_accelerator.py"]
    bench = [python, "-m", "benchmarks"]
    if toy:
        return [
            ("tests", [python, "-m", "pytest", "-q", "-n", "0", "tests/test_imports.py"]),
            ("step", [*bench, "--only=epoch", "--repeats=1"]),
        ]
    names = ("step", "clients", "augment", "eval", "epoch")
    return [("tests", test), *((name, [*bench, f"--only={name}", "--repeats=3"]) for name in names)]


def run(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run a command, and return its status, its time, its lines of JSON and, if it failed, its last lines."""
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        status, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""  # bytes, whatever was asked for
        out = printed.decode("utf-8", "replace") if isinstance(printed, bytes) else printed
        status, err = 124, "stopped: no time left"
    lines = [found for line in out.splitlines() if (found := parsed(line)) is not None]
    result = {"command": list(command), "status": status, "seconds": round(time.monotonic() - start, 1)}
    return result | {"results": lines or out.splitlines()[-1:]} | ({"error": err[-2000:]} if status else {})


def parsed(line: str) -> Any:
    """The object of a line of JSON; None for any other line, such as one that was cut off."""
    try:
        return json.loads(line) if line.startswith("{") else None
    except json.JSONDecodeError:
        return None


def train(command: Sequence[str], seconds: float) -> int:
    """Train until the run ends or the time is over; then it saves, and the same command resumes it."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            return process.wait()


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl, if there are any."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def progress(workdir: Path, estimates: Path | None, already: int = 0) -> dict[str, Any]:
    """The last numbers of the run, and its milliseconds of a step beside the estimate.

    Speeds are those of the lines after the first `already`: earlier ones may be another device's.
    """
    lines = metrics(workdir)
    if not lines:
        return {}
    config = json.loads((workdir / "config.json").read_text())
    result: dict[str, Any] = {"environment_at_start": config["environment"], "last": lines[-1]}
    lines = lines[already:]
    speeds = sorted(line["images_per_s"] for line in lines if "images_per_s" in line)
    if speeds:
        result["images_per_s"] = speeds[len(speeds) // 2]
    if estimates is not None and speeds:
        found = [json.loads(line) for line in estimates.read_text().splitlines()]
        estimated = next(line["estimated_ms"] for line in found if line["program"] == "round")
        images = config["clients"]["cohort"] * config["clients"]["batch_size"]
        result |= {"step_ms": 1e3 * images / result["images_per_s"], "estimated_step_ms": estimated}
    return result


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file of results, so that a kill leaves the old or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
