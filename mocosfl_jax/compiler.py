"""Compiler flags that make training faster and change results by rounding at most."""

import os

import jax

# jax 0.10 can hand convolutions on a CPU to a faster library, which later versions do by themselves:
# a step of the quickstart takes 0.33 s instead of 0.59 s (two cores).
_CPU_FLAGS_OF_JAX_0_10 = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


def set_flags() -> None:
    """Add our flags to XLA_FLAGS, except those that the user has set. Call before JAX's first operation."""
    present = os.environ.get("XLA_FLAGS", "")
    if jax.__version_info__[:2] == (0, 10):
        missing = [f"--{k}={v}" for k, v in _CPU_FLAGS_OF_JAX_0_10.items() if k not in present]
        os.environ["XLA_FLAGS"] = " ".join([present, *missing]).strip()
