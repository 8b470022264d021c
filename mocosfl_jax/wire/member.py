"""The client: it holds its images, and computes what the contract says."""

import random
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc
import jax
import numpy as np

from mocosfl_jax.errors import UserError
from mocosfl_jax.feed.partition import client_indices
from mocosfl_jax.wire import codec, messages
from mocosfl_jax.wire.contract import Programs, Terms, read_contract

Say = Callable[[str], None]
ReadImages = Callable[[int], np.ndarray]  # the size in pixels -> [n, size, size, 3] uint8

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts to reach the server
_KEEPALIVE_MS = 20_000
# What the server says of a client that will never do; it is not asked again.
_FINAL = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}


class Member(NamedTuple):
    """The state of a client. Trees are lists of their arrays."""

    params: list[Any]
    key_params: list[Any]
    opt_state: list[Any]
    step: int = 0  # of the last forward pass
    query: Any = None  # its query views


class Access(NamedTuple):
    """How a client reaches its server."""

    address: str  # HOST:PORT
    credentials: grpc.ChannelCredentials | None  # None: without encryption
    platform: str  # of the device that computes, as in `jax.Device.platform`
    patience: float  # seconds for which the server may be away


def take_part(access: Access, read: ReadImages, client: int | None, say: Say) -> None:
    """Take part in a training until it is finished, and come back whenever the connection breaks.

    Args:
      access: of the server.
      read: the size of images in pixels -> [n, size, size, 3] uint8. They stay here.
      client: the wanted number; None: any.
      say: prints a line.

    Raises:
      UserError: if the server refuses this client, or is away for too long.
    """
    read = lru_cache(1)(read)
    number, here = client, False

    def welcomed(given: int) -> None:
        nonlocal number, here
        number, here = given, True

    pause, last = _SHORTEST_PAUSE, time.monotonic()
    while True:
        here = False
        try:
            if stay(access, read, number, welcomed, say):
                return
            reason = "the server has ended the stream"
        except grpc.RpcError as error:
            code, details = error.code(), " ".join((error.details() or "").split())
            if code in _FINAL:
                raise UserError(f"{access.address}: {details}") from error
            if "handshake failed" in details.lower() or "certificate" in details.lower():
                raise UserError(
                    f"--tls: {access.address} and this client refuse each other's certificates ({details})"
                ) from error
            reason = details or code.name
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:  # so says a server that has waited for this client
                last = time.monotonic()
        except codec.Misfit as error:
            raise UserError(f"{access.address}: sent what does not fit: {error}") from error
        if here:  # it was there until now
            pause, last = _SHORTEST_PAUSE, time.monotonic()
        if time.monotonic() - last > access.patience:
            raise UserError(f"--server: {access.address} was away for {access.patience:.0f} s ({reason})")
        say(f"{reason}; trying again in {pause:.1f} s")
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE)


def stay(
    access: Access, read: ReadImages, client: int | None, welcomed: Callable[[int], None], say: Say
) -> bool:
    """Serve one stream until it ends.

    Args:
      access: of the server.
      read: as for `take_part`.
      client: the wanted number.
      welcomed: receives the number that the server gives.
      say: prints a line.

    Returns:
      Whether the training is finished.

    Raises:
      grpc.RpcError: if the connection breaks, or the server refuses this client.
      UserError: if the client cannot do what the server asks for.
    """
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    channel = (
        grpc.insecure_channel(access.address, options)
        if access.credentials is None
        else grpc.secure_channel(access.address, access.credentials, options)
    )
    outgoing: SimpleQueue[Any] = SimpleQueue()
    with channel:
        train = channel.stream_stream(
            f"/{messages.SERVICE}/Train",
            request_serializer=messages.FromClient.SerializeToString,
            response_deserializer=messages.ToClient.FromString,
        )
        hello = messages.Hello(protocol=messages.PROTOCOL, client_id=client)
        outgoing.put(messages.FromClient(hello=hello))
        incoming = train(iter(outgoing.get, None))
        try:
            return follow(incoming, outgoing.put, read, access.platform, welcomed, say)
        finally:
            outgoing.put(None)


