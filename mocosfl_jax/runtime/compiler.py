"""Settings of XLA, devices and memory that make training faster. They change results by rounding at most.

All commands and the benchmarks take them from here. They never override what the user has set.
"""

import ctypes
import os
import sys
import tempfile
from pathlib import Path

import jax
from absl import logging

# Flag: value, and the last version of JAX that knows the flag. XLA aborts on unknown flags.
_FLAGS = {
    # jax 0.10 can use a faster library for convolutions on a CPU; later versions use it by default.
    "xla_cpu_experimental_ynn_fusion_type": ("LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", (0, 10)),
    # By default, a process is killed when one CPU device waits 40 s for another, as in a large step.
    "xla_cpu_collective_call_terminate_timeout_seconds": ("86400", (0, 12)),
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": ("3600", (0, 12)),
}
# Each device holds and updates all server parameters. More than two devices have not been measured.
_MOST_CPU_DEVICES = 4

# Parameters of glibc's mallopt (malloc.h) and their values.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_KEEP_MEMORY = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}


def set_up() -> None:
    """Set flags, devices, compilation cache and memory. Call this before JAX's first operation."""
    set_flags()
    set_devices()
    set_cache()
    keep_memory()


def set_flags() -> None:
    """Add our flags to XLA_FLAGS, except those that the user has set."""
    present = os.environ.get("XLA_FLAGS", "")
    missing = [
        f"--{name}={value}"
        for name, (value, last) in _FLAGS.items()
        if name not in present and jax.__version_info__[:2] <= last
    ]
    os.environ["XLA_FLAGS"] = " ".join([present, *missing]).strip()


def options(platform: str) -> dict[str, str | bool]:
    """Options of the compiler for the programs that take long to compile, without those that XLA_FLAGS sets.

    On a CPU, LLVM's first level of optimization compiles the quickstart's step in 11.4 s where the default
    takes 15.9 s, and its initialization in 1.0 s instead of 2.7 s. Steps take as long (docs/speed.md).

    Args:
      platform: As in `jax.Device.platform`.
    """
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {"xla_backend_optimization_level": "1"} if platform == "cpu" and not chosen else {}


def set_devices() -> None:
    """Use one CPU device per core, at most four. Each runs its share of the clients and the batch.

    A single device would split every operation among the cores, and most operations are too small for that.
    JAX_NUM_CPU_DEVICES, or `--xla_force_host_platform_device_count` in XLA_FLAGS, sets another number.
    """
    chosen = jax.config.values["jax_num_cpu_devices"] != -1
    if chosen or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", min(cores, _MOST_CPU_DEVICES))


def set_cache() -> None:
    """Keep compiled programs for the next start, in mocosfl_jax/ of the user's cache folder.

    JAX_COMPILATION_CACHE_DIR sets another folder; JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    Without a home folder, or if the folder cannot be written to, there is no cache, and a warning says so.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mocosfl_jax"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: neither HOME nor a passwd entry
        logging.warning("Compiled programs are not kept for the next start: %s", " ".join(f"{error}".split()))
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_memory() -> None:
    """Keep freed memory in the process, on Linux with glibc.

    On a CPU, XLA allocates a step's intermediate results in every step, and the system would clear each page
    again. Blocks of more than 64 MiB, as in a step of ResNet-18, are still allocated anew unless the first
    thread requests them. So are smaller blocks if nothing else keeps the memory of their thread, as in 4 of
    16 processes that repeatedly used a block of 16 MiB. If any of glibc's own variables is set
    (MALLOC_ARENA_MAX, GLIBC_TUNABLES, ...), nothing changes.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for parameter, value in _KEEP_MEMORY.items():
            mallopt(parameter, value)
