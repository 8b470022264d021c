"""Standard streams that never end a command: closed ones, broken pipes, and terminals with few letters."""

import errno
import io
import os
import sys
from typing import Any

# A reader that has ended, and a terminal that is gone.
_GONE = (errno.EPIPE, errno.EIO)


def make_safe() -> None:
    """Replace standard output and standard error by streams that lose text rather than raise.

    Call this before any file is opened: that file would get the number of a closed stream, and what libraries
    write to that stream would end up in it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = _safe(1, sys.stdout)
    sys.stderr = _safe(2, sys.stderr)


def text_stream(number: int, like: Any = None) -> io.TextIOWrapper:
    """Open a file descriptor for text.

    Letters that the encoding lacks are written as escapes, and what no reader will see is dropped. Other
    errors, such as a full disk, are raised.

    Args:
      number: the file descriptor.
      like: a text stream whose encoding and buffering to take; None: UTF-8, and line by line.
    """
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(number, "w", closefd=False)),
        encoding=like.encoding if like else "utf-8",
        errors="backslashreplace",
        line_buffering=like.line_buffering if like else True,
        write_through=like.write_through if like else False,
    )


class _Pipe(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return memoryview(data).nbytes


def _safe(number: int, stream: Any) -> io.TextIOWrapper:
    if stream is not None:
        stream.flush()
    return text_stream(number, stream)
