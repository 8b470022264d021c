"""Certificates for TLS: an authority of the federation's own, the server's and one for each client.

A client is who its certificate says: its common name is `client-NUMBER`.
"""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mocosfl_jax.errors import UserError

AUTHORITY = "authority"
SERVER = "server"
DAYS = 365


class Signed(NamedTuple):
    """A private key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def make_folder(folder: Path, hosts: Sequence[str], num_clients: int) -> None:
    """Write the keys and certificates of a federation.

    The folder gets authority.pem and authority.key, server.pem and server.key, and for each client a folder
    client-NUMBER with authority.pem, client-NUMBER.pem and client-NUMBER.key, which is all that it needs.

    Args:
      folder: new or empty.
      hosts: names and addresses by which clients will reach the server.
      num_clients: N.

    Raises:
      UserError: if the folder holds files already, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--tls: {folder} is not empty, allowed: a new folder")
        authority = _sign("mocosfl-jax authority", None)
        _write(folder / AUTHORITY, authority)
        _write(folder / SERVER, _sign(SERVER, authority, hosts))
        for number in range(num_clients):
            own = folder / client_name(number)
            own.mkdir()
            (own / f"{AUTHORITY}.pem").write_bytes(_pem(authority.certificate))
            _write(own / client_name(number), _sign(client_name(number), authority))
    except OSError as error:
        raise UserError(f"--tls: {error}") from error


def client_name(number: int) -> str:
    """The common name of a client's certificate."""
    return f"client-{number}"


def server_credentials(folder: Path) -> grpc.ServerCredentials:
    """The server's side of TLS. Clients need a certificate of the same authority.

    Raises:
      UserError: if a file is missing or damaged, or a key and a certificate are not of each other.
    """
    key, chain, authority = _read(folder, SERVER)
    return grpc.ssl_server_credentials([(key, chain)], authority, require_client_auth=True)


def client_credentials(folder: Path, number: int | None) -> grpc.ChannelCredentials:
    """A client's side of TLS.

    Args:
      folder: the folder of one client, or that of the whole federation.
      number: of the client; None: the only one in the folder.

    Raises:
      UserError: if a file is missing or damaged, a key and a certificate are not of each other, or the folder
        has several clients.
    """
    if number is not None and (folder / client_name(number)).is_dir():
        folder = folder / client_name(number)
    names = sorted(path.stem for path in folder.glob("client-*.key"))
    if number is not None:
        names = [client_name(number)]
    if len(names) != 1:
        raise UserError(
            f"--tls: {folder} has keys of {len(names)} clients, allowed: 1, or --client_id=NUMBER"
        )
    key, chain, authority = _read(folder, names[0])
    return grpc.ssl_channel_credentials(authority, key, chain)


def _read(folder: Path, name: str) -> tuple[bytes, bytes, bytes]:
    """Read the key and the certificate of a side, and the authority's certificate.

    They are checked here, since gRPC would end the process, or say no more than that nobody answers.
    """
    paths = [folder / file for file in (f"{name}.key", f"{name}.pem", f"{AUTHORITY}.pem")]
    try:
        key, chain, authority = (path.read_bytes() for path in paths)
    except OSError as error:
        raise UserError(
            f"--tls: {error}; python -m mocosfl_jax.certificates makes the files of a federation"
        ) from error
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"--tls: {paths[0]}: found no private key, allowed: one in PEM") from error
    own = _certificate(paths[1], chain)
    _certificate(paths[2], authority)
    if own.public_key() != private.public_key():
        raise UserError(
            f"--tls: {paths[1]}: found the certificate of another key, allowed: that of {paths[0]}"
        )
    return key, chain, authority


def _certificate(path: Path, content: bytes) -> x509.Certificate:
    """The first certificate in a file, which must be valid today."""
    try:
        found = x509.load_pem_x509_certificates(content)[0]
    except (ValueError, IndexError) as error:
        raise UserError(f"--tls: {path}: found no certificate, allowed: one in PEM") from error
    if not found.not_valid_before_utc <= datetime.datetime.now(datetime.UTC) <= found.not_valid_after_utc:
        raise UserError(
            f"--tls: {path}: found a certificate from {found.not_valid_before_utc:%Y-%m-%d} to "
            f"{found.not_valid_after_utc:%Y-%m-%d}, allowed: one that is valid today"
        )
    return found


def _sign(name: str, authority: Signed | None, hosts: Sequence[str] = ()) -> Signed:
    """A new key and its certificate, signed by the authority, or by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if authority is None else authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
    )
    if authority is not None:
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if hosts:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False
        )
    return Signed(key, builder.sign(key if authority is None else authority.key, hashes.SHA256()))


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, signed: Signed) -> None:
    key = signed.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor = os.open(f"{path}.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key)
    Path(f"{path}.pem").write_bytes(_pem(signed.certificate))


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
