"""What a run's bits depend on beside its configuration: versions, commit, kind of device."""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import jax

_DISTRIBUTION = "mocosfl-jax"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_GIT_SECONDS = 10  # a folder on a slow disk is not worth more

Environment = Mapping[str, str | None]  # name -> version; None: not known


def environment(device: jax.Device) -> dict[str, str | None]:
    """Versions of Python and of the packages that compute, our own commit, and the kind of `device`."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "mocosfl_jax": _version(_DISTRIBUTION),
        "commit": commit(Path(__file__).parents[1]),
        "device": device.device_kind,
    }


def differences(found: Environment, now: Environment) -> list[str]:
    """What differs, as `name: found, now`."""
    return [
        f"{name} {found.get(name) or 'unknown'} there, {now.get(name) or 'unknown'} now"
        for name in dict.fromkeys([*now, *found])
        if found.get(name) != now.get(name)
    ]


def commit(package: Path) -> str | None:
    """The commit of the code in `package`: of its git checkout, or the one that pip has installed from git.

    "+changes" follows where a file of the checkout that git knows, or a new one in the package, is not as
    committed. None where neither tells.
    """
    root = package.parent
    # A package may lie in a repository of something else, such as a virtual environment in a project.
    if (root / ".git").exists() and _git(root, "ls-files", "--", package.name):
        head = _git(root, "rev-parse", "HEAD")
        if head is not None:
            new = _git(root, "ls-files", "--others", "--exclude-standard", "--", package.name)
            changed = _git(root, "status", "--porcelain", "--untracked-files=no")
            return head + ("+changes" if new or changed else "")
    return _installed_commit(package)


def _git(root: Path, *arguments: str) -> str | None:
    """What a git command says; None where it fails, or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit(package: Path) -> str | None:
    """From the record that pip keeps of where it got a distribution (PEP 610)."""
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
        # Another copy of the package may be installed than the one that runs.
        if Path(str(distribution.locate_file(package.name))).resolve() != package.resolve():
            return None
        record = json.loads(distribution.read_text("direct_url.json") or "{}")
        return record["vcs_info"]["commit_id"]
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # used from a folder
        return None
