"""Fetches one published file, and only that file."""

import contextlib
import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path

from absl import logging

from mocosfl_jax.errors import UserError

_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_line(path: Path, size: int, expected: str) -> str:
    """`path`; where that file has not this size and SHA-256, a remark is added and a warning logged."""
    if path.stat().st_size == size and _sha256(path) == expected:
        return str(path)
    logging.warning("%s is not the published file: its images may differ, e.g. be encoded anew", path)
    return f"{path} (not the published file)"


def download(url: str, target: Path, size: int, expected: str) -> None:
    """Writes `url` to `target`, which appears only when it has this size and this SHA-256.

    Raises UserError that says which file to put where, without leaving a partial file.
    """
    by_hand = f"get {url} by other means and put it there"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        raise UserError(f"config.data.dir: {target} cannot be written ({error}); {by_hand}") from error
    partial = Path(name)
    try:
        logging.info("Downloading %s (%d MB) to %s", url, size // 10**6, target)
        digest = hashlib.sha256()
        received = 0
        with (
            os.fdopen(handle, "wb") as file,
            urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
        ):
            # Not beyond the published size: a server could send without end.
            while received <= size and (chunk := response.read(_CHUNK_BYTES)):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
        if received != size or digest.hexdigest() != expected:
            found = f"more than {size:,}" if received > size else f"{received:,}"
            raise UserError(
                f"config.data.dir: {target} is missing, and {url} answered with {found} bytes "
                f"of SHA-256 {digest.hexdigest()}, published are {size:,} bytes of {expected}; {by_hand}"
            )
        partial.chmod(0o644)  # a temporary file is private
        partial.replace(target)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"config.data.dir: {target} is missing and could not be downloaded ({error}); {by_hand}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    logging.info("Downloaded %s", target)
