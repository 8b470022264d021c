"""Settings of XLA, of devices and of memory that make training faster; results change by rounding at most.

Here alone they are chosen, for all commands and the benchmarks. Whatever the user has set stays as it is.
"""

import ctypes
import os
import sys
from pathlib import Path

import jax

# Up to which version of JAX a flag is known: XLA stops at a flag that it does not know.
_FLAGS = {
    # jax 0.10 can hand convolutions on a CPU to a faster library, which later versions do by themselves.
    "xla_cpu_experimental_ynn_fusion_type": ("LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", (0, 10)),
    # By default a process is killed if one CPU device waits for another for 40 s, as in a large step.
    "xla_cpu_collective_call_terminate_timeout_seconds": ("86400", (0, 12)),
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": ("3600", (0, 12)),
}
# Each holds all of the server's parameters and updates them by itself. More than two have not been measured.
_MOST_CPU_DEVICES = 4

# Parameters of glibc's mallopt (malloc.h) and what they get here.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_KEEP_MEMORY = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}


def set_up() -> None:
    """Flags, devices, compilation cache and memory. Call before JAX's first operation."""
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


def set_devices() -> None:
    """As many CPU devices as cores, up to four: each runs its share of the clients and of the batch.

    One device would share out operation after operation among the cores, most of which are too small for it.
    JAX_NUM_CPU_DEVICES, or `--xla_force_host_platform_device_count` in XLA_FLAGS, sets another number.
    """
    chosen = jax.config.values["jax_num_cpu_devices"] != -1
    if chosen or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", min(cores, _MOST_CPU_DEVICES))


def set_cache() -> None:
    """Keep compiled programs for the next start, in mocosfl_jax/ of the user's cache folder.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mocosfl_jax"
        jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_memory() -> None:
    """Have freed memory stay with the process, on Linux with glibc.

    XLA takes the memory of a step's intermediate results anew for each step on a CPU, and the system would
    clear every page of it again. Blocks of more than 64 MiB, as of a step of ResNet-18, are still taken anew
    wherever it is not the first thread that wants them. So are smaller ones where nothing else keeps the
    memory of their thread, as in 4 of 16 processes that used one of 16 MiB again and again. Any of glibc's
    own variables (MALLOC_ARENA_MAX, GLIBC_TUNABLES, ...) leaves the choice to the user.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for parameter, value in _KEEP_MEMORY.items():
            mallopt(parameter, value)
