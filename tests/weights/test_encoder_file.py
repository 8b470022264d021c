"""Encoders as safetensors files, and the commands that write them."""

import json
import pathlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mocosfl_jax import TrainState, export, import_official, load_encoder, normalise
from mocosfl_jax.algorithm.pool import online_model
from mocosfl_jax.config import Moco, Model, quickstart, resolve
from mocosfl_jax.errors import UserError
from mocosfl_jax.models.forms import ACCELERATOR
from mocosfl_jax.training import checkpoint, workdir
from mocosfl_jax.training.build import build
from mocosfl_jax.weights.encoder_file import export_encoder
from tests.support.encoders import METADATA, NETWORK, random_params
from tests.support.training import single

OFFICIAL = pathlib.Path(__file__).parents[1] / "official"


def same(found: Any, expected: Any) -> None:
    """Equal bit for bit."""
    chex.assert_trees_all_equal_structs(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "encoder.safetensors"
    client, server = random_params()
    export_encoder(path, client, server, METADATA)
    return path


def test_round_trip_bit_for_bit(file: pathlib.Path) -> None:
    _, params, metadata = load_encoder(file)
    assert metadata == METADATA
    same(params, random_params())
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert "client/layer0/conv1/kernel" in load_file(file)  # as other programs see it
    (file.parent / "plain").write_bytes(b"")
    assert file.stat().st_mode == (file.parent / "plain").stat().st_mode  # for whom files are made here


def test_transposed_arrays_are_written_in_their_order(tmp_path: pathlib.Path) -> None:
    client, server = random_params()
    server["head"]["out"]["kernel"] = np.asfortranarray(server["head"]["out"]["kernel"])
    export_encoder(tmp_path / "a", client, server, METADATA)
    same(load_encoder(tmp_path / "a").params, (client, server))


def refused(path: pathlib.Path) -> str:
    with pytest.raises(UserError) as error:
        load_encoder(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_no_file_truncated_files_and_another_file(file: pathlib.Path) -> None:
    whole = file.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "not an encoder of mocosfl_jax" in refused(file)
    file.write_bytes((OFFICIAL / "checkpoint_c_best.tar").read_bytes())
    assert "not an encoder of mocosfl_jax" in refused(file)
    save_file({"weight": np.zeros(3, np.float32)}, file)
    assert "its header does not say" in refused(file)
    file.unlink()
    assert "no such file" in refused(file)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("network", NETWORK | {"width": 8}, "conv0/kernel: found (3, 3, 4, 4), expected (3, 3, 8, 4)"),
        ("network", NETWORK | {"width": "8"}, "not an encoder"),
        ("network", NETWORK | {"name": "resnet19"}, "name: found 'resnet19'"),
        (
            "network",
            NETWORK | {"bottleneck": None},
            "client/bottleneck/conv0/bias: found (4,), expected no such",
        ),
        ("network", NETWORK | {"layers": 3}, "unexpected keyword argument 'layers'"),
        ("network", [], "network is not arguments"),
        ("mean", [0.5, 0.5], "mean is not three numbers"),
        ("std", [0.5, 0.5, "a"], "not an encoder"),
        ("std", 0.5, "std is not three numbers"),
        ("std", [0.5, 0.5, 0], "std is not above 0"),
        ("source", None, "its header lacks source"),
    ],
)
def test_a_header_that_does_not_fit(field: str, value: Any, expected: str, file: pathlib.Path) -> None:
    header = {name: json.dumps(entry) for name, entry in METADATA._asdict().items()}
    header |= {"format": "mocosfl_jax encoder 1", field: json.dumps(value)}
    if value is None:
        del header[field]
    save_file(load_file(file), file, header)
    assert expected in refused(file)
    save_file(load_file(file), file, header | {field: "[" * 100_000})
    assert "not an encoder" in refused(file)


def test_missing_and_integer_arrays(file: pathlib.Path) -> None:
    header = {name: json.dumps(entry) for name, entry in METADATA._asdict().items()}
    header["format"] = "mocosfl_jax encoder 1"
    arrays = load_file(file)
    bias = arrays.pop("server/head/out/bias")
    save_file(arrays, file, header)
    assert "server/head/out/bias: found no such array, expected (6,)" in refused(file)
    save_file(arrays | {"server/head/out/bias": bias.astype(np.int32)}, file, header)
    assert "server/head/out/bias: found int32" in refused(file)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(wrong: float, tmp_path: pathlib.Path) -> None:
    client, server = random_params()
    server["head"]["out"]["bias"][2] = wrong
    export_encoder(tmp_path / "a", client, server, METADATA)
    assert "server/head/out/bias: found numbers that are not finite" in refused(tmp_path / "a")


