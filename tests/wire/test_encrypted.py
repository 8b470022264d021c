"""With mutual TLS: a certificate lets in, so many times a minute; strangers by the thousand stay outside."""

import contextlib
import os
import pathlib
import resource
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.wire import certificates, messages
from mocosfl_jax.wire import hub as hubs
from mocosfl_jax.wire.hub import Hub, Rules, listening
from mocosfl_jax.wire.member import Access, take_part

LARGEST = 10_000
STRANGERS = 2_000


class Server(NamedTuple):
    hub: Hub
    port: int
    tls: pathlib.Path  # certificates of its federation
    other: pathlib.Path  # and those of another


@pytest.fixture
def server(tmp_path: pathlib.Path) -> Iterator[Server]:
    tls, other = tmp_path / "tls", tmp_path / "other"
    for folder in (tls, other):
        certificates.make_folder(folder, ["localhost", "127.0.0.1"], 2)
    hub = Hub(Rules(num_clients=2, batch_size=2, image_size=8, authenticated=True), lambda line: None)
    with listening(hub, "127.0.0.1:0", certificates.server_credentials(tls), LARGEST) as port:
        yield Server(hub, port, tls, other)


def come(server: Server, client: int) -> int | tuple[grpc.StatusCode, str]:
    """Open a stream and leave again: the number that the server gives, or its refusal."""
    credentials = certificates.client_credentials(server.tls, client)
    with grpc.secure_channel(f"localhost:{server.port}", credentials) as channel:
        call = channel.stream_stream(
            f"/{messages.SERVICE}/Train",
            request_serializer=messages.FromClient.SerializeToString,
            response_deserializer=messages.ToClient.FromString,
        )
        hello = messages.Hello(protocol=messages.PROTOCOL)
        try:
            return int(next(call(iter([messages.FromClient(hello=hello)]))).welcome.client_id)
        except grpc.RpcError as error:
            return error.code(), error.details()


def test_a_certificate_opens_so_many_streams_a_minute(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [come(server, 0) for _ in range(hubs.STREAMS)] == [0] * hubs.STREAMS
    assert come(server, 0) == (
        grpc.StatusCode.UNAVAILABLE,
        f"client 0 has come {hubs.STREAMS} times within 60 s",
    )
    assert come(server, 1) == 1
    monkeypatch.setattr(hubs, "STREAM_SECONDS", 0.0)
    assert come(server, 0) == 0


def encryption(server: Server, certificate: pathlib.Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(server.tls / "authority.pem"))
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        own = certificate / "client-0" / "client-0"
        context.load_cert_chain(f"{own}.pem", f"{own}.key")
    return context


def test_a_connection_that_breaks_in_the_handshake_is_tried_again(tmp_path: pathlib.Path) -> None:
    """As when the server is killed, or behind a tunnel whose end is away."""
    certificates.make_folder(tmp_path / "tls", ["localhost"], 1)
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as breaking:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    breaking.accept()[0].close()

        threading.Thread(target=accept, daemon=True).start()
        credentials = certificates.client_credentials(tmp_path / "tls", 0)
        access = Access(f"localhost:{breaking.getsockname()[1]}", credentials, "cpu", patience=1.0)
        with pytest.raises(UserError, match="was away for 1 s"):
            take_part(access, lambda size: np.zeros((2, size, size, 3), np.uint8), 0, said.append)
        breaking.shutdown(socket.SHUT_RDWR)
    assert any("trying again" in line for line in said)


def test_a_client_is_admitted_once_at_a_time(server: Server) -> None:
    """However many streams it opens, others find room."""
    credentials = certificates.client_credentials(server.tls, 0)
    channels, calls = [], []
    for _ in range(hubs.SPARE_STREAMS + 4):
        channels.append(grpc.secure_channel(f"localhost:{server.port}", credentials))
        call = channels[-1].stream_stream(
            f"/{messages.SERVICE}/Train",
            request_serializer=messages.FromClient.SerializeToString,
            response_deserializer=messages.ToClient.FromString,
        )
        said: SimpleQueue[Any] = SimpleQueue()
        said.put(messages.FromClient(hello=messages.Hello(protocol=messages.PROTOCOL)))
        calls.append(call(iter(said.get, None)))
        assert next(calls[-1]).welcome.client_id == 0  # and then it says nothing
    assert come(server, 1) == 1
    with pytest.raises(grpc.RpcError) as caught:
        next(calls[0])
    error: Any = caught.value
    assert error.details() == "comes back"
    for channel in channels:
        channel.close()


def knock(server: Server, context: ssl.SSLContext | None) -> bytes:
    """Connect as a stranger does, and say something: what the server answers."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 5) as plain:
        if context is None:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
            return plain.recv(1 << 16)
        with context.wrap_socket(plain, server_hostname="localhost") as encrypted:
            encrypted.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            return encrypted.recv(1 << 16)
    return b""


def descriptors() -> int:
    return len(os.listdir("/dev/fd"))


def peak_mib() -> float:
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)


def test_thousands_of_strangers_leave_the_server_as_it_was(server: Server) -> None:
    """Without TLS, without a certificate, and with one of another authority."""
    kinds = [None, encryption(server, None), encryption(server, server.other)]
    assert come(server, 0) == 0
    assert knock(server, encryption(server, server.tls)) != b""  # who is no stranger is answered
    for attempt in range(60):
        assert knock(server, kinds[attempt % 3]) == b""
    memory, files = peak_mib(), descriptors()
    for attempt in range(STRANGERS):
        assert knock(server, kinds[attempt % 3]) == b""
    end = time.monotonic() + 20
    while descriptors() > files and time.monotonic() < end:
        time.sleep(0.05)
    assert descriptors() <= files
    assert peak_mib() - memory < 32
    assert come(server, 1) == 1
    assert set(server.hub.images) == set()
