"""What can go wrong in a way that is told in one line and without a trace."""

import errno
import os


class UserError(ValueError):
    """Something the user can put right: a field, a file, a value.

    The message is one line that names the field or file, what was found and what is allowed. The
    command prints it and exits with status 2; library code sees a ValueError.
    """

    def __init__(self, message: str) -> None:
        """What is quoted from files may have line breaks, which become spaces."""
        super().__init__(" ".join(message.split()))


def one_line(error: BaseException) -> str:
    """An error of a library in one line, with its kind."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class DiskFullError(OSError):
    """A file of the run finds no room. The message is one line that names it."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of a full disk, a quota or a limit on the size of files.

    Libraries in C++ put the operating system's words into errors of other kinds.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if any(os.strerror(number) in str(error) for number in _NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NonFiniteError(ArithmeticError):
    """The loss or a parameter is not finite after the step that the message names."""
