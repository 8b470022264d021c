"""Everything besides the configuration that affects a run's bits: versions, devices, settings of JAX."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import jax

_DISTRIBUTION = "mocosfl-jax"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_GIT_SECONDS = 10  # then give up, as on a slow disk

Environment = Mapping[str, str | None]  # name -> version; None: unknown


def environment(device: jax.Device, mesh: Mapping[str, int]) -> dict[str, str | None]:
    """Return what a run depends on besides its configuration.

    Args:
      device: one of the run's.
      mesh: number of devices along each axis of the run's mesh.

    Returns:
      The versions of Python and the numerical packages, our own commit, kind and number of the devices, the
      processor, XLA's flags, whether float64 is enabled, and the PRNG. With several processes, processor and
      flags are those of this one.
    """
    settings = jax.config.values
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "mocosfl_jax": _version(_DISTRIBUTION),
        "commit": commit(Path(__file__).parents[1]),
        "device": device.device_kind,
        "devices": " x ".join(f"{axis} {size}" for axis, size in mesh.items()),
        "cpu": processor(),
        "xla_flags": os.environ.get("XLA_FLAGS") or "none",
        "x64": str(settings["jax_enable_x64"]),
        "prng": settings["jax_default_prng_impl"]
        + (", partitionable" if settings["jax_threefry_partitionable"] else ""),
    }


def processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor: XLA compiles for it. On a virtual machine its name alone may say little."""
    try:
        first = file.read_text(errors="replace").split("\n\n")[0]
        fields = dict(re.findall(r"^(.+?)\s*: (.+)$", first, re.MULTILINE))
        return f"{fields['model name']}, family {fields['cpu family']}, model {fields['model']}"
    except (OSError, KeyError):  # another system, or another kind of processor
        return platform.processor() or platform.machine()


def differences(found: Environment, now: Environment) -> list[str]:
    """List the entries that differ, each with its value at the start of the run and its value now.

    Example:
      >>> differences({"jax": "0.10.1", "commit": None}, {"jax": "0.10.2", "commit": None})
      ['jax 0.10.1 at the start, 0.10.2 now']
    """
    return [
        f"{name} {found.get(name) or 'unknown'} at the start, {now.get(name) or 'unknown'} now"
        for name in dict.fromkeys([*now, *found])
        if found.get(name) != now.get(name)
    ]


def commit(package: Path) -> str | None:
    """Return the commit of the code in `package`, from its git checkout or pip's record of the installation.

    "+changes" is appended if a tracked file of the checkout has changed, or the package has a new file. The
    commit is None if neither source has one.
    """
    root = package.parent
    # The package may lie inside another project's repository, for example in a virtual environment.
    if (root / ".git").exists() and _git(root, "ls-files", "--", package.name):
        head = _git(root, "rev-parse", "HEAD")
        if head is not None:
            new = _git(root, "ls-files", "--others", "--exclude-standard", "--", package.name)
            changed = _git(root, "status", "--porcelain", "--untracked-files=no")
            return head + ("+changes" if new or changed else "")
    return _installed_commit(package)


def _git(root: Path, *arguments: str) -> str | None:
    """Return the output of a git command; None if it fails or git is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit(package: Path) -> str | None:
    """Read the commit from pip's record of where a distribution came from (PEP 610)."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
        # The installed copy of the package may not be the one that runs.
        if Path(str(distribution.locate_file(package.name))).resolve() != package.resolve():
            return None
        record = json.loads(distribution.read_text("direct_url.json") or "{}")
        return record["vcs_info"]["commit_id"]
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # not installed
        return None
