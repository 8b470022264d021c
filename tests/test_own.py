"""A network and an algorithm from outside the package: train, save, resume and evaluate with them.

Nothing of the package is edited or patched.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from mocosfl_jax import (
    Config,
    attack,
    encode,
    encode_images,
    encoder_of_run,
    evaluate,
    export,
    normalise,
    run,
    train,
)
from mocosfl_jax.algorithm.mocosfl import mocosfl
from mocosfl_jax.config import Clients, Data, Eval, Moco, Own, resolve
from mocosfl_jax.config import Mesh as MeshSizes
from mocosfl_jax.training import report
from tests.support import own_config
from tests.support.small_run import write_images
from tests.support.toy import IMAGE, make_toy_model
from tests.support.training import prepare

FILE = pathlib.Path(own_config.__file__)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", IMAGE)


def argv(images: str, folder: pathlib.Path, *more: str) -> list[str]:
    return ["train", f"--config={FILE}:{images}", f"--workdir={folder}", *more]


def lines(folder: pathlib.Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in found]


def quiet(line: str) -> None:
    pass


def test_a_run_on_two_devices_stops_resumes_and_is_evaluated(
    images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """The numbers are those of one device without a stop, and each client counted its own steps."""
    two, one = tmp_path / "two", tmp_path / "one"
    config = own_config.get_config(images)
    config.mesh = MeshSizes(data=2, model=1)
    stopped = run(config, two, on_epoch=lambda metrics, state: metrics["epoch"] == 1, say=quiet)
    assert not stopped.finished and [line["epoch"] for line in lines(two)] == [0, 1]
    trained = run(config, two, say=quiet)
    assert trained.finished

    assert train.main(argv(images, one, "--config.mesh.data=1", "--config.mesh.model=1")) == 0
    for ours, theirs in zip(lines(two), lines(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert trained.metrics == [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]

    # 2 epochs x N // M cohorts, each step of which M clients take.
    steps = int(trained.state.step)
    counted = np.asarray(trained.state.pool["steps"])[: own_config.N]
    assert counted.sum() == steps * own_config.M and counted.max() <= steps

    for folder in (one, two):
        assert evaluate.main(["evaluate", f"--workdir={folder}", f"--config={FILE}:{images}"]) == 0
        found = json.loads((folder / "evaluation.json").read_text())
        assert found["knn_backbone"] == pytest.approx(lines(one)[-2]["knn_backbone"], abs=1e-6)
    capsys.readouterr()
    out = tmp_path / "encoder.safetensors"
    assert export.main(["export", f"--workdir={one}", f"--config={FILE}:{images}", f"--out={out}"]) == 2
    assert "own_config.network" in capsys.readouterr().err and not out.exists()


def test_a_run_needs_its_functions_again(
    images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    assert train.main(argv(images, tmp_path, "--config.epochs=1", "--config.eval.probe_epochs=0")) == 0
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["own"] == {"network": "own_config.network", "algorithm": "own_config.algorithm"}
    capsys.readouterr()
    with pytest.raises(
        ValueError, match=r"found 'own_config\.network', allowed: own=Own\(\.\.\.\) with that"
    ):
        encoder_of_run(tmp_path)
    config = own_config.get_config(images)
    config.epochs, config.eval.probe_epochs, config.moco.queue_size = 1, 0, 20
    config.own = Own(network=own_config.network)
    with pytest.raises(ValueError, match=r"config\.own\.algorithm: 'own_config\.algorithm' there, None now"):
        run(config, tmp_path, say=quiet)
    commands = ((evaluate, "evaluate"), (encode, "encode"), (export, "export"), (attack, "attack"))
    for command, name in commands:
        more = {
            "encode": [f"--images={tmp_path}", f"--out={tmp_path}/x.npz"],
            "export": [f"--out={tmp_path}/x"],
        }
        assert command.main([name, f"--workdir={tmp_path}", *more.get(name, [])]) == 2
        error = capsys.readouterr().err
        assert "config.own.network: found 'own_config.network', allowed: --config=FILE" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "functions, message",
    [
        ({"network": lambda *_: 3}, r"config\.own\.network: found a function that returns int"),
        ({"algorithm": lambda *_: None}, r"config\.own\.algorithm: found a function that returns NoneType"),
        (
            {"network": lambda config, image_size: None},
            r"config\.own\.network: found a function of \(config, image_size\), allowed: of \(config, image",
        ),
        (
            {"algorithm": lambda config, model: None},
            r"config\.own\.algorithm: found a function of \(config, model\), allowed: of \(config, mod",
        ),
        ({"network": "resnet18"}, r"config\.own\.network: found 'resnet18', allowed: a function or None"),
    ],
)
def test_wrong_functions_are_refused(
    images: str, tmp_path: pathlib.Path, functions: dict[str, Any], message: str
) -> None:
    config = own_config.get_config(images)
    config.own = Own(**{"network": own_config.network, "algorithm": own_config.algorithm} | functions)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path, say=quiet)


def test_a_wrong_contrast_is_refused_before_any_work(images: str, tmp_path: pathlib.Path) -> None:
    def no_contrast(params: Any, query: Any, key: Any, similarities: Any) -> Any:
        return 0.0

    def algorithm(config: Any, model: Any, arguments: dict[str, Any]) -> Any:
        return mocosfl(model, contrast=no_contrast, **arguments)

    said: list[str] = []
    with pytest.raises(ValueError, match="contrast: found a function that returns a float"):
        run(small(images), tmp_path / "run", model=make_toy_model(), algorithm=algorithm, say=said.append)
    assert not said and not (tmp_path / "run").exists()


def test_what_an_algorithm_refuses_is_named_as_in_the_configuration(
    images: str, tmp_path: pathlib.Path
) -> None:
    def algorithm(config: Any, model: Any, arguments: dict[str, Any]) -> Any:
        return mocosfl(model, **arguments)

    config = small(images, moco=Moco(key_dim=8, queue_size=5))  # a step has eight keys
    with pytest.raises(ValueError, match=r"^config\.moco\.queue_size: found"):
        run(config, tmp_path, model=make_toy_model(), algorithm=algorithm, say=quiet)


def test_a_network_for_images_of_another_size_is_refused(images: str, tmp_path: pathlib.Path) -> None:
    config = small(images, data=Data(name="npz", dir=images, image_size=8))
    with pytest.raises(ValueError, match=r"config\.own\.network: found a network that fails for .* 8x8x3"):
        run(config, tmp_path, model=make_toy_model(), say=quiet)


def test_an_error_in_a_function_says_which(images: str, tmp_path: pathlib.Path) -> None:
    def network(config: Any, image_size: int, forms: Any) -> Any:
        raise KeyError("width")

    with pytest.raises(KeyError) as error:
        run(small(images, own=Own(network=network)), tmp_path, say=quiet)
    assert "`config.own.network`, test_own.test_an_error" in error.value.__notes__[-1]


def test_the_header_names_an_own_network(images: str) -> None:
    config = small(images, own=Own(network=own_config.network))
    rows = dict(line.split(maxsplit=2)[::2] for line in report.header(prepare(config)).splitlines())
    assert rows["client"] == "own_config.network: 15 parameters (60 B) per client"


def test_functions_are_not_set_on_a_command_line(capsys: pytest.CaptureFixture) -> None:
    assert train.main(["train", "--config.own.network=x"]) == 2
    assert "config.own.network: found a value, allowed: a function" in capsys.readouterr().err


def small(images: str, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "epochs": 1,
        "data": Data(name="npz", dir=images),
        "clients": Clients(num=4, batch_size=2, noniid_ratio=1.0),
        "moco": Moco(key_dim=8, queue_size=20),
        "eval": Eval(every=1, knn_k=3, probe_epochs=0),
    }
    return Config(**settings | changes)


def test_a_run_starts_from_the_models_of_another(images: str, tmp_path: pathlib.Path) -> None:
    """Online models exactly, and the mean of the clients' momentum models; the optimizer starts anew."""
    model = make_toy_model()
    first = run(small(images), tmp_path / "first", model=model, say=quiet)
    started: list[Any] = []

    def keep_first(metrics: Any, state: Any) -> bool:
        started.append(jax.device_get(state))
        return True

    config = small(images, init_from=str(tmp_path / "first"), seed=5)
    run(
        config,
        tmp_path / "second",
        model=model,
        on_epoch=keep_first,
        say=quiet,
    )
    before, after = jax.device_get(first.state), started[0]
    assert after.step == 0 and before.step > 0
    for name in ("params", "key_params"):
        for ours, theirs in zip(
            jax.tree.leaves(getattr(after.server, name)),
            jax.tree.leaves(getattr(before.server, name)),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(after.pool.shared.params["kernel"], before.pool.shared.params["kernel"])
    mean = np.mean(before.pool.own.key_params["kernel"][:4].astype(np.float64), axis=0)
    for client in after.pool.own.key_params["kernel"][:4]:
        np.testing.assert_allclose(client, mean, rtol=1e-6)
    assert not np.any(jax.tree.leaves(after.server.opt_state)[0])


def test_models_of_another_network_are_refused(images: str, tmp_path: pathlib.Path) -> None:
    run(small(images), tmp_path / "first", model=make_toy_model(), say=quiet)
    config = small(images, init_from=str(tmp_path / "first"))
    with pytest.raises(ValueError, match=r"config\.own\.network: found 'build\.constant_network"):
        run(config, tmp_path / "second", say=quiet)
    config.init_from = str(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.init_from: found no .*nothing"):
        run(config, tmp_path / "third", model=make_toy_model(), say=quiet)


def test_a_head_of_an_own_network_may_mix_images(images: str, tmp_path: pathlib.Path) -> None:
    """Batch norm in the head is over all images, not over a batch of them with its padding."""
    toy = make_toy_model()

    def head(params: Any, backbone: Any) -> Any:
        rows = backbone @ params["head"]
        return (rows - rows.mean(0, keepdims=True)) / (rows.std(0, keepdims=True) + 1e-3)

    trained = run(small(images), tmp_path, model=toy._replace(head=head), say=quiet)
    pictures = np.load(images)["x_train"][:7]
    model, (client, server), metadata = trained.encoder
    x = normalise(pictures, metadata.mean, metadata.std)
    expected = head(server, model.backbone(server, model.client(client, x)))
    for batch_size in (4, 7, 250):
        found = encode_images(trained.encoder, pictures, batch_size).projection
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_what_does_not_change_training_may_change_on_resume(images: str, tmp_path: pathlib.Path) -> None:
    run(
        small(images, epochs=2),
        tmp_path,
        model=make_toy_model(),
        on_epoch=lambda m, s: m["epoch"] == 1,
        say=quiet,
    )
    other = small(images, epochs=2, eval=Eval(every=0, knn_k=3, probe_epochs=1))
    trained = run(other, tmp_path, model=make_toy_model(), say=quiet)
    assert trained.finished and "linear_probe" in trained.metrics[-1]
    recorded = json.loads((tmp_path / "config.json").read_text())["eval"]
    assert (recorded["every"], recorded["probe_epochs"]) == (0, 1)
    with pytest.raises(ValueError, match=r"config\.eval\.knn_k: found 7, allowed: 3"):
        run(small(images, epochs=2, eval=Eval(knn_k=7)), tmp_path, model=make_toy_model(), say=quiet)
    with pytest.raises(ValueError, match=r"config\.seed: 1234 there, 3 now"):
        run(small(images, epochs=2, seed=3), tmp_path, model=make_toy_model(), say=quiet)


def test_the_seed_of_the_clients_decides_who_holds_what() -> None:
    def parts(**changes: Any) -> list[list[int]]:
        config = Config(data=Data(name="fashion_mnist_sample"), **changes)
        return [part.tolist() for part in prepare(config).parts]

    base = parts(seed=1)
    assert parts(seed=2, clients=Clients(seed=1)) == base
    assert parts(seed=1, clients=Clients(seed=2)) != base
    assert resolve(Config(seed=9)).clients.seed == 9
