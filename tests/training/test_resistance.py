"""Runs that train clients against a decoder: what they record, warn of and refuse; source and target."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import commandline, evaluate, mocosfl, normalise, run
from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.adversary import Adversary, decoder_adversary
from mocosfl_jax.config import Clients, Config, Data, Eval, Moco, Model, Optim, Own, Resist
from mocosfl_jax.models.decoders import make_decoder
from mocosfl_jax.privacy.similarity import ssim
from mocosfl_jax.training.build import constant_network
from tests.support.small_run import write_images
from tests.support.toy import IMAGE, make_toy_model
from tests.support.training import prepare

TARGETS, SOURCES = 48, 40  # images


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("target") / "images.npz", IMAGE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("source") / "images.npz"
    x = np.random.default_rng(1).integers(0, 90, (SOURCES, *IMAGE)).astype(np.uint8)
    y = np.arange(SOURCES) % 2
    np.savez(path, x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    return str(path)


def expert(images: str, **changes: Any) -> Config:
    resist = {"strength": 2.0, "ssim_target": 0.1, "decoder": "conv_normN0C4", "judge_images": 20}
    fields: dict[str, Any] = {
        "epochs": 2,
        "data": Data(name="npz", dir=images),
        "clients": Clients(num=1, batch_size=8, noniid_ratio=1.0),
        "moco": Moco(key_dim=8, queue_size=32),
        "eval": Eval(every=1, knn_k=3, probe_epochs=0),
        "resist": Resist(**resist | {"judge_epochs": 2} | changes.pop("resist", {})),
    }
    return Config(**fields | changes)


def train(config: Config, folder: pathlib.Path, say: Any = quiet, on_epoch: Any = None) -> Any:
    return run(config, folder, model=make_toy_model(), say=say, on_epoch=on_epoch)


def without_speed(metrics: Any) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in metrics]


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("preset", ["corrected", "faithful"])
def test_a_run_resumes_bit_for_bit(images: str, source: str, tmp_path: pathlib.Path, preset: str) -> None:
    """With the decoder, its statistics and its Adam, which are in the checkpoint."""
    more = {"preset": preset, "source": "npz", "source_dir": source, "target_share": 0.5}
    config = expert(images, resist=more)
    whole = train(config, tmp_path / "whole")
    stopped = train(config, tmp_path / "stopped", on_epoch=lambda m, s: m["epoch"] == 1)
    assert not stopped.finished
    resumed = train(config, tmp_path / "stopped")
    assert_equal(resumed.state, whole.state)
    assert without_speed(resumed.metrics) == without_speed(whole.metrics)
    counts = [x for x in jax.tree.leaves(whole.state.server.adversary.opt_state) if x.dtype == np.int32]
    assert counts == [20]  # two epochs of 40 images of the source, 4 in a step: the restored Adam went on
    moved = jax.tree.leaves(whole.state.server.adversary.statistics)
    assert moved and all(np.all(leaf != 0) for leaf in moved)


def test_each_epoch_has_the_ssim_and_the_last_a_judgement(images: str, tmp_path: pathlib.Path) -> None:
    said: list[str] = []
    trained = train(expert(images, resist={"judge_margin": 0.0}), tmp_path, say=said.append)
    first, last = trained.metrics[1:3]
    assert {"ssim_decoder", "ssim_regulariser"} <= set(first) and "ssim_fresh" not in first
    assert {"ssim_in_loop", "ssim_fresh"} <= set(last)
    assert all(-1 <= last[name] <= 1 for name in last if name.startswith("ssim"))
    np.testing.assert_allclose(
        [last["ssim_decoder"], last["ssim_regulariser"]], trained.state.server.adversary.similarity
    )
    (warning,) = [line for line in said if line.startswith("warning: a fresh decoder")]
    assert f"SSIM of {last['ssim_fresh']:.3f}" in warning and "differ by more than 0:" in warning


def test_the_margin_silences_the_warning(images: str, tmp_path: pathlib.Path) -> None:
    said: list[str] = []
    settings = {"judge_margin": 2.0, "judge_every": 1}
    trained = train(expert(images, resist=settings), tmp_path, say=said.append)
    assert all("ssim_fresh" in line for line in trained.metrics[1:3])
    assert not any(line.startswith("warning") for line in said)


@pytest.mark.parametrize("kind", ["decoder", "counter"])
def test_an_adversary_of_your_own_is_not_judged(kind: str, images: str, tmp_path: pathlib.Path) -> None:
    """Another decoder has its similarities in metrics.jsonl; of anything else nothing is known."""
    like = jax.eval_shape(make_toy_model().client, *toy_client_and_images())
    counter = Adversary(
        lambda rng: jnp.zeros(()), lambda state, smashed, views, number: (state + 1, 0 * smashed)
    )
    decoder = decoder_adversary(
        make_decoder("custom", like.shape[1:], IMAGE[0]),
        ssim,
        lambda views: 0.25 * views + 0.5,
        strength=1.0,
        target=0.5,
        optimizer=optim.adam(1e-3),
        steps_per_epoch=6,
    )

    def algorithm(config: Any, model: Any, arguments: dict[str, Any]) -> Any:
        return mocosfl(model, **arguments | {"adversary": decoder if kind == "decoder" else counter})

    config = expert(images)
    trained = run(config, tmp_path / "run", model=make_toy_model(), algorithm=algorithm, say=quiet)
    assert [line["epoch"] for line in trained.metrics] == [0, 1, 2]
    assert ("ssim_decoder" in trained.metrics[-1]) == (kind == "decoder")
    assert "ssim_fresh" not in trained.metrics[-1]


def toy_client_and_images() -> tuple[Any, jax.Array]:
    params, _ = make_toy_model().init(jax.random.key(0))
    return params, jnp.zeros((1, *IMAGE))


def test_a_federation_with_the_frozen_client_of_an_expert(images: str, tmp_path: pathlib.Path) -> None:
    """Its client-side models are the expert's, bit for bit, before and after; the server goes on."""
    expert_run = train(expert(images), tmp_path / "expert")
    config = expert(
        images,
        clients=Clients(num=4, batch_size=2, noniid_ratio=0.5),
        optim=Optim(client_lr=0.0, server_lr=0.01),
        resist={"strength": 0.0},
        init_from=str(tmp_path / "expert"),
    )
    started: list[Any] = []

    def keep(metrics: Any, state: Any) -> bool:
        started.append(jax.device_get(state))
        return False

    trained = train(config, tmp_path / "federation", on_epoch=keep)
    for state in (started[0], trained.state):
        assert_equal(state.pool.shared.params, expert_run.state.pool.shared.params)
    momentum = jax.tree.leaves(expert_run.state.pool.own.key_params)
    for found, one in zip(jax.tree.leaves(started[0].pool.shared.key_params), momentum, strict=True):
        np.testing.assert_array_equal(found, one[0])
    assert_equal(started[0].server.params, expert_run.state.server.params)
    moved = trained.state.server.params["kernel"] - started[0].server.params["kernel"]
    assert np.any(moved) and not hasattr(trained.state.server, "adversary")
    assert not any("ssim" in name for line in trained.metrics for name in line)


