"""What the commands set before JAX starts; a user's own settings are kept."""

import os
import pathlib
import subprocess
import sys

import pytest

from mocosfl_jax.runtime import compiler

SHOW = """
import os, jax
from mocosfl_jax.runtime import compiler
compiler.set_up()
print(jax.config.values["jax_compilation_cache_dir"])
print(jax.device_count())
print(os.environ.get("XLA_FLAGS", ""))
"""
REPEATED_FAULTS = """
import resource
from mocosfl_jax.runtime import compiler
compiler.set_up()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jnp.sin(x) @ x[:, :8])
x = jnp.ones((2048, 2048))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min([faults() for _ in range(8)]))
"""


def run(code: str, home: pathlib.Path, **variables: str) -> list[str]:
    """Lines that `code` prints in a separate process, without variables that choose something."""
    chosen = ("JAX_", "XLA_", "XDG_", "MALLOC_", "GLIBC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    environment |= {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_compiled_programs_are_cached_in_the_users_cache_folder(tmp_path: pathlib.Path) -> None:
    assert run(SHOW, tmp_path)[0] == str(tmp_path / ".cache" / "mocosfl_jax")
    assert run(SHOW, tmp_path, XDG_CACHE_HOME=f"{tmp_path}/x")[0] == f"{tmp_path}/x/mocosfl_jax"


NO_PASSWD_ENTRY = """
import pwd
def missing(uid):
    raise KeyError(uid)
pwd.getpwuid = missing
"""


@pytest.mark.parametrize("case", ["no home", "unwritable"])
def test_without_a_cache_folder_there_is_no_cache_and_one_line(case: str, tmp_path: pathlib.Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "HOME": "/proc/nowhere"}
    code = SHOW
    if case == "no home":
        del environment["HOME"]
        code = NO_PASSWD_ENTRY + SHOW
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "None")
    assert "Compiled programs are not kept for the next start" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_users_own_settings_stay(tmp_path: pathlib.Path) -> None:
    flags = [
        "--xla_cpu_collective_call_terminate_timeout_seconds=7",
        "--xla_force_host_platform_device_count=3",
    ]
    variables = {"JAX_COMPILATION_CACHE_DIR": "/mine", "XLA_FLAGS": " ".join(flags)}
    folder, devices, shown = run(SHOW, tmp_path, **variables)
    assert (folder, devices, shown.split()[:2]) == ("/mine", "3", flags)
    assert shown.count("terminate_timeout") == 1
    assert run(SHOW, tmp_path, JAX_NUM_CPU_DEVICES="1")[1] == "1"


@pytest.mark.parametrize("cores, devices", [(1, 1), (3, 3), (64, 4)])
def test_a_cpu_has_one_device_per_core_up_to_four(cores: int, devices: int, tmp_path: pathlib.Path) -> None:
    machine = f"import os; os.sched_getaffinity = lambda process: set(range({cores}))\n"
    assert int(run(machine + SHOW, tmp_path)[1]) == devices


def test_a_program_reuses_its_memory(tmp_path: pathlib.Path) -> None:
    """16 MiB are 4,096 pages, which the system clears for each call unless the process keeps them.

    In about one process in four they are not kept anyway: glibc returns a thread's memory when it is empty,
    and which thread gets the rest is left to chance. Six such processes in a row occur once in four thousand.
    """

    def faults(**variables: str) -> int:
        return int(run(REPEATED_FAULTS, tmp_path, **variables)[0])

    assert any(faults() < 100 for _ in range(6))
    assert faults(MALLOC_TRIM_THRESHOLD_="0") > 1000


def test_the_users_level_of_optimization_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler.options("cpu") == {"xla_backend_optimization_level": "1"}
    assert compiler.options("gpu") == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_backend_optimization_level=3")
    assert compiler.options("cpu") == {}
