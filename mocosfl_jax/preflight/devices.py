"""Accelerators for which a program can be compiled without having one.

The figures are those of the data sheets, for one device: a TPU chip or a GPU.
"""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from mocosfl_jax.errors import UserError

GIB = 2**30


class Kind(NamedTuple):
    """A kind of accelerator."""

    name: str
    platform: str  # "tpu" or "cuda"
    memory: int  # bytes that a program may use
    bandwidth: float  # bytes per second to and from the device's memory
    peak: float  # FLOP per second in bfloat16
    clock: float  # cycles per second
    shapes: tuple[tuple[int, ...], ...] = ()  # arrangements of chips, smallest first (TPU)
    target: str = ""  # description of the device for XLA (GPU)


def _gpu(
    name: str,
    *,
    cores: int,
    fpus: int,
    shared: int,
    l2: int,
    clock: float,
    memory: int,
    bandwidth: float,
    major: int,
) -> str:
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
      shared_memory_per_block: 49152  shared_memory_per_core: {shared}
      shared_memory_per_block_optin: {shared - 1024}
      core_count: {cores}  fpus_per_core: {fpus}  clock_rate_ghz: {clock}
      block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
      memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory}  l2_cache_size: {l2}
      registers_per_core_limit: 65536  registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} minor: 0 }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 }}
    runtime_version {{ major: 12 minor: 9 }}
    device_description_str: "{name}"
    """


_SQUARES = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))
# JAX reserves this share of a GPU's memory by default (XLA_PYTHON_CLIENT_MEM_FRACTION).
_GPU_SHARE = 0.75
_HOPPER: dict[str, Any] = {
    "cores": 132,
    "fpus": 128,
    "shared": 233472,
    "l2": 52428800,
    "clock": 1.98,
    "major": 9,
}
_H100, _H200, _A100 = 84_929_347_584, 151_397_597_184, 85_100_068_864

KINDS = {
    kind.name: kind
    for kind in (
        # The memory of TPUs is what their compiler says it may use.
        Kind("v5e", "tpu", int(15.75 * GIB), 819e9, 197e12, 1.5e9, _SQUARES),
        Kind("v5p", "tpu", int(95.74 * GIB), 2765e9, 459e12, 1.75e9, _CUBES),
        Kind("v6e", "tpu", int(31.25 * GIB), 1640e9, 918e12, 1.75e9, _SQUARES),
        Kind(
            "h100", "cuda", int(_GPU_SHARE * _H100), 3352e9, 989e12, 1.98e9,
            target=_gpu("NVIDIA H100 80GB HBM3", memory=_H100, bandwidth=3352.32e9, **_HOPPER),
        ),
        Kind(
            "h200", "cuda", int(_GPU_SHARE * _H200), 4800e9, 989e12, 1.98e9,
            target=_gpu("NVIDIA H200 141GB HBM3e", memory=_H200, bandwidth=4800e9, **_HOPPER),
        ),
        Kind(
            "a100", "cuda", int(_GPU_SHARE * _A100), 2039e9, 312e12, 1.41e9,
            target=_gpu(
                "NVIDIA A100-SXM4-80GB", cores=108, fpus=64, shared=167936, l2=41943040, clock=1.41,
                memory=_A100, bandwidth=2039.04e9, major=8,
            ),
        ),
    )
}  # fmt: skip


# Without the first three, libtpu asks the cloud which TPU it runs on and complains about the answer. Without
# the last, only one process can load it.
_COMPILING = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology(kind: Kind, count: int) -> list[jax.Device]:
    """`count` devices of this kind, for compiling only. JAX's own platform becomes the CPU.

    Raises:
      UserError: If the compiler for them is not installed, or there is no machine with so many.
    """
    jax.config.update("jax_platforms", "cpu")
    if kind.platform == "tpu":
        _require("libtpu", kind, "preflight-tpu")
        os.environ |= _COMPILING
        sizes = {math.prod(shape): "x".join(map(str, shape)) for shape in kind.shapes}
        fitting = [size for size in sizes if size >= count]
        if not fitting:
            raise UserError(f"--devices: found {count}, allowed: 1 to {max(sizes)} of {kind.name}")
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind.name}:{sizes[min(fitting)]}"
        )
        return list(found.devices[:count])
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        _require("jax_cuda12_plugin", kind, "preflight-cuda")
    # Without a GPU, no kernel can be timed.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    hosts, per_host = (1, count) if count <= 8 else (-(-count // 8), 8)
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x{hosts}x{per_host}", target_config=kind.target
    )
    return list(found.devices[:count])


def _require(module: str, kind: Kind, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"--device: found {kind.name}, for which {module} is missing; "
            f"to install it: pip install 'mocosfl-jax[{extra}]'"
        )
