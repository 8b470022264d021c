"""The server turns away whoever does not fit, and goes on without whoever falls silent."""

import gc
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.wire import hub as hubs
from mocosfl_jax.wire import messages
from mocosfl_jax.wire.contract import Contract
from mocosfl_jax.wire.hub import Hub, Rules, listening
from mocosfl_jax.wire.member import Access, take_part
from tests.support.processes import free_port

CONTRACT = Contract("{}", b"forward", b"backward")
LARGEST = 10_000
STATE = messages.ToClient(load=messages.State(params=messages.Leaves(data=[b"state"])))


class Stream:
    """A client that says what a test tells it to say."""

    def __init__(self, port: int, serializer: Any = messages.FromClient.SerializeToString) -> None:
        self.outgoing: SimpleQueue[Any] = SimpleQueue()
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        )
        call = self.channel.stream_stream(
            f"/{messages.SERVICE}/Train",
            request_serializer=serializer,
            response_deserializer=messages.ToClient.FromString,
        )
        self.incoming = call(iter(self.outgoing.get, None))

    def say(self, **content: Any) -> None:
        self.outgoing.put(messages.FromClient(**content))

    def hear(self, kind: str) -> Any:
        message = next(self.incoming)
        assert message.WhichOneof("content") == kind
        return message

    def join(self, client: int | None = 0, images: int = 5) -> int:
        self.say(hello=messages.Hello(protocol=messages.PROTOCOL, client_id=client))
        number: int = self.hear("welcome").welcome.client_id
        self.say(holding=messages.Holding(images=images))
        return number

    def accept(self) -> None:
        self.say(ready=messages.Ready(digest=self.hear("contract").contract.digest))

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            for _ in self.incoming:
                pass
        error: Any = caught.value
        return error.code(), error.details()

    def close(self) -> None:
        self.outgoing.put(None)
        self.channel.close()


class Server:
    """A hub that listens, and its streams."""

    def __init__(self, hub: Hub, port: int, said: list[str]) -> None:
        self.hub, self.port, self.said = hub, port, said
        self.streams: list[Stream] = []

    def stream(self, **options: Any) -> Stream:
        self.streams.append(Stream(self.port, **options))
        return self.streams[-1]

    def ready(self, *clients: int) -> list[Stream]:
        """Streams of clients that have accepted the contract."""
        self.hub.offer(CONTRACT)
        streams = [self.stream() for _ in clients]
        for client, stream in zip(clients, streams, strict=True):
            stream.join(client)
            stream.accept()
        until(lambda: self.hub.ready() == set(clients))
        for client, stream in zip(clients, streams, strict=True):
            self.hub.load(client, STATE)
            stream.hear("load")
        return streams


@pytest.fixture
def server() -> Iterator[Server]:
    said: list[str] = []
    hub = Hub(Rules(num_clients=3, batch_size=2, image_size=8, authenticated=False), said.append)
    with listening(hub, "127.0.0.1:0", None, LARGEST) as port:
        found = Server(hub, port, said)
        yield found
        for stream in found.streams:
            stream.close()


def until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def forward(step: int = 0) -> Any:
    return messages.ToClient(forward=messages.Forward(step=step))


def test_answers_are_gathered_by_client(server: Server) -> None:
    streams = server.ready(0, 2)

    def answer(stream: Stream, data: bytes) -> None:
        request = stream.hear("forward")
        smashed = messages.Smashed(query=messages.Array(data=data))
        stream.say(number=request.number, smashed=smashed)

    threads = [
        threading.Thread(target=answer, args=(stream, data))
        for stream, data in zip(streams, (b"zero", b"two"), strict=True)
    ]
    for thread in threads:
        thread.start()
    answers = server.hub.ask({0: forward(), 1: forward(), 2: forward()}, 20.0)
    sent = {client: answer.smashed.query.data for client, answer in answers.items()}
    assert sent == {0: b"zero", 2: b"two"}


