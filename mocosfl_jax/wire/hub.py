"""The server's connections: clients come, answer, fall silent and come back.

gRPC runs in a thread of its own. Training asks the clients and waits for their answers. The protocol goes in
lockstep: a client has at most one request to answer, so whatever else it sends ends its stream.
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import grpc
from google.protobuf.message import DecodeError

from mocosfl_jax.errors import UserError, one_line, printable
from mocosfl_jax.training.workdir import MOST_IMAGES
from mocosfl_jax.wire import messages
from mocosfl_jax.wire.contract import Contract

T = TypeVar("T")

HELLO_SECONDS = 10.0  # then a stream that has not said who it is ends
HOLDING_SECONDS = 600.0  # a client reads its pictures meanwhile
READY_SECONDS = 600.0  # a client compiles meanwhile
# Messages that wait for a slow client. More end its stream: what it still could answer is of no use.
WAITING = 8
# Streams beyond one for each client, such as of clients that come back before their old stream has ended.
SPARE_STREAMS = 16
# How often the holder of a certificate may open a stream, and in how many seconds. More are turned away.
STREAMS, STREAM_SECONDS = 30, 60.0
_GRACE = 5.0  # seconds for streams to end when the server stops
# A connection over which nothing comes for so long is tried, and then given up.
KEEPALIVE_MS = 20_000


class Rules(NamedTuple):
    """Whom the server admits."""

    num_clients: int  # N
    batch_size: int  # B, the images that a client holds at least
    image_size: int  # pixels a side, to which a client resizes its pictures
    authenticated: bool  # whether a certificate says which client it is


@dataclasses.dataclass
class Peer:
    """A connected client."""

    client: int
    outgoing: asyncio.Queue
    ended: asyncio.Future  # a `Refused`, once the client is given up
    ready: bool = False  # it has accepted the contract
    current: bool = False  # it holds the state that the server believes it to hold
    number: int = 0  # of the last request
    answer: asyncio.Future | None = None  # the one that is awaited, also if it is late


class Refused(Exception):
    """A client is turned away, with a gRPC status and one line."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Hub:
    """The clients that are connected. Its public methods may be called from any one thread."""

    def __init__(
        self, rules: Rules, say: Callable[[str], None], images: Mapping[int, int] | None = None
    ) -> None:
        """Make a hub without clients.

        Args:
          rules: whom it admits.
          say: prints a line.
          images: how many each client holds, from an earlier start of the run. Then it comes with as many, or
            is refused.
        """
        self.rules = rules
        self.images = dict(images or {})  # of each client that has ever joined
        self.traffic: Counter[str] = Counter()  # bytes of messages, by direction and kind
        self.arrays: Counter[str] = Counter()  # bytes of the arrays in them
        self._say = say
        self._peers: dict[int, Peer] = {}
        # Clients that are being admitted, with what ends their admission.
        self._coming: dict[int, asyncio.Future] = {}
        self._opened: dict[int, deque[float]] = {}  # when each certificate opened its latest streams
        self._fixed = bool(images)  # whether the numbers of images may no longer change
        self._contract: Contract | None = None
        self._goodbye: Any = None  # the last message, once training is finished
        self._told: set[int] = set()  # clients that have been sent it
        self._offered = asyncio.Event()  # a contract or a goodbye
        self._changed = threading.Event()
        self._loop = asyncio.new_event_loop()

    # --- for the thread that trains

    def offer(self, contract: Contract) -> None:
        """Send the contract to all clients that are connected, and to those that will come."""

        async def set_contract() -> None:
            self._contract = contract
            self._offered.set()

        self._run(set_contract())

    def fix(self) -> dict[int, int]:
        """Settle how many images each client holds; from now on it comes with as many, or is refused.

        Returns:
          The numbers, by client.
        """

        async def settle() -> dict[int, int]:
            self._fixed = True
            return dict(self.images)

        return self._run(settle())

    def finish(self, text: str, count: int, seconds: float) -> None:
        """Tell all clients that training is finished, also those that come only now, and wait for them.

        Args:
          text: what they print.
          count: how many clients there are.
          seconds: for which to wait at most.
        """

        async def say_goodbye() -> None:
            self._goodbye = messages.ToClient(goodbye=messages.Goodbye(text=text))
            self._offered.set()
            for peer in list(self._peers.values()):
                if peer.ready:
                    self._send(peer, self._goodbye)
                    self._told.add(peer.client)

        self._run(say_goodbye())
        end = time.monotonic() + seconds
        while (self._peers or len(self._told) < count) and time.monotonic() < end:
            self.wait(0.1)

    def ready(self) -> set[int]:
        """The clients that could be asked now."""

        async def find() -> set[int]:
            return {client for client, peer in self._peers.items() if peer.ready and _idle(peer)}

        return self._run(find())

    def wait(self, seconds: float) -> None:
        """Wait until a client comes or goes or answers late, at most for some seconds."""
        self._changed.wait(seconds)
        self._changed.clear()

    def current(self, client: int) -> bool:
        """Whether a client holds the state that it should hold."""
        peer = self._peers.get(client)
        return peer is not None and peer.current

    def load(self, client: int, state: Any) -> None:
        """Send a client all of its state. From then on it is current, unless it is connected anew."""

        async def send() -> None:
            if (peer := self._peers.get(client)) is not None and peer.ready:
                self._send(peer, state)
                peer.current = True

        self._run(send())

    def doubt(self, client: int) -> None:
        """Note that a client has missed something, so that it will get its state anew."""
        if (peer := self._peers.get(client)) is not None:
            peer.current = False

    def tell(self, news: Mapping[int, Any]) -> None:
        """Send each client that is current a message that needs no answer."""

        async def send() -> None:
            for client, message in news.items():
                if (peer := self._peers.get(client)) is not None and peer.current:
                    self._send(peer, message)

        self._run(send())

    def ask(self, requests: Mapping[int, Any], seconds: float) -> dict[int, Any]:
        """Send each client that is current a request, and wait for the answers.

        Args:
          requests: `ToClient` messages, by client.
          seconds: after which a client's answer is too late.

        Returns:
          The answers of those that have answered.
        """

        async def gather() -> dict[int, Any]:
            asked: dict[int, asyncio.Future] = {}
            for client, message in requests.items():
                peer = self._peers.get(client)
                if peer is None or not peer.current or not _idle(peer):
                    continue
                peer.number += 1
                message.number = peer.number
                peer.answer = asked[client] = self._loop.create_future()
                self._send(peer, message)
            if asked:
                await asyncio.wait(asked.values(), timeout=seconds)
            return {
                client: answer.result()
                for client, answer in asked.items()
                if answer.done() and not answer.cancelled() and answer.exception() is None
            }

        return self._run(gather())

    def drop(self, client: int, reason: str) -> None:
        """End the stream of a client that has sent what does not fit."""

        async def end() -> None:
            if (peer := self._peers.get(client)) is not None:
                self._end(peer, reason, grpc.StatusCode.INVALID_ARGUMENT)

        self._run(end())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # --- in the thread of gRPC

    def _send(self, peer: Peer, message: Any) -> None:
        try:
            peer.outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self._end(peer, "does not take its messages")

    def _end(self, peer: Peer, reason: str, code: grpc.StatusCode = grpc.StatusCode.CANCELLED) -> None:
        """Forget a client, and end its stream."""
        if self._peers.get(peer.client) is peer:
            del self._peers[peer.client]
            self._say(f"client {peer.client}: {reason}; {len(self._peers)} are connected")
        if peer.answer is not None and not peer.answer.done():
            peer.answer.cancel()
        if not peer.ended.done():
            peer.ended.set_result(Refused(code, reason))
        self._changed.set()

    async def train(self, _: Any, context: Any) -> None:
        """Serve the stream of one client."""
        try:
            client = await self._admit(context)
            before = self._peers.get(client)
            if before is not None:
                self._end(before, "comes back")
            peer = self._peers[client] = Peer(client, asyncio.Queue(WAITING), self._loop.create_future())
            self._say(f"client {client}: {self.images[client]:,} images; {len(self._peers)} are connected")
            self._changed.set()
            try:
                await self._serve(peer, context)
            except Exception as error:
                self._end(peer, error.reason if isinstance(error, Refused) else one_line(error))
                raise
            finally:
                self._end(peer, "left")
        except Refused as error:
            await context.abort(error.code, error.reason)

    async def _admit(self, context: Any) -> int:
        """The number of a client that has said who it is and how many images it holds."""
        with contextlib.ExitStack() as stack:
            certified, ended = None, self._loop.create_future()
            if self.rules.authenticated:
                certified = self._certified(context)
                self._limit(certified)
                stack.enter_context(self._only(certified, ended))  # a silent stream takes no second place
            hello = (await self._unless(ended, self._read(context, "hello", HELLO_SECONDS))).hello
            if hello.protocol != messages.PROTOCOL:
                raise Refused(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"protocol: found {hello.protocol}, allowed: {messages.PROTOCOL}; update the older side",
                )
            client = self._number(hello, certified)
            if certified is None:
                stack.enter_context(self._only(client, ended))
            self.images[client] = await self._holding(client, context, ended)
            return client

    @contextlib.contextmanager
    def _only(self, client: int, ended: asyncio.Future) -> Iterator[None]:
        """Be the one stream of a client that is not admitted yet. A newer one sets `ended`."""
        if (before := self._coming.get(client)) is not None and not before.done():
            before.set_result(Refused(grpc.StatusCode.CANCELLED, "comes back"))
        self._coming[client] = ended
        try:
            yield
        finally:
            if self._coming.get(client) is ended:
                del self._coming[client]

    async def _unless(self, ended: asyncio.Future, reading: Coroutine[Any, Any, T]) -> T:
        """What is read, or raise what ends the stream before."""
        read = asyncio.ensure_future(reading)
        try:
            await asyncio.wait({read, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise ended.result()
            return read.result()
        finally:
            read.cancel()
            await asyncio.gather(read, return_exceptions=True)

    async def _holding(self, client: int, context: Any, ended: asyncio.Future) -> int:
        """How many images a client holds; `ended` ends the wait for it."""
        precondition = grpc.StatusCode.FAILED_PRECONDITION
        size, batch_size = self.rules.image_size, self.rules.batch_size
        welcome = messages.Welcome(client_id=client, image_size=size, batch_size=batch_size)
        await self._write(context, messages.ToClient(welcome=welcome))
        holding = (await self._unless(ended, self._read(context, "holding", HOLDING_SECONDS))).holding
        known = self.images.get(client)
        if not batch_size <= holding.images <= MOST_IMAGES:
            raise Refused(
                precondition,
                f"images: found {holding.images:,}, allowed: {batch_size:,} to {MOST_IMAGES:,}",
            )
        if self._fixed and known != holding.images:
            raise Refused(
                precondition,
                f"images: found {holding.images}, allowed: {known}, as when the training began",
            )
        images: int = holding.images
        return images

    def _certified(self, context: Any) -> int:
        """The number in the name of a client's certificate."""
        names = context.auth_context().get("x509_common_name", [b""])
        name = printable(names[0].decode("utf-8", "replace"))
        kind, _, number = name.partition("-")
        if kind != "client" or not number.isdecimal():
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED,
                f"certificate: found the name {name!r}, allowed: client-NUMBER",
            )
        return int(number)

    def _limit(self, certified: int) -> None:
        """Turn away a client that opens streams all the time."""
        now = time.monotonic()
        opened = self._opened.setdefault(certified, deque(maxlen=STREAMS))
        if len(opened) == STREAMS and now - opened[0] < STREAM_SECONDS:
            raise Refused(
                grpc.StatusCode.UNAVAILABLE,
                f"client {certified} has come {STREAMS} times within {STREAM_SECONDS:.0f} s",
            )
        opened.append(now)

    def _number(self, hello: Any, certified: int | None) -> int:
        """The number of a client: by its certificate, by its wish, or the first that is free."""
        denied = grpc.StatusCode.PERMISSION_DENIED
        wish = hello.client_id if hello.HasField("client_id") else None
        if certified is not None:
            if wish is not None and wish != certified:
                raise Refused(denied, f"client_id: found {wish}, allowed: {certified}, as in the certificate")
            wish = certified
        if wish is None:
            taken = self._coming.keys() | self._peers.keys()
            away = [client for client in range(self.rules.num_clients) if client not in taken]
            if not away:
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "client_id: found none, and all are taken")
            return min(away, key=lambda client: client in self.images)  # first those that never came
        if wish >= self.rules.num_clients:
            raise Refused(denied, f"client_id: found {wish}, allowed: 0 to {self.rules.num_clients - 1}")
        if not self.rules.authenticated and wish in self._coming.keys() | self._peers.keys():
            raise Refused(grpc.StatusCode.UNAVAILABLE, f"client_id: {wish} is connected already")
        return wish

    async def _serve(self, peer: Peer, context: Any) -> None:
        answer = asyncio.ensure_future(context.read())
        offered = asyncio.ensure_future(self._offered.wait())
        try:
            await self._first(peer, answer, offered)
            contract = self._contract
            if self._goodbye is not None:
                await self._leave_taking(peer, context)
                return
            if contract is None:
                self._expect(answer.result(), None)
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "message: found one before the contract")
            offer = messages.Contract(
                terms=contract.terms,
                forward=contract.forward,
                backward=contract.backward,
                digest=contract.digest,
            )
            await self._write(context, messages.ToClient(contract=offer))
            await self._first(peer, answer, seconds=READY_SECONDS)
            if not answer.done():
                raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "contract: not answered in time")
            ready = self._expect(answer.result(), "ready").ready
        finally:
            answer.cancel()
            offered.cancel()
            await asyncio.gather(answer, offered, return_exceptions=True)
        if ready.digest != contract.digest:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, "contract: found another digest")
        if self._goodbye is not None:
            await self._leave_taking(peer, context)
            return
        peer.ready = True
        self._changed.set()
        tasks = [
            asyncio.ensure_future(work) for work in (self._answers(peer, context), self._news(peer, context))
        ]
        try:
            await self._first(peer, *tasks)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _leave_taking(self, peer: Peer, context: Any) -> None:
        """Tell a client that has come too late to train that training is finished."""
        await self._write(context, self._goodbye)
        self._told.add(peer.client)

    async def _first(self, peer: Peer, *work: asyncio.Future, seconds: float | None = None) -> None:
        """Wait until some of the work is done, or for some seconds, unless the client is given up."""
        await asyncio.wait({*work, peer.ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if peer.ended.done():
            raise peer.ended.result()

    async def _news(self, peer: Peer, context: Any) -> None:
        while True:
            await self._write(context, await peer.outgoing.get())

    async def _answers(self, peer: Peer, context: Any) -> None:
        while True:
            message = self._expect(await context.read(), None)
            answer = peer.answer
            if answer is None or message.number != peer.number:
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"number: found {message.number}, which was not asked for",
                )
            peer.answer = None
            if not answer.done():
                answer.set_result(message)
            self._changed.set()  # it may be asked again, also if this came too late for its step

    async def _write(self, context: Any, message: Any) -> None:
        self._count("down", message)
        await context.write(message)

    async def _read(self, context: Any, kind: str, seconds: float) -> Any:
        try:
            return self._expect(await asyncio.wait_for(context.read(), seconds), kind)
        except TimeoutError as error:
            raise Refused(grpc.StatusCode.DEADLINE_EXCEEDED, f"{kind}: not received in time") from error

    def _expect(self, message: Any, kind: str | None) -> Any:
        """A message of that kind, counted."""
        if message is grpc.aio.EOF:
            raise Refused(grpc.StatusCode.CANCELLED, "left")
        if message is None:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT, "message: found bytes that are none, allowed: protobuf"
            )
        found = message.WhichOneof("content")
        if found is None:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "message: found none, allowed: one")
        if kind is not None and found != kind:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"message: found {found}, allowed: {kind}")
        self._count("up", message)
        return message

    def _count(self, direction: str, message: Any) -> None:
        kind = f"{direction} {message.WhichOneof('content')}"
        self.traffic[kind] += message.ByteSize()
        self.arrays[kind] += messages.array_bytes(message)


