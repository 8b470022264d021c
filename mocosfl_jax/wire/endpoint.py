"""Addresses and certificates as flags give them, checked before anything that is slow to import."""

import importlib.util
import ipaddress
from pathlib import Path

from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import user_path


def checked_address(name: str, text: str | None) -> str:
    """Return HOST:PORT.

    Raises:
      UserError: if it is missing, or no such address.
    """
    if text is None:
        raise UserError(f"{name} is missing; allowed: {name}=HOST:PORT")
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(f"{name}: found {text!r}, allowed: HOST:PORT, such as 127.0.0.1:8000")
    return text


def checked_tls(folder: str | None, insecure: bool, address: str) -> Path | None:
    """Return the folder of the certificates; None for a connection without them, on this machine.

    Raises:
      UserError: if neither or both are given, or the address is that of another machine.
    """
    if insecure == (folder is not None):
        raise UserError("found neither --tls nor --insecure, or both, allowed: one of them")
    if folder is not None:
        return user_path("--tls", folder)
    host = address.rpartition(":")[0].strip("[]")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise UserError(
            f"--insecure: found {address}, allowed: an address of this machine, such as 127.0.0.1:8000"
        )
    return None


def require_wire() -> None:
    """Raise UserError unless the packages of the extra `wire` are installed."""
    modules = {
        "grpcio": "grpc",
        "protobuf": "google",
        "cryptography": "cryptography",
        "flatbuffers": "flatbuffers",
    }
    for package, module in modules.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"{package} is not installed; pip install 'mocosfl-jax[wire]'")