def test_a_silent_client_is_left_out_until_it_answers(server: Server) -> None:
    (stream,) = server.ready(1)
    assert server.hub.ask({1: forward()}, 0.2) == {}
    assert server.hub.ready() == set()  # it is still at work
    assert server.hub.ask({1: forward(1)}, 0.2) == {}  # so it is not asked
    stream.say(number=stream.hear("forward").number, smashed=messages.Smashed())
    until(lambda: server.hub.ready() == {1})


def test_a_client_that_leaves_ends_the_wait_for_it(server: Server) -> None:
    (stream,) = server.ready(1)
    threading.Timer(0.2, stream.close).start()
    start = time.monotonic()
    assert server.hub.ask({1: forward()}, 60.0) == {}
    assert time.monotonic() - start < 30
    assert any(line.startswith("client 1: ") for line in server.said)


@pytest.mark.parametrize(
    "hello, images, code, reason",
    [
        ({"protocol": 99}, 5, "FAILED_PRECONDITION", "protocol: found 99, allowed: 1"),
        ({"client_id": 3}, 5, "PERMISSION_DENIED", "client_id: found 3, allowed: 0 to 2"),
        ({}, 1, "FAILED_PRECONDITION", "images: found 1, allowed: 2 to 1,000,000"),
        ({}, 2**63, "FAILED_PRECONDITION", "images: found 9,223,372,036,854,775,808, allowed: 2 to"),
    ],
)
def test_who_does_not_fit_is_told_why(
    server: Server, hello: dict[str, int], images: int, code: str, reason: str
) -> None:
    stream = server.stream()
    stream.say(hello=messages.Hello(**{"protocol": messages.PROTOCOL, "client_id": 0} | hello))
    stream.say(holding=messages.Holding(images=images))
    found, details = stream.refusal()
    assert found.name == code and details.startswith(reason)
    assert not server.hub.images


def test_free_numbers_are_given_out_until_there_are_none(server: Server) -> None:
    assert [server.stream().join(None) for _ in range(3)] == [0, 1, 2]
    until(lambda: len(server.hub.images) == 3)
    late = server.stream()
    late.say(hello=messages.Hello(protocol=messages.PROTOCOL))
    assert late.refusal()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_number_is_connected_once(server: Server) -> None:
    server.ready(0)
    twin = server.stream()
    twin.say(hello=messages.Hello(protocol=messages.PROTOCOL, client_id=0))
    assert twin.refusal() == (grpc.StatusCode.UNAVAILABLE, "client_id: 0 is connected already")
    assert server.hub.ready() == {0}


def test_a_client_may_not_come_back_with_other_images(server: Server) -> None:
    """Once their number is settled, also before there is a contract."""
    first = server.stream()
    first.join(0, images=4)
    until(lambda: server.hub.images == {0: 4})
    first.close()
    server.stream().join(1, images=7)
    until(lambda: server.hub.images == {0: 4, 1: 7})
    assert server.hub.fix() == {0: 4, 1: 7}
    again = server.stream()
    again.join(0, images=6)
    assert again.refusal()[1].startswith("images: found 6, allowed: 4")
    good = server.stream()
    good.join(0, images=4)
    until(lambda: sum(line.startswith("client 0: 4 images") for line in server.said) == 2)


def test_a_server_that_starts_again_knows_the_numbers_of_images() -> None:
    rules = Rules(num_clients=1, batch_size=2, image_size=8, authenticated=False)
    with listening(Hub(rules, lambda line: None, {0: 5}), "127.0.0.1:0", None, LARGEST) as port:
        stream = Stream(port)
        stream.join(0, images=6)
        assert stream.refusal()[1].startswith("images: found 6, allowed: 5")
        stream.close()


def test_what_was_meant_for_a_broken_connection_does_not_reach_the_next(server: Server) -> None:
    (stream,) = server.ready(0)
    assert server.hub.current(0)
    stream.close()
    until(lambda: server.hub.ready() == set())
    again = server.stream()
    again.join(0)
    again.accept()
    until(lambda: server.hub.ready() == {0})
    assert not server.hub.current(0)
    server.hub.tell({0: messages.ToClient(backward=messages.Backward())})
    assert server.hub.ask({0: forward()}, 0.2) == {}
    server.hub.load(0, STATE)
    assert server.hub.current(0)
    server.hub.tell({0: messages.ToClient(backward=messages.Backward())})
    again.hear("load")
    again.hear("backward")


