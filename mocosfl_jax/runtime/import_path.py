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
      >>> _starts_ours(["-Ximporttime", "-W", "ignore::m", "-mmocosfl_jax.train"])
      True
    """
    words = iter(options)
    for option in words:
        if not option.startswith("-") or option.startswith("--"):
            continue
        for place, letter in enumerate(option[1:], start=2):
            if letter in "XWm":  # these have a value: the rest of the word, or the next word
                value = option[place:] or next(words, "")
                if letter == "m":
                    return value.split(".")[0] == "mocosfl_jax"
                break
    return False
