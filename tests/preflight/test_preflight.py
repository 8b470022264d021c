"""The command: mistakes in one line everywhere, and a toy run compiled for TPUs where their compiler is."""

import importlib.util
import json
from typing import Any

import jax
import numpy as np
import pytest

from mocosfl_jax import config
from mocosfl_jax.costs import accounting
from mocosfl_jax.data import canvas
from mocosfl_jax.errors import UserError
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.preflight import __main__ as preflight
from mocosfl_jax.preflight import figures, programs
from mocosfl_jax.preflight.devices import KINDS

TOY = [
    "preflight",
    "--config.model.name=resnet18",
    "--config.model.width=4",
    "--config.clients.num=8",
    "--config.clients.cohort=4",
    "--config.clients.batch_size=2",
    "--config.moco.queue_size=200",
    "--config.moco.key_dim=8",
]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device=v4"], "flag --device=v4: value should be one of <v5e|v5p|v6e|h100|h200|a100>"),
        (["--devices=0"], "flag --devices=0: 0 is not a positive integer"),
        (["--devices=300"], "--devices: found 300, allowed: 1 to 256 of v5e"),
        (["--programs=round,test"], "--programs: found test, allowed: init, enter, round"),
        (["--config.clients.num=-1"], "config.clients.num: found -1"),
        (["--config.data.image_size=0"], "config.data.image_size: found 0, allowed: 1 or more"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    assert preflight.main([*TOY, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("device, extra", [("v5e", "preflight-tpu"), ("h100", "preflight-cuda")])
def test_a_missing_compiler_is_named_with_its_extra(
    device: str, extra: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert preflight.main([*TOY, f"--device={device}"]) == 2
    error = capsys.readouterr().err
    assert f"pip install 'mocosfl-jax[{extra}]'" in error and error.count("\n") == 1


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def described(images: int | None = None, **fields: Any) -> Any:
    """A run on the CPU's devices, whose compiler is always here."""
    values = config.quickstart()
    values.model.name, values.model.width = "vgg11", 4
    values.clients.num, values.clients.cohort = 8, 4
    values.clients.batch_size, values.moco.queue_size, values.moco.key_dim = 2, 200, 8
    for name, value in fields.items():
        setattr(values.data, name, value)
    mesh = meshes.make_mesh(config.Mesh(data=2, model=1), jax.devices()[:2])
    return programs.describe(config.resolve(values), mesh, 2**34, images)


def test_sets_of_pictures_are_streamed_or_held_as_the_whole_images_of_training() -> None:
    """imagenet12 is always resized, so views are cropped from canvases of the whole images."""
    run = described(name="imagenet12")
    assert run.views.shape[1:] == canvas.shape(224) == (449, 448, 3)
    assert described(name="tiny_imagenet", image_size=64).views.shape[1:] == canvas.shape(64)
    for fields in ({"name": "tiny_imagenet"}, {"name": "stl10", "image_size": 96}):
        size = 64 if fields["name"] == "tiny_imagenet" else 96
        assert described(**fields).views.shape[1:] == (size, size, 3)


@pytest.mark.parametrize(
    "images, message",
    [
        (1, "config.clients.batch_size: found 2, allowed: 1 to 1, the images there are"),
        (15, "config.clients.num: found 8, allowed: 1 to 7 (15 images in batches of 2)"),
    ],
)
def test_too_few_images_are_refused(images: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        described(images)
    assert str(error.value) == message


def test_figures_of_a_run_that_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for two CPU devices: memory by counting, and FLOPs by `costs`."""
    monkeypatch.setattr("mocosfl_jax.data.load", lambda *args, **kwargs: pytest.fail("data were read"))
    run = described()
    plans = {plan.name: plan for plan in programs.plans(run, ("round", "sync"))}
    found = {name: figures.measure(plan, KINDS["h100"], 2) for name, plan in plans.items()}
    pictures = 6000 * 32 * 32 * 3
    assert all(f.fits and f.memory == f.state + f.images + f.temporary for f in found.values())
    assert found["sync"].images == pictures and found["round"].images == pictures + 4 * 2 * 32 * 32 * 3 / 2
    at_rest = jax.eval_shape(run.algorithm.init, jax.random.key(0))
    state = jax.eval_shape(run.algorithm.enter, at_rest, np.zeros(4, np.int32))
    clients = nbytes((state.clients, state.pool.own))
    others = nbytes((state.server, state.pool.shared, state.cohort, state.step))
    assert abs(found["round"].state - (clients / 2 + others)) < 100  # and a key
    work = found["round"].work
    assert work is not None and set(work.collectives) >= {"all-reduce"}
    costs = accounting.from_config(run.config)
    step = costs.server.flops.step + 4 * costs.client.flops.step
    assert work.flops * 2 == pytest.approx(step, rel=0.05)  # augmentation multiplies too


def test_data_of_unknown_size_are_refused() -> None:

    with pytest.raises(
        UserError, match="--images: found None for npz, allowed: its number of training images"
    ):
        described(name="npz")


@pytest.mark.parametrize(
    "message, size",
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
         "17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G.", int(17.5 * 2**30)),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
         "(54.09G) exceeds available HBM (15.75G).", int(54.09 * 2**30)),
        ("INTERNAL: Used 3G of", None),
    ],
)  # fmt: skip
def test_a_refusal_of_the_compiler_is_understood(message: str, size: int | None) -> None:
    assert figures._refused(message) == size


@pytest.mark.preflight
def test_a_toy_run_on_one_and_on_four_chips(capsys: pytest.CaptureFixture) -> None:
    found: dict[int, dict[str, Any]] = {}
    for chips in (1, 4):
        assert (
            preflight.main([*TOY, "--json", f"--devices={chips}", "--programs=enter,round,sync,encode"]) == 0
        )
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        found[chips] = {line["program"]: line for line in lines}
    one, four = found[1]["round"], found[4]["round"]
    assert (one["device"], one["devices"], four["devices"]) == ("v5e", 1, 4)
    assert one["limit_bytes"] == int(15.75 * 2**30) and one["fits"] and four["fits"]
    assert one["flops"] == pytest.approx(4 * four["flops"], rel=0.05)
    assert four["estimated_ms"] > 0 and one["estimated_ms"] > 0 and one["kernels"] > 100
    assert not one["collectives"] and set(four["collectives"]) >= {"all-reduce"}
    # The cohort's models are on one device each. XLA pads small arrays, so the state shrinks less.
    assert four["state_bytes"] < one["state_bytes"]
    # A synchronization receives one client: kernel [3, 3, 3, 4] and two vectors, whatever the cohort.
    assert sum(found[4]["sync"]["collectives"].values()) < 10 * 4 * (3 * 3 * 3 * 4 + 2 * 4 + 4)
    assert len(one["costs"]) == 10
    assert 0.1 < sum(cost["milliseconds"] for cost in one["costs"]) / one["estimated_ms"] < 1
    assert any("_Server" in cost["place"] for cost in one["costs"])


@pytest.mark.preflight
def test_a_run_that_does_not_fit_has_status_1(capsys: pytest.CaptureFixture) -> None:
    """A pool of clients of which each has a momentum model and a buffer of its own, 61 GB."""
    argv = [*TOY, "--config.clients.num=100000", "--images=200000", "--config.data.resident=False"]
    argv += ["--config.model.width=64", "--config.model.cut_layer=2", "--programs=sync"]
    assert preflight.main([*argv, "--config.data.name=npz", "--image_size=32"]) == 1
    assert "does not fit" in capsys.readouterr().out