def test_everybody_hears_that_training_is_finished(server: Server) -> None:
    """Who trains, who has not accepted the contract yet, and who comes only now."""
    (trains,) = server.ready(0)
    late = server.stream()
    late.join(1)
    contract = late.hear("contract").contract
    finish = threading.Thread(target=server.hub.finish, args=("done", 3, 20.0))
    finish.start()
    assert trains.hear("goodbye").goodbye.text == "done"
    late.say(ready=messages.Ready(digest=contract.digest))
    late.hear("goodbye")
    assert finish.is_alive()
    new = server.stream()
    new.join(2)
    new.hear("goodbye")
    for stream in (trains, late, new):
        stream.close()
    finish.join(15)
    assert not finish.is_alive()


def test_a_finished_run_that_is_started_again_says_goodbye(server: Server) -> None:
    """It never has a contract."""
    stream = server.stream()
    stream.join(0)
    until(lambda: any(line.startswith("client 0: ") for line in server.said))
    finish = threading.Thread(target=server.hub.finish, args=("done", 1, 20.0))
    finish.start()
    stream.hear("goodbye")
    stream.close()
    finish.join(15)
    assert not finish.is_alive()


@pytest.mark.parametrize("number", [0, 1, 7])
def test_an_answer_that_was_not_asked_for_ends_the_stream(server: Server, number: int) -> None:
    (stream,) = server.ready(0)
    stream.say(number=number, smashed=messages.Smashed())
    assert stream.refusal()[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert server.hub.ready() == set()


def test_a_repeated_answer_ends_the_stream(server: Server) -> None:
    (stream,) = server.ready(0)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(server.hub.ask({0: forward()}, 20.0)))
    asking.start()
    number = stream.hear("forward").number
    for _ in range(2):
        stream.say(number=number, smashed=messages.Smashed())
    asking.join()
    assert list(answers[0]) == [0]
    assert stream.refusal()[0] is grpc.StatusCode.INVALID_ARGUMENT


def test_an_answer_without_content_ends_the_stream(server: Server) -> None:
    (stream,) = server.ready(0)
    asking = threading.Thread(target=server.hub.ask, args=({0: forward()}, 20.0))
    asking.start()
    stream.say(number=stream.hear("forward").number)
    assert stream.refusal() == (grpc.StatusCode.INVALID_ARGUMENT, "message: found none, allowed: one")
    asking.join()


def test_bytes_that_are_no_message_end_the_stream(server: Server) -> None:
    good, bad = server.ready(0)[0], server.stream(serializer=lambda data: data)
    bad.outgoing.put(b"\xff\xff\xff\xff not a message")
    assert bad.refusal() == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "message: found bytes that are none, allowed: protobuf",
    )
    assert server.hub.ready() == {0}
    good.close()