def test_a_file_that_cannot_be_written_is_one_line(
    file: pathlib.Path, importing: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may fill up only while it is written."""
    before = file.read_bytes()

    def failing(path: pathlib.Path, content: bytes) -> None:
        with path.open("wb") as half:
            half.write(content[:100])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pathlib.Path, "write_bytes", failing)
    assert import_official.main(importing) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and str(file) in error and error.count("\n") == 1
    assert file.read_bytes() == before and not list(file.parent.glob("*.tmp"))

    assert import_official.main([*importing, "--out=/proc/x.safetensors"]) == 2
    assert "--out: found /proc/x.safetensors, allowed: a writable file (No such" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["mocosfl", "flmoco"])
def test_an_exported_run_encodes_as_the_run_does(
    algorithm: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder, path = tmp_path / "run", tmp_path / "encoder.safetensors"
    config = quickstart()
    config.algorithm, config.clients.num = algorithm, 2
    config.model = Model(name="resnet18", width=4, stem_stride=2)
    config.moco = Moco(key_dim=6, queue_size=200)
    resolved = resolve(config)
    workdir.claim(folder, resolved, {})
    workdir.write_preprocessing(folder, workdir.Preprocessing(16, (0.1, 0.2, 0.3), (0.5, 0.5, 0.25)))
    _, run = build(resolved, single(), ACCELERATOR, image_size=16)

    def state(seed: int) -> TrainState:
        """One in which no two clients are alike; drawing it needs no compilation."""
        rng = np.random.default_rng(seed)

        def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

        return jax.tree.map(draw, jax.eval_shape(run.init, jax.random.key(0)))

    with checkpoint.open_manager(folder / "checkpoints", 3) as manager:
        for step in (3, 6):
            checkpoint.save(manager, state(step), checkpoint.Progress(step))

    assert export.main(["export", f"--workdir={folder}", f"--out={path}"]) == 0
    assert "resnet18 cut at 1, 116 parameters of the client and 44," in capsys.readouterr().out
    model, (client, server), metadata = load_encoder(path)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    x = normalise(images, metadata.mean, metadata.std)
    features = jax.jit(lambda x: model.server(server, model.client(client, x)))(x)
    expected = jax.jit(run.encode)(state(6), x)
    for found, wanted in zip(features, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert metadata.source == f"checkpoint 6 of {folder}"

    assert export.main(["export", f"--workdir={folder}", f"--out={path}", "--checkpoint=3"]) == 0
    _, (other, _), metadata = load_encoder(path)
    side = online_model(state(3))
    same(other, jax.tree.map(np.asarray, side[0] if algorithm == "flmoco" else side))
    assert metadata.source == f"checkpoint 3 of {folder}"
    capsys.readouterr()
    assert export.main(["export", f"--workdir={folder}", f"--out={path}", "--checkpoint=7"]) == 2
    assert "--checkpoint: found 7" in capsys.readouterr().err


CONFIG = """
from mocosfl_jax.config import Config, Data, Model, Moco

def get_config():
    return Config(data=Data(name="cifar10"), model=Model(width=4), moco=Moco(key_dim=6))
"""


@pytest.fixture
def importing(tmp_path: pathlib.Path) -> list[str]:
    """A command line that imports the files in tests/official."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    files = [f"--{side}={OFFICIAL}/checkpoint_{side[0]}_best.tar" for side in ("client", "server")]
    return ["import", *files, f"--config={tmp_path}/tiny.py", f"--out={tmp_path}/encoder.safetensors"]


def test_an_official_checkpoint_becomes_an_encoder(importing: list[str], tmp_path: pathlib.Path) -> None:
    assert import_official.main(importing) == 0
    model, (client, server), metadata = load_encoder(tmp_path / "encoder.safetensors")
    assert metadata.mean == (0.4914, 0.4822, 0.4465)
    assert (metadata.network["image_size"], metadata.network["head"]) == (32, "mlp")
    features = jax.jit(lambda x: model.server(server, model.client(client, x)))(jnp.ones((2, 32, 32, 3)))
    assert features.projection.shape == (2, 6)
    assert np.all(np.isfinite(features.backbone)) and np.any(features.backbone)
    assert import_official.main([*importing, "--mean=0.1,0.2,0.3", "--std=1,0.5,0.25"]) == 0
    metadata = load_encoder(tmp_path / "encoder.safetensors").metadata
    assert (metadata.mean, metadata.std) == ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))


@pytest.mark.parametrize(
    ("dropped", "added", "expected"),
    [
        ("--client", [], "--client is missing"),
        ("--config", [], "--config is missing"),
        ("--out", ["--out=/no/such/folder/x"], "--out: found /no/such/folder/x"),
        ("", ["--mean=0.1,0.2"], "--mean: found 0.1,0.2"),
        ("", ["--std=0.1,0.2,0"], "--std: found 0.1,0.2,0"),
        ("", ["--config.data.name=npz"], "--mean is missing and has no default for npz"),
        ("", ["--config.model.width=8"], "client side: 0.conv1.weight: found"),
        ("--client", ["--client=missing.tar"], "missing.tar: no such file"),
    ],
)
def test_mistakes_of_an_import(
    dropped: str, added: list[str], expected: str, importing: list[str], capsys: pytest.CaptureFixture
) -> None:
    argv = [argument for argument in importing if not dropped or not argument.startswith(f"{dropped}=")]
    assert import_official.main([*argv, *added]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1