def test_a_step_has_images_of_the_target_first(images: str, source: str) -> None:
    """Half are of a fixed random share of the target, each epoch shows every image of the source once."""
    config = expert(images, resist={"source": "npz", "source_dir": source, "target_share": 0.25})
    prepared = prepare(config, model=make_toy_model())
    assert prepared.steps_per_epoch == 10 and prepared.images_per_step == 8
    with np.load(images) as target, np.load(source) as other:
        share = {image.tobytes() for image in prepared.dataset.x_train[prepared.parts[0]]}
        assert len(prepared.parts[0]) == TARGETS // 4 == len(share)
        assert share <= {image.tobytes() for image in target["x_train"]}
        for epoch in (0, 1):
            pictures = prepared.views[prepared.indices(epoch)[:, 0]]
            assert {image.tobytes() for image in pictures[:, :4].reshape(-1, *IMAGE)} <= share
            seen = sorted(image.tobytes() for image in pictures[:, 4:].reshape(-1, *IMAGE))
            assert seen == sorted(image.tobytes() for image in other["x_train"])
    assert not np.array_equal(prepared.indices(0), prepared.indices(1))


def test_without_a_target_all_images_are_of_the_source(images: str, source: str) -> None:
    config = expert(images, resist={"source": "npz", "source_dir": source, "target_share": 0.0})
    prepared = prepare(config, model=make_toy_model())
    assert prepared.steps_per_epoch == SOURCES // 8 and len(prepared.parts[0]) == 0
    pictures = prepared.views[prepared.indices(0)[:, 0]].reshape(-1, *IMAGE)
    with np.load(source) as other:
        assert sorted(x.tobytes() for x in pictures) == sorted(x.tobytes() for x in other["x_train"])


