"""Downloads a published file and verifies its size and SHA-256."""

import contextlib
import contextvars
import hashlib
import http.client
import os
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from mocosfl_jax.errors import UserError

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60
_forbidden = contextvars.ContextVar("_forbidden", default=False)


@contextlib.contextmanager
def forbidden() -> Iterator[None]:
    """Make `download` refuse, for data that are named by a file that somebody else may have written."""
    token = _forbidden.set(True)
    try:
        yield
    finally:
        _forbidden.reset(token)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_line(path: Path, size: int, expected: str) -> str:
    """Describes a file: its path, and a remark if it is not the published file. The remark is also logged.

    Args:
      path: The file.
      size: Bytes of the published file.
      expected: SHA-256 of the published file.
    """
    if path.stat().st_size == size and _sha256(path) == expected:
        return str(path)
    logging.warning("%s is not the published file: its images may differ, e.g. be re-encoded", path)
    return f"{path} (not the published file)"


def download(url: str, target: Path, size: int, expected: str) -> None:
    """Downloads `url` to `target`, which appears only if its size and SHA-256 are right.

    Of several processes that want the same file at the same place, one downloads it, and the others wait.

    Args:
      url: Address of the file.
      target: Where to put it. Missing folders are created.
      size: Bytes of the published file.
      expected: SHA-256 of the published file.

    Raises:
      UserError: If the file cannot be downloaded or written, or differs, or within `forbidden`. The
        message says which file to put where. No partial file is left behind.
    """
    if _forbidden.get():
        raise UserError(
            f"directory: {target} is missing, and only training downloads; get {url} and put it there"
        )
    by_hand = f"get {url} by other means and put it there"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not target.is_file():
                _fetch(url, target, size, expected, by_hand)
    except OSError as error:
        raise UserError(f"directory: {target} cannot be written ({error}); {by_hand}") from error


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Waits until no other process is here with the same target. Where there are no locks, none waits.

    The operating system releases the lock when the process ends, for any reason.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    path = target.with_name(f".{target.name}.lock")
    with path.open("a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Whoever waits for the removed file finds the target there, or downloads it too, at worst beside
            # another.
            path.unlink(missing_ok=True)


def _fetch(url: str, target: Path, size: int, expected: str, by_hand: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    partial = Path(name)
    try:
        logging.info("Downloading %s (%d MB) to %s", url, size // 10**6, target)
        digest = hashlib.sha256()
        received = 0
        with (
            os.fdopen(handle, "wb") as file,
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
        ):
            # Stop beyond the published size: a server could send data forever.
            while received <= size and (chunk := response.read(_CHUNK_BYTES)):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
        if received != size or digest.hexdigest() != expected:
            found = f"more than {size:,}" if received > size else f"{received:,}"
            raise UserError(
                f"directory: {target} is missing, and {url} sent {found} bytes with SHA-256 "
                f"{digest.hexdigest()} instead of {size:,} bytes with SHA-256 {expected}; {by_hand}"
            )
        partial.chmod(0o644)  # only the owner can read a temporary file
        partial.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"directory: {target} is missing and could not be downloaded ({error}); {by_hand}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    logging.info("Downloaded %s", target)
