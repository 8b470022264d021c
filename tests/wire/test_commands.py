"""The commands serve, join and certificates: a federation of processes, kills, and mistakes in one line."""

import contextlib
import datetime
import functools
import json
import pathlib
import signal
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from mocosfl_jax import certificates, join, serve
from mocosfl_jax.data import load
from mocosfl_jax.errors import UserError
from mocosfl_jax.training import experiment, workdir
from mocosfl_jax.wire import certificates as tls
from tests.support.federation import Federation, toy_fields
from tests.support.small_run import metrics
from tests.support.toy import last_state

EPOCHS = 6
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@contextlib.contextmanager
def ended(federation: Federation) -> Iterator[Federation]:
    """End all processes of a federation in the end."""
    try:
        yield federation
    finally:
        for process in federation.running:
            process.kill()
            process.wait()


@pytest.fixture
def federation(tmp_path: pathlib.Path) -> Iterator[Federation]:
    with ended(Federation(tmp_path, toy_fields(tmp_path, EPOCHS))) as found:
        yield found


def test_processes_train_what_the_simulation_trains(federation: Federation) -> None:
    """Also if the server and the clients are killed on the way: they go on from the last checkpoint."""
    server = federation.serve()
    clients = [federation.join(client) for client in range(3)]
    federation.until(lambda: federation.epochs() >= 1)
    server.send_signal(signal.SIGKILL)
    server.wait()
    server = federation.serve()
    federation.until(lambda: federation.epochs() >= 3)
    for client in clients:
        client.send_signal(signal.SIGKILL)
    federation.until(lambda: "; 0 are connected" in federation.log("serve"))
    server.send_signal(signal.SIGTERM)  # it ends although nobody is there to end the round with
    assert server.wait(60) == 143
    server = federation.serve()
    clients = [federation.join(client) for client in range(3)]
    assert server.wait(120) == 0, federation.log("serve")
    for number, client in enumerate(clients):
        assert client.wait(60) == 0, federation.log(f"join-{number}")
        assert "the training is finished" in federation.log(f"join-{number}")

    for name in ("serve", "join-0", "join-1", "join-2"):
        assert "Traceback" not in federation.log(name)

    simulated = federation.folder / "simulated"
    argv = ["train", *federation.arguments, f"--workdir={simulated}"]
    assert federation.start("train", "mocosfl_jax.train", argv[1:]).wait(120) == 0
    found, expected = metrics(federation.workdir), metrics(simulated)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    losses, wanted = ([line["loss"] for line in lines if "loss" in line] for lines in (found, expected))
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    states = [last_state(argv, folder) for folder in (federation.workdir, simulated)]
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    assert json.loads((federation.workdir / "clients.json").read_text()) == {
        str(client): len(part) for client, part in enumerate(federation.simulated.parts)
    }


@pytest.mark.slow
def test_five_processes_train_the_quickstarts_network(tmp_path: pathlib.Path) -> None:
    """In float32, where clients and simulation round differently; in float64 see test_federation.py."""
    sample = load("fashion_mnist_sample", "data", image_size=None)
    images: dict[str, Any] = {name: np.asarray(getattr(sample, name)[:200]) for name in ARRAYS}
    np.savez(tmp_path / "set.npz", **images)
    given = {
        "epochs": 3,
        "clients.num": 5,
        "data.name": "npz",
        "data.dir": tmp_path / "set.npz",
        "mesh.data": 1,
    }
    with ended(Federation(tmp_path, given, toy=False)) as federation:
        server = federation.serve()
        clients = [federation.join(client) for client in range(5)]
        simulated = tmp_path / "simulated"
        argv = ["train", *federation.arguments, f"--workdir={simulated}"]
        assert federation.start("train", "mocosfl_jax.train", argv[1:]).wait(600) == 0
        assert server.wait(600) == 0, federation.log("serve")
        assert [client.wait(60) for client in clients] == [0] * 5
    folders = (federation.workdir, simulated)
    found, expected = ([line["loss"] for line in metrics(folder) if "loss" in line] for folder in folders)
    assert len(found) == 3
    for epoch, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6 * 10**epoch)  # two steps each
    states = [last_state(argv, folder) for folder in folders]
    models = [
        (state.pool.shared.params, state.pool.own.key_params, state.server.params, state.server.key_params)
        for state in states
    ]
    assert states[0].step == states[1].step == 6
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=5e-4), *models)