def _parsed(data: bytes) -> Any:
    """A client's message; None if the bytes are none. An error here would be logged with its traceback."""
    try:
        return messages.FromClient.FromString(data)
    except DecodeError:
        return None


def _idle(peer: Peer) -> bool:
    return peer.answer is None


@contextlib.contextmanager
def listening(
    hub: Hub, address: str, credentials: grpc.ServerCredentials | None, largest: int
) -> Iterator[int]:
    """Accept clients at an address while the context lasts.

    Args:
      hub: which serves them.
      address: HOST:PORT; port 0 stands for any that is free.
      credentials: of TLS; None: without encryption.
      largest: bytes of the largest message of a client.

    Yields:
      The port.

    Raises:
      UserError: if the address cannot be used.
    """
    options = [
        ("grpc.max_receive_message_length", largest),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", hub.rules.num_clients + SPARE_STREAMS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
        # Clients try a quiet connection as often as the server does; by default that would be too often.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.so_reuseport", 0),
    ]
    started: Any = None

    async def start() -> tuple[Any, int]:
        server = grpc.aio.server(
            options=options, maximum_concurrent_rpcs=hub.rules.num_clients + SPARE_STREAMS
        )
        handler = grpc.stream_stream_rpc_method_handler(
            hub.train,
            request_deserializer=_parsed,
            response_serializer=messages.ToClient.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler(messages.SERVICE, {"Train": handler})
        server.add_generic_rpc_handlers((service,))
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        await server.start()
        return server, port

    async def stop(server: Any) -> None:
        """End all streams, so that none is destroyed in the middle of its work."""
        for peer in list(hub._peers.values()):
            hub._end(peer, "the server stops", grpc.StatusCode.UNAVAILABLE)
        await server.stop(_GRACE)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:
            await asyncio.wait(rest, timeout=_GRACE)

    thread = threading.Thread(target=hub._loop.run_forever, name="gRPC", daemon=True)
    thread.start()
    try:
        try:
            started, port = hub._run(start())
        except RuntimeError as error:
            raise UserError(f"--listen: found {address}, which cannot be used ({one_line(error)})") from error
        yield port
    finally:
        if started is not None:
            hub._run(stop(started))
        hub._loop.call_soon_threadsafe(hub._loop.stop)
        thread.join()
        hub._loop.close()
