"""Paths as people give them, in flags and in fields of the configuration, and files that are replaced."""

import contextlib
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mocosfl_jax.errors import UserError


def user_path(name: str, text: str) -> Path:
    """Return the path that a flag or a field holds, with `~` and `~user` expanded.

    Args:
      name: the flag or field, for messages.
      text: its value.

    Raises:
      UserError: if the value is empty or a URL, or the home folder is not known.

    Example:
      >>> user_path("--workdir", "gs://bucket/run")
      Traceback (most recent call last):
      ...
      mocosfl_jax.errors.UserError: --workdir: found 'gs://bucket/run', allowed: a path; URLs are not opened
    """
    if not text:  # as of a variable of a shell that is not set
        raise UserError(f"{name}: found an empty path, allowed: a path; . is the current folder")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise UserError(f"{name}: found {text!r}, allowed: a path; URLs are not opened")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{name}: found {text!r}, allowed: a path without ~, as no home folder is known"
        ) from error


def utf8_path(name: str, text: str) -> Path:
    """Return `user_path`, for a path that libraries in C++ will open, which need UTF-8.

    Raises:
      UserError: as for `user_path`, or if the absolute path is not UTF-8, or not read as such.
    """
    path = user_path(name, text)
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}: found {str(path.absolute())!a}, allowed: a path in UTF-8; in an ASCII "
            "locale, PYTHONUTF8=1 lets Python read it as such"
        ) from error
    return path


def why_not_writable(folder: Path) -> str:
    """Return why no file can be made in a folder, in the system's words; "" if one can.

    Example:
      >>> why_not_writable(Path("/nowhere"))
      'No such file or directory'
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file that replaces `path` at the end, or is removed if something fails.

    So a reader sees either the old file or the complete new one. The new file has a name of its own: a folder
    from elsewhere could hold a link under a name that can be foreseen, and writing would follow it.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the name that the user knows
        raise