def test_presets_normalise_the_source(images: str, source: str) -> None:
    """By the statistics of the target, or by its own, as the official code does."""
    views, prepared = {}, {}
    for preset in ("corrected", "faithful"):
        more = {"source": "npz", "source_dir": source, "preset": preset, "strength": 0.0}
        prepared[preset] = prepare(expert(images, resist=more), model=make_toy_model())
        batch = prepared[preset].views[prepared[preset].indices(0)[0]]
        views[preset] = prepared[preset].make_views(jax.random.key(0), jnp.asarray(batch))
    dataset = prepared["faithful"].dataset
    with np.load(source) as other:
        pixels = other["x_train"] / 255
    for right, official in zip(views["corrected"], views["faithful"], strict=True):
        np.testing.assert_array_equal(right[:, :4], official[:, :4])
        drawn = np.asarray(right[:, 4:]) * np.array(dataset.std) + np.array(dataset.mean)
        mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
        own = normalise(np.clip(drawn, 0, 1).astype(np.float32), mean, std)
        np.testing.assert_allclose(official[:, 4:], own, rtol=1e-3, atol=1e-3)
        assert np.max(np.abs(official[:, 4:] - right[:, 4:])) > 0.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"resist": {"strength": -1.0}}, "config.resist.strength: found -1.0, allowed: 0.0 or more"),
        (
            {"resist": {"ssim_target": 1.0}},
            "config.resist.ssim_target: found 1.0, allowed: more than 0",
        ),
        ({"resist": {"ssim_target": 0.0}}, "config.resist.ssim_target: found 0.0"),
        ({"resist": {"preset": "best"}}, "config.resist.preset: found 'best', allowed: corrected, faithful"),
        ({"resist": {"decoder": "unet"}}, "config.resist.decoder: found 'unet', allowed: res_normNxCy"),
        ({"resist": {"target_share": 0.0}}, "config.resist.target_share: found 0, allowed: more than 0"),
        (
            {"resist": {"target_share": 1e-5}},
            "config.resist.target_share: found 1e-05, 0 of 48 images, allowed: 8 images or more",
        ),
        ({"model": Model(cut_layer=0)}, "config.model.cut_layer: found 0, allowed: 1 or more"),
        ({"optim": Optim(client_lr=0.0)}, "config.optim.client_lr: found 0, allowed: more than 0"),
        (
            {"resist": {"target_share": 0.5}, "clients": Clients(num=2, batch_size=4)},
            "config.clients.num: found 2, allowed: 1 with a config.resist.target_share",
        ),
        (
            {"algorithm": "flmoco", "clients": Clients(num=2, batch_size=4)},
            "config.algorithm: found flmoco, allowed: mocosfl",
        ),
        (
            {"resist": {"source": "npz", "source_dir": "nowhere"}},
            "config.resist.source_dir: nowhere does not exist",
        ),
        (
            {"resist": {"source": "npz"}, "clients": Clients(num=1, batch_size=7)},
            "config.clients.batch_size: found 7, allowed: even numbers",
        ),
    ],
)
def test_impossible_settings_are_refused(images: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        prepare(expert(images, **changes), model=make_toy_model())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_sources_that_do_not_fit_are_refused(images: str, source: str, tmp_path: pathlib.Path) -> None:
    large = write_images(tmp_path / "large.npz", (8, 8, 3))
    for more, message in (
        ({"source_dir": large}, "config.resist.source: found npz with images of 8x8 pixels, allowed: 4x4"),
        (
            {"source_dir": source, "target_share": 0.02},
            "config.resist.target_share: found 0.02, 1 of 48 images, allowed: 4 images or more",
        ),
    ):
        with pytest.raises(ValueError) as error:
            prepare(expert(images, resist={"source": "npz"} | more), model=make_toy_model())
        assert str(error.value).startswith(message)


def test_a_source_is_part_of_what_identifies_the_data(
    images: str, source: str, tmp_path: pathlib.Path
) -> None:
    config = expert(images, resist={"source": "npz", "source_dir": source})
    train(config, tmp_path / "run", on_epoch=lambda m, s: m["epoch"] == 1)
    other = tmp_path / "other.npz"
    with np.load(source) as arrays:
        np.savez(other, **{**arrays, "x_train": 255 - arrays["x_train"]})
    pathlib.Path(source).rename(tmp_path / "kept.npz")
    other.rename(source)
    try:
        with pytest.raises(ValueError, match=r"found other data than those of the run.*other source pixels"):
            train(config, tmp_path / "run")
    finally:
        (tmp_path / "kept.npz").rename(source)


def test_a_source_may_move(
    images: str, source: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the data set may: what identifies it is not where it is."""
    train(expert(images, resist={"source": "npz", "source_dir": source}), tmp_path / "run")
    moved = str(pathlib.Path(source).rename(tmp_path / "moved.npz"))
    try:
        again = train(expert(images, resist={"source": "npz", "source_dir": moved}), tmp_path / "run")
        record = json.loads((tmp_path / "run" / "config.json").read_text())
        record["resist"]["source_dir"] = source  # as on the machine where it was trained
        (tmp_path / "run" / "config.json").write_text(json.dumps(record))
        own = Own(network=constant_network(make_toy_model()))
        monkeypatch.setattr(commandline, "own_functions", lambda file: own)
        argv = ["evaluate", f"--workdir={tmp_path / 'run'}", "--probe_epochs=0"]
        assert evaluate.main(argv) == 2
        assert evaluate.main([*argv, f"--resist.source_dir={moved}"]) == 0
    finally:
        pathlib.Path(moved).rename(source)
    assert [line["epoch"] for line in again.metrics] == [0, 1, 2]


def test_clients_without_parameters_are_refused(images: str) -> None:
    toy = make_toy_model()
    bare = toy._replace(
        init=lambda rng: ({}, toy.init(rng)[1]),
        client=lambda params, x: x @ np.ones((3, 5), np.float32),
    )
    with pytest.raises(ValueError, match=r"config\.resist\.strength: found 2 and clients without parameters"):
        prepare(expert(images), model=bare)
