"""Where Python looks for modules."""

import os
import sys


def is_command() -> bool:
    """Whether Python is starting `python -m mocosfl_jax.COMMAND`, and not another program that imports us."""
    # Python sets argv[0] to -m while it looks for the command, and imports the package on the way.
    return sys.argv[:1] == ["-m"] and _starts_ours(sys.orig_argv[1:])


def leave_current_folder() -> None:
    """Take the current folder off sys.path, where `python -m` has put it.

    Libraries try to import optional packages long after the start. A folder or file of that name in the
    current folder, which may be somebody's workdir, would then be imported. Folders that PYTHONPATH names are
    left alone. Only modules that Python has loaded at its start are imported here.
    """
    if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
        del sys.path[0]


def _starts_ours(options: list[str]) -> bool:
    """Whether Python's options are `-m mocosfl_jax.COMMAND`, in any of the ways to write them.

    Example:
      >>> _starts_ours(["-um", "mocosfl_jax.train"]), _starts_ours(["-m", "other", "mocosfl_jax.train"])
      (True, False)
    """
    module = ""
    for i, option in enumerate(options):
        if option.startswith("-") and not option.startswith("--") and "m" in option:
            module = option.partition("m")[2] or "".join(options[i + 1 : i + 2])
            break
    return module.split(".")[0] == "mocosfl_jax"