def test_a_client_of_another_authority_is_refused(federation: Federation) -> None:
    federation.serve()
    federation.until(lambda: "listening" in federation.log("serve"))
    federation.join(0)
    federation.until(lambda: "client 0: " in federation.log("serve"))
    federation.tls = federation.folder / "other"
    assert certificates.main(["certificates", f"--tls={federation.tls}", "--clients=3"]) == 0
    stranger = federation.join(1)
    assert stranger.wait(60) == 2
    (line,) = [line for line in federation.log("join-1").splitlines() if line.startswith("error: ")]
    assert "certificates" in line
    assert "client 1: " not in federation.log("serve")


def test_a_certificate_is_for_one_number_only(federation: Federation) -> None:
    federation.serve()
    federation.until(lambda: "listening" in federation.log("serve"))
    where = [f"--server=localhost:{federation.port}", f"--data={federation.folder / '0.npz'}"]
    for name in ("client-1.pem", "client-1.key"):
        (federation.tls / "client-1" / name).rename(federation.tls / "client-1" / name.replace("1", "2"))
    thief = federation.start(
        "thief",
        "mocosfl_jax.join",
        [*where, f"--tls={federation.tls / 'client-1'}", "--client_id=2", "--patience=0"],
    )
    assert thief.wait(60) == 2
    assert "client_id: found 2, allowed: 1, as in the certificate" in federation.log("thief")