def follow(
    incoming: Iterator[Any],
    send: Callable[[Any], None],
    read: ReadImages,
    platform: str,
    welcomed: Callable[[int], None],
    say: Say,
) -> bool:
    """Do what the server's messages say, in their order; see `stay`."""
    client = 0
    programs: Programs | None = None
    terms: Terms | None = None
    member = Member([], [], [])
    deal: Callable[[int], np.ndarray] | None = None
    images = np.zeros((0,), np.uint8)
    for message in incoming:
        kind = message.WhichOneof("content")
        if kind == "welcome":
            client = int(message.welcome.client_id)
            welcomed(client)
            images = read(message.welcome.image_size)
            if len(images) < message.welcome.batch_size:
                least = message.welcome.batch_size
                raise UserError(f"--data: found {len(images)} images, allowed: {least} or more")
            send(messages.FromClient(holding=messages.Holding(images=len(images))))
            say(f"this is client {client}, with {len(images):,} images; waiting for the others")
        elif kind == "contract":
            contract, terms, programs = read_contract(message.contract, platform)
            deal = dealer(len(images), client, terms)
            say(summary(terms, contract.digest))
            send(messages.FromClient(ready=messages.Ready(digest=contract.digest)))
        elif kind == "goodbye":
            say(message.goodbye.text)
            return True
        elif programs is None or terms is None or deal is None:
            raise UserError(f"server: sent {kind} before a contract")
        elif kind == "load":
            member = load(member, message.load, terms)
        elif kind == "forward":
            step, place = message.forward.step, message.forward.place
            key_params, query, key, views = programs.forward(
                member.params,
                member.key_params,
                images[deal(step)],
                np.array(terms.rng, np.uint32),
                np.int32(step),
                np.int32(place),
            )
            member = member._replace(key_params=key_params, step=step, query=views)
            smashed = [codec.pack(np.asarray(x), terms.smashed) for x in (query, key)]
            send(
                messages.FromClient(
                    number=message.number, smashed=messages.Smashed(query=smashed[0], key=smashed[1])
                )
            )
        elif kind == "backward":
            assert programs.backward is not None
            gradient = codec.unpack(message.backward.gradient, terms.smashed)
            params, opt_state = programs.backward(
                member.params, member.opt_state, member.query, gradient, np.int32(member.step)
            )
            member = member._replace(params=params, opt_state=opt_state)
        elif kind == "collect":
            parts = {
                part: codec.pack_leaves(jax.device_get(getattr(member, part)))
                for part in messages.PARTS
                if getattr(message.collect, part)
            }
            send(messages.FromClient(number=message.number, state=messages.State(**parts)))
        else:
            raise UserError(f"server: sent {kind}, which this version does not know")
    return False


def dealer(count: int, client: int, terms: Terms) -> Callable[[int], np.ndarray]:
    """A function from a step of the run to the client's images in it, [B], as the simulation deals them."""
    dealt: dict[int, np.ndarray] = {}

    def deal(step: int) -> np.ndarray:
        epoch, within = divmod(step, terms.steps_per_epoch)
        if epoch not in dealt:
            dealt.clear()
            dealt[epoch] = client_indices(
                np.arange(count),
                client,
                terms.batch_size,
                steps=terms.steps_per_epoch,
                seed=terms.seed,
                epoch=epoch,
            )
        return dealt[epoch][within]

    return deal


def load(member: Member, message: Any, terms: Terms) -> Member:
    """The client's state with the parts that the server has sent."""
    parts: dict[str, Any] = {
        part: codec.unpack_leaves(getattr(message, part), terms.shapes(part))
        for part in messages.PARTS
        if message.HasField(part)
    }
    member = member._replace(**parts)
    if message.reset:
        member = member._replace(opt_state=[np.zeros_like(leaf) for leaf in member.opt_state])
    return member


def summary(terms: Terms, digest: bytes) -> str:
    """What the contract says, in one line."""
    form = terms.smashed
    name, cut = terms.network.get("name", "an own network"), terms.network.get("cut_layer")
    return (
        f"contract {digest.hex()[:12]}, one of {terms.num_clients:,} clients: {name} cut at {cut}, "
        f"{terms.image_size} px, batch {terms.batch_size}; sends 2 x {form.nbytes:,} bytes a step as "
        f"{form.sent_as}; {terms.epochs} epochs of {terms.steps_per_epoch} steps"
    )
