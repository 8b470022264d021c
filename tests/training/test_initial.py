"""A run starts from the models of another one, of both sides of the cut or of one."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from mocosfl_jax import evaluate, load_encoder, report, run, split_model, train
from mocosfl_jax.config import Clients, Config, Data, Eval, Moco, Model, Optim
from mocosfl_jax.training.initial import initial_models
from mocosfl_jax.weights.encoder_file import Metadata, export_encoder
from tests.support.small_run import arguments, write_images
from tests.support.training import prepare

NETWORK: dict[str, Any] = {
    "name": "resnet18",
    "cut_layer": 1,
    "width": 4,
    "image_size": 8,
    "stem_stride": 1,
    "key_dim": 8,
    "head": "mlp",
    "bottleneck": "C4S2",
    "weight_standardisation": True,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", (8, 8, 3))


def config_of(images: str, **changes: Any) -> Config:
    fields: dict[str, Any] = {
        "epochs": 1,
        "data": Data(name="npz", dir=images),
        "clients": Clients(num=3, batch_size=2, noniid_ratio=1.0),
        "model": Model(width=4, stem_stride=1, bottleneck="C4S2"),
        "moco": Moco(key_dim=8, queue_size=20),
        "eval": Eval(every=1, knn_k=3, probe_epochs=0),
    }
    return Config(**fields | changes)


def write_encoder(path: pathlib.Path, images: str, **changes: Any) -> tuple[str, Any]:
    """A file of drawn parameters, for the statistics of the images."""
    network = NETWORK | {name: value for name, value in changes.items() if name in NETWORK}
    params = jax.device_get(jax.jit(split_model(**network).init)(jax.random.key(77)))
    with np.load(images) as arrays:
        pixels = arrays["x_train"] / 255
    mean, std = (tuple(f((0, 1, 2)).tolist()) for f in (pixels.mean, pixels.std))
    export_encoder(path, params[0], params[1], Metadata(network, changes.get("mean", mean), std))
    return str(path), params


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parts", ["both", "client", "server"])
def test_an_encoder_goes_into_all_clients_or_the_server(
    images: str, tmp_path: pathlib.Path, parts: str
) -> None:
    """Momentum models included. The other side is what the seed draws without a file."""
    file, params = write_encoder(tmp_path / "encoder.safetensors", images)
    prepared = prepare(config_of(images, init_from=file, init_parts=parts))
    rng = jax.random.key(5)
    drawn = prepared.algorithm.init(rng)
    state = prepared.algorithm.init(rng, initial_models(prepared, rng))
    assert_equal(state.server.params, drawn.server.params if parts == "client" else params[1])
    assert_equal(state.server.key_params, drawn.server.params if parts == "client" else params[1])
    client = drawn.pool.shared.params if parts == "server" else params[0]
    assert_equal(state.pool.shared.params, client)
    for i in range(3):
        assert_equal(jax.tree.map(lambda leaf, i=i: leaf[i], state.pool.own.key_params), client)


def test_a_client_fits_another_server(images: str, tmp_path: pathlib.Path) -> None:
    """Only the side that is taken has to fit."""
    file, params = write_encoder(tmp_path / "encoder.safetensors", images, key_dim=16, head="linear")
    rng = jax.random.key(5)
    prepared = prepare(config_of(images, init_from=file, init_parts="client"))
    models = initial_models(prepared, rng)
    assert models is not None
    assert_equal(models.online[0], params[0])
    prepared = prepare(config_of(images, init_from=file))
    with pytest.raises(
        ValueError, match=r"config\.init_from: .* of shape .*, allowed: .*, as in the network"
    ):
        initial_models(prepared, rng)


def test_a_frozen_client_stays_and_the_run_resumes(images: str, tmp_path: pathlib.Path) -> None:
    """The file is read once: a run that resumes does not need it, and config.json names the parts."""
    file, params = write_encoder(tmp_path / "encoder.safetensors", images)
    config = config_of(images, init_from=file, init_parts="client", epochs=2, optim=Optim(client_lr=0.0))
    stopped = run(config, tmp_path / "run", on_epoch=lambda m, s: m["epoch"] == 1, say=lambda line: None)
    assert not stopped.finished
    pathlib.Path(file).unlink()
    trained = run(config, tmp_path / "run", say=lambda line: None)
    assert_equal(trained.state.pool.shared.params, params[0])
    config.init_parts = "both"
    with pytest.raises(ValueError, match=r"config\.init_parts: 'client' there, 'both' now"):
        run(config, tmp_path / "run", say=lambda line: None)


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ({"width": 8}, {}, r"has \[0\].* of shape .*, allowed: .*, as in the network of this run"),
        ({"bottleneck": "C2S2"}, {}, r"has \[0\].* of shape .*, allowed"),
        ({"image_size": 16}, {}, r"is of images of 16 pixels, allowed: 8, those of this run"),
        (  # the same shapes
            {"weight_standardisation": False},
            {},
            r"is of a network with config\.model\.weight_standardisation of False, allowed: True, as in the",
        ),
        (
            {"stem_stride": 2},
            {},
            r"is of a network with config\.model\.stem_stride of 2, allowed: 1, as in the network",
        ),
        (
            {"mean": (0.1, 0.2, 0.3)},
            {"optim": Optim(client_lr=0.0)},
            r"is of images normalised by mean \(0\.1, 0\.2, 0\.3\), allowed: .*since its clients are frozen",
        ),
    ],
)
def test_encoders_that_do_not_fit_are_refused(
    images: str, tmp_path: pathlib.Path, file: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path, _ = write_encoder(tmp_path / "encoder.safetensors", images, **file)
    prepared = prepare(config_of(images, init_from=path, init_parts="client", **changes))
    with pytest.raises(ValueError, match=rf"config\.init_from: .*encoder\.safetensors {message}") as error:
        initial_models(prepared, jax.random.key(0))
    assert "\n" not in str(error.value)


def test_layers_of_the_client_do_not_matter_to_the_server(images: str, tmp_path: pathlib.Path) -> None:
    path, params = write_encoder(tmp_path / "encoder.safetensors", images, stem_stride=2)
    models = initial_models(
        prepare(config_of(images, init_from=path, init_parts="server")), jax.random.key(0)
    )
    assert models is not None
    assert_equal(models.online[1], params[1])


def test_parameters_of_a_file_take_the_dtype_of_the_run(images: str, tmp_path: pathlib.Path) -> None:
    path, (client, server) = write_encoder(tmp_path / "encoder.safetensors", images)
    encoder = load_encoder(path)
    half = jax.tree.map(lambda leaf: leaf.astype(np.float16), (client, server))
    export_encoder(pathlib.Path(path), half[0], half[1], encoder.metadata)
    models = initial_models(prepare(config_of(images, init_from=path)), jax.random.key(0))
    assert models is not None
    assert {leaf.dtype for leaf in jax.tree.leaves(models)} == {np.dtype(np.float32)}
    assert_equal(models.online, jax.tree.map(lambda leaf: leaf.astype(np.float32), half))


def test_other_statistics_are_taken_where_clients_learn(images: str, tmp_path: pathlib.Path) -> None:
    path, _ = write_encoder(tmp_path / "encoder.safetensors", images, mean=(0.1, 0.2, 0.3))
    assert initial_models(prepare(config_of(images, init_from=path)), jax.random.key(0)) is not None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--init_parts=client"], "config.init_parts: found client without config.init_from, allowed: both"),
        (
            ["--init_from=x", "--init_parts=all"],
            "config.init_parts: found 'all', allowed: both, client, server",
        ),
        (
            ["--init_from=x", "--init_parts=client", "--config.model.cut_layer=0"],
            "config.init_parts: found client and config.model.cut_layer 0, allowed: server or both",
        ),
    ],
)
def test_impossible_parts_are_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert train.main(["train", f"--workdir={tmp_path}", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_run_that_starts_from_a_trained_one_says_so(
    images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """And a run with weighted averages can be such a start."""
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--config.epochs=1", "--config.eval.probe_epochs=0"]
    assert train.main(arguments(images, first, *options, "--config.sync.weighted=True")) == 0
    assert "kNN, untrained" in capsys.readouterr().out
    assert train.main(arguments(images, second, *options, f"--init_from={first}")) == 0
    assert evaluate.main(["evaluate", f"--workdir={second}"]) == 0
    out = capsys.readouterr().out
    assert out.count("kNN, at the start") == 2 and "untrained" not in out
    page = tmp_path / "page.html"
    assert report.main(["report", f"--workdir={second}", f"--out={page}"]) == 0
    assert ", at the start 0." in page.read_text()