LOCAL = ["--listen=127.0.0.1:8000", "--insecure"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--listen is missing"),
        (["--listen=8000", "--insecure"], "--listen: found '8000', allowed: HOST:PORT"),
        (["--listen=127.0.0.1:8000"], "found neither --tls nor --insecure"),
        (
            ["--listen=0.0.0.0:8000", "--insecure"],
            "--insecure: found 0.0.0.0:8000, allowed: an address of this",
        ),
        (["--listen=127.0.0.1:8000", "--tls=nowhere"], "--tls: "),
        (
            [*LOCAL, "--config.algorithm=flmoco"],
            "config.algorithm: found 'flmoco', allowed with",
        ),
        ([*LOCAL, "--config.model.cut_layer=0"], "config.model.cut_layer: found 0"),
        ([*LOCAL, "--config.moco.head=mlp_bn"], "config.moco.head: found 'mlp_bn'"),
        ([*LOCAL, "--config.moco.feature_sharing=False"], "config.moco.feature_sharing: found False"),
        ([*LOCAL, "--config.moco.concatenate=False"], "config.moco.concatenate: found False"),
        ([*LOCAL, "--config.wire.dtype=int4"], "config.wire.dtype: found 'int4', allowed: exact, float32"),
        (
            [*LOCAL, "--config.clients.num=1", "--config.resist.target_share=0.5"],
            "config.resist.target_share: found 0.5, allowed with real clients: 1.0",
        ),
        ([*LOCAL, "--config.wire.least=0"], "config.wire.least: found 0, allowed: 1 to"),
    ],
)
def test_mistakes_of_the_server_are_one_line(
    arguments: list[str], message: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    assert serve.main(["serve", f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_server_that_goes_on_keeps_its_mean_and_standard_deviation(
    finished: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients normalise their images by it."""
    given: list[Any] = []

    def load(config: Any, mesh: Any, preprocessing: Any = None) -> Any:
        given.append(preprocessing)
        raise UserError("enough")

    monkeypatch.setattr(experiment, "load", load)
    assert serve.main(["serve", f"--workdir={finished}", *LOCAL]) == 2
    assert given == [workdir.read_preprocessing(finished)]


def test_mistakes_of_a_client_are_one_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    np.savez(tmp_path / "floats.npz", images=np.zeros((3, 4, 4, 3)))
    np.savez(tmp_path / "other.npz", labels=np.zeros(3))
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    (tmp_path / "empty").mkdir()
    local = "--server=127.0.0.1:1"
    for arguments, message in (
        ([local, "--insecure"], "--data is missing"),
        (["--server=example.org:1", "--insecure", "--data=."], "--insecure: found example.org:1"),
        ([local, "--insecure", "--data=nowhere"], "--data: found no nowhere"),
        ([local, "--insecure", "--data=.", "--client_id=4294967296"], "--client_id=4294967296"),
        ([local, f"--tls={tmp_path}", f"--data={tmp_path}"], "has keys of 0 clients, allowed: 1"),
        (
            [local, "--insecure", f"--data={tmp_path}", "--patience=0"],
            "--server: 127.0.0.1:1 was away for 0 s",
        ),
    ):
        assert join.main(["join", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for name, message in (
        ("floats.npz", "has images (3, 4, 4, 3) of float64, allowed: images"),
        ("other.npz", "has no array images or x_train"),
        ("broken.npz", "is no npz file that can be read"),
        ("empty", "holds no picture that can be read"),
    ):
        with pytest.raises(ValueError, match="--data") as caught:
            join.read_pictures(tmp_path / name, 4)
        assert message in str(caught.value)


def test_damaged_certificates_are_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    """gRPC would end the process, or say that nobody answers."""
    folder = tmp_path / "tls"
    assert certificates.main(["certificates", f"--tls={folder}", "--clients=2", "--hosts=localhost"]) == 0
    capsys.readouterr()
    of_client, of_other = folder / "client-0" / "client-0", folder / "client-1" / "client-1"
    client = ["join", "--server=localhost:1", f"--data={tmp_path}", f"--tls={of_client.parent}"]
    server = ["serve", "--listen=127.0.0.1:0", f"--tls={folder}", f"--workdir={tmp_path / 'run'}"]
    for command, argv, side, authority in (
        (join, client, of_client, of_client.parent / "authority.pem"),
        (serve, server, folder / "server", folder / "authority.pem"),
    ):
        key, pem = pathlib.Path(f"{side}.key"), pathlib.Path(f"{side}.pem")
        for path, content, message in (
            (key, b"", f"{key}: found no private key, allowed: one in PEM"),
            (key, key.read_bytes()[:-40], f"{key}: found no private key"),
            (pem, b"", f"{pem}: found no certificate, allowed: one in PEM"),
            (pem, key.read_bytes(), f"{pem}: found no certificate"),
            (authority, b"garbage", f"{authority}: found no certificate"),
            (
                key,
                pathlib.Path(f"{of_other}.key").read_bytes(),
                f"{pem}: found the certificate of another key, allowed: that of {key}",
            ),
        ):
            before = path.read_bytes()
            path.write_bytes(content)
            assert command.main(argv) == 2
            path.write_bytes(before)
            error = capsys.readouterr().err
            assert f"--tls: {message}" in error and error.count("\n") == 1
    tomorrow = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=tls.DAYS + 1)
    with pytest.MonkeyPatch.context() as patch:
        clock = types.SimpleNamespace(now=lambda zone: tomorrow)
        patch.setattr(tls, "datetime", types.SimpleNamespace(datetime=clock, UTC=datetime.UTC))
        assert join.main(client) == 2
    assert "found a certificate from" in capsys.readouterr().err


def test_a_folder_of_pictures_is_resized(tmp_path: pathlib.Path) -> None:
    from PIL import Image

    for number, size in enumerate((8, 16)):
        Image.new("RGB", (size, size), (10 * number, 20, 30)).save(tmp_path / f"{number}.png")
    (tmp_path / "note.txt").write_text("no picture")
    pictures = join.read_pictures(tmp_path, 4)
    assert pictures.shape == (2, 4, 4, 3) and pictures.dtype == np.uint8
    assert pictures[1, 0, 0].tolist() == [10, 20, 30]


def test_certificates_are_made_once_and_private(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "tls"
    command = ["certificates", f"--tls={folder}", "--clients=2", "--hosts=example.org,10.0.0.1"]
    assert certificates.main(command) == 0
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*.key")} == {0o600}
    assert sorted(path.name for path in (folder / "client-1").iterdir()) == [
        "authority.pem",
        "client-1.key",
        "client-1.pem",
    ]
    capsys.readouterr()
    assert certificates.main(command) == 2
    assert "is not empty, allowed: a new folder" in capsys.readouterr().err
    for hosts in (
        "",
        "example.org:8000",
        "[::1]",
        "a,,b",
        "b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example",
    ):
        wrong = ["certificates", f"--tls={tmp_path / 'new'}", "--clients=1", f"--hosts={hosts}"]
        assert certificates.main(wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --hosts: found ") and error.count("\n") == 1
    assert not (tmp_path / "new").exists()
