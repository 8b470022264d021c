"""Errors that the commands report in one line, without a traceback."""

import contextlib
import errno
import os
import unicodedata
from collections.abc import Iterator, Mapping


class UserError(ValueError):
    """A mistake that the user can correct: a field, a file or a value.

    The message is one line that names the field or file, what was found and what is allowed. The commands
    print it and exit with status 2. In library code it is a ValueError.

    Example:
      >>> raise UserError("config.epochs: found 0, allowed: 1 or more")
      Traceback (most recent call last):
      ...
      mocosfl_jax.errors.UserError: config.epochs: found 0, allowed: 1 or more
    """

    def __init__(self, message: str) -> None:
        """Replace line breaks by spaces: text quoted from files may contain them."""
        super().__init__(" ".join(message.split()))


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Within this context, a UserError about an argument is about what the user gave it by.

    Example:
      >>> with renamed({"width": "config.model.width"}):
      ...     raise UserError("width: found 3, allowed: multiples of 4")
      Traceback (most recent call last):
      ...
      mocosfl_jax.errors.UserError: config.model.width: found 3, allowed: multiples of 4

    Args:
      names: What the user gave, by the argument that starts the message. Other messages stay as they are.
    """
    try:
        yield
    except UserError as error:
        argument, colon, rest = str(error).partition(":")
        if argument not in names:
            raise
        raise UserError(f"{names[argument]}{colon}{rest}") from error


def one_line(error: BaseException) -> str:
    """Format an exception as one line that starts with its type.

    Example:
      >>> one_line(KeyError("get_config"))
      "KeyError: 'get_config'"
    """
    return " ".join(f"{type(error).__name__}: {error}".split())


def printable(text: str) -> str:
    """Replace each control character, each line break and each surrogate by U+FFFD.

    Names of files may hold any bytes. Python keeps those that are not UTF-8 as surrogates, which no terminal
    and no font accepts.

    Example:
      >>> printable("caf\\udce9")
      'caf\N{REPLACEMENT CHARACTER}'
    """
    unprintable = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) in unprintable else letter
        for letter in text
    )


class DiskFullError(OSError):
    """The disk has no room for a file of the run. The message is one line that names the file."""


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error comes from a full disk, a quota or a limit on file sizes.

    The errors that led to it are checked too. C++ libraries put the operating system's message into errors of
    other types, so the texts are searched as well.

    Example:
      >>> is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
      True
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if any(os.strerror(number) in str(error) for number in _NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CollapsedError(ArithmeticError):
    """The features of all images have become almost equal, and the run was told to end then."""


class NonFiniteError(ArithmeticError):
    """The loss or a parameter is not finite after the step that the message names."""