def test_a_client_that_vanishes_while_it_reads_its_pictures_is_no_error(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither is one whose bytes are no message: nothing is printed but lines of the server's own."""
    for _ in range(3):
        stream = server.stream()
        stream.say(hello=messages.Hello(protocol=messages.PROTOCOL, client_id=1))
        stream.hear("welcome")
        stream.incoming.cancel()
        stream.close()
    bad = server.stream(serializer=lambda data: data)
    bad.outgoing.put(b"\xff\xff\xff\xff not a message")
    bad.refusal()
    until(lambda: server.stream().join(1) == 1)
    gc.collect()  # an exception that nobody has asked for is logged when its task is collected
    assert not caplog.records


def test_a_message_that_is_too_large_ends_the_stream(server: Server) -> None:
    good, bad = server.ready(0, 1)
    bad.say(number=1, smashed=messages.Smashed(query=messages.Array(data=bytes(LARGEST))))
    assert bad.refusal()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    until(lambda: server.hub.ready() == {0})
    good.close()


def test_a_client_that_takes_no_messages_is_given_up(server: Server) -> None:
    """The queue of a client is bounded, and so is the memory of the server. Its stream ends."""
    (stream,) = server.ready(0)
    large = messages.ToClient(load=messages.State(params=messages.Leaves(data=[bytes(1 << 20)])))
    for _ in range(hubs.WAITING + 200):
        server.hub.tell({0: large})
        if not server.hub.ready():
            break
    assert server.hub.ready() == set()
    assert stream.refusal() == (grpc.StatusCode.CANCELLED, "does not take its messages")


def test_thousands_of_wrong_messages_leave_the_server_as_it_was(server: Server) -> None:
    server.ready(0)
    threads = threading.active_count()
    wrong = [
        messages.FromClient(),
        messages.FromClient(number=3, state=messages.State()),
        messages.FromClient(ready=messages.Ready(digest=b"x")),
        messages.FromClient(hello=messages.Hello(protocol=7)),
    ]
    for attempt in range(500):
        stream = Stream(server.port)
        for message in (wrong * 2)[attempt % 4 : attempt % 4 + 4]:
            stream.outgoing.put(message)
        stream.refusal()
        stream.close()
    assert server.hub.ready() == {0} and set(server.hub.images) == {0}
    until(lambda: threading.active_count() <= threads + 5)


def test_a_client_keeps_its_number_and_its_patience_over_breaks() -> None:
    """Its patience is for one absence of the server. Three of them together take longer."""
    port, patience = free_port(), 2.0
    said: list[str] = []
    errors: list[str] = []
    images = np.zeros((5, 8, 8, 3), np.uint8)

    def run() -> None:
        try:
            access = Access(f"127.0.0.1:{port}", None, "cpu", patience)
            take_part(access, lambda size: images, None, said.append)
        except UserError as error:
            errors.append(str(error))

    rules = Rules(num_clients=3, batch_size=2, image_size=8, authenticated=False)
    client = threading.Thread(target=run)
    numbers = []
    for there in range(3):
        hub = Hub(rules, lambda line: None)
        hub.images |= {0: 5} if there == 0 else {}  # later, 0 would be free too
        with listening(hub, f"127.0.0.1:{port}", None, LARGEST):
            if there == 0:
                client.start()
            expected = 2 if there == 0 else 1
            until(lambda hub=hub, expected=expected: len(hub.images) == expected)
            numbers.append(max(hub.images))
            time.sleep(patience / 2)
    assert not errors and numbers == [1, 1, 1]
    client.join(30)
    assert errors[0].startswith(f"--server: 127.0.0.1:{port} was away for 2 s")


def test_a_client_that_was_too_slow_to_say_who_it_is_does_not_give_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that is short of time: the server has ended its streams, but it is there."""
    monkeypatch.setattr(hubs, "HELLO_SECONDS", 0.0)
    said: list[str] = []
    access = Access(f"127.0.0.1:{server.port}", None, "cpu", patience=0.4)
    images = np.zeros((5, 8, 8, 3), np.uint8)
    client = threading.Thread(target=take_part, args=(access, lambda size: images, 0, said.append))
    client.start()
    until(lambda: len(said) >= 3)  # after 0.75 s or more
    assert all(line.startswith("hello: not received in time; trying again") for line in said)
    monkeypatch.setattr(hubs, "HELLO_SECONDS", 10.0)
    until(lambda: server.hub.images == {0: 5})
    server.hub.finish("done", 1, 10)
    client.join(30)
    assert not client.is_alive() and said[-1] == "done"


def test_silent_streams_of_one_certificate_take_one_place(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ends the one before, so that others find room."""
    server.hub.rules = server.hub.rules._replace(authenticated=True)
    monkeypatch.setattr(server.hub, "_certified", lambda context: 0)
    silent = [server.stream() for _ in range(hubs.SPARE_STREAMS + 3)]  # as many as there may be
    until(lambda: sum(not stream.incoming.done() for stream in silent) == 1)
    assert server.stream().join(0) == 0
    for stream in silent:
        assert stream.refusal() == (grpc.StatusCode.CANCELLED, "comes back")
