"""Configurations: presets, settings of the paper, and checks with their messages."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from mocosfl_jax.config import Clients, Config, Moco, Optim, differences, paper_settings, quickstart, resolve
from mocosfl_jax.errors import UserError
from mocosfl_jax.training import workdir
from tests.support.training import prepare


def test_presets_fill_in_what_is_left_open_and_nothing_else() -> None:
    v1 = resolve(Config(moco=Moco(preset="v1", key_dim=64)))
    assert (v1.moco.key_dim, v1.moco.head, v1.moco.augmentation) == (64, "linear", "v1")
    assert v1.optim.schedule == "multistep"
    v2 = resolve(Config())
    assert (v2.moco.key_dim, v2.moco.head, v2.moco.augmentation) == (1024, "mlp", "v2")
    assert (v2.optim.schedule, v2.clients.cohort) == ("cosine", 100)
    assert Config().moco.key_dim is None  # the original is left as it was


def test_smaller_cohorts_take_more_epochs() -> None:
    assert resolve(Config(epochs=200, clients=Clients(num=1000, cohort=100))).total_epochs == 2000
    assert resolve(Config(epochs=200, clients=Clients(num=250, cohort=100))).total_epochs == 400
    assert resolve(Config(epochs=200)).total_epochs == 200


def setter(path: str, value: object) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        node = config
        *parents, last = path.split(".")
        for part in parents:
            node = getattr(node, part)
        setattr(node, last, value)

    return change


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("epochs", 0, "config.epochs: found 0, allowed: 1 or more"),
        ("epochs", 2.0, "config.epochs: found 2.0, allowed: int"),
        ("epochs", True, "config.epochs: found True, allowed: int"),
        ("seed", -1, "config.seed: found -1"),
        ("seed", 10**400, "config.seed: found 1000"),
        ("optim.server_lr", 2**1024, "config.optim.server_lr: found 1797"),
        ("data.name", None, "config.data.name: found None, allowed: str"),
        ("clients.num", "20", "config.clients.num: found '20', allowed: int"),
        (
            "clients.cohort",
            101,
            "config.clients.cohort: found 101, allowed: 1 to 100 (the clients of the pool)",
        ),
        ("clients.cohort", 1.5, "config.clients.cohort: found 1.5, allowed: int or None"),
        (
            "clients.rich",
            0.999,
            "config.clients.rich: found 0.999 of 100 clients, allowed: a share that leaves a poor one",
        ),
        ("clients.batch_size", 0, "config.clients.batch_size: found 0"),
        (
            "clients.noniid_ratio",
            0.0,
            "config.clients.noniid_ratio: found 0.0, allowed: more than 0, at most 1",
        ),
        ("clients.noniid_ratio", 1.2, "config.clients.noniid_ratio: found 1.2"),
        ("clients.dirichlet_alpha", float("nan"), "config.clients.dirichlet_alpha: found nan"),
        ("sync.frequency", 0, "config.sync.frequency: found 0"),
        ("moco.preset", "v3", "config.moco.preset: found 'v3', allowed: v1, small_v2, v2, large_v2"),
        ("moco.augmentation", "none", "config.moco.augmentation: found 'none', allowed: v1, v2"),
        (
            "moco.queue_size",
            199,
            "config.moco.queue_size: found 199, allowed: 200 or more (the keys of one step)",
        ),
        ("privacy.noise", -1.0, "config.privacy.noise: found -1.0, allowed: 0.0 or more"),
        ("privacy.clip", 0.0, "config.privacy.clip: found 0.0, allowed: more than 0"),
        ("moco.temperature", 0.0, "config.moco.temperature: found 0.0, allowed: more than 0"),
        ("moco.momentum", 1.01, "config.moco.momentum: found 1.01, allowed: 0.0 to 1.0"),
        ("moco.min_crop_scale", 0.0, "config.moco.min_crop_scale: found 0.0"),
        ("optim.server_lr", float("inf"), "config.optim.server_lr: found inf"),
        ("optim.schedule", "linear", "config.optim.schedule: found 'linear', allowed: cosine, multistep"),
        ("model.cut_layer", -1, "config.model.cut_layer: found -1"),
        ("algorithm", "fedavg", "config.algorithm: found 'fedavg', allowed: mocosfl, flmoco"),
        ("moco.head", "deep", "config.moco.head: found 'deep', allowed: linear, mlp, mlp_bn"),
        ("sync.buffers", "drop", "config.sync.buffers: found 'drop', allowed: keep, reset, average"),
        ("sync.divergence_lambda", 0.0, "config.sync.divergence_lambda: found 0.0, allowed: more than 0"),
        ("clients.rich", 1.0, "config.clients.rich: found 1.0, allowed: 0 or more, less than 1"),
        ("clients.rich_data", 1.0, "config.clients.rich_data: found 1.0, allowed: more than 0, less than 1"),
        ("clients.local_epochs", 2, "config.clients.local_epochs: found 2, allowed: 1 (not flmoco)"),
        ("saving.loss_threshold", -0.1, "config.saving.loss_threshold: found -0.1, allowed: 0.0 or more"),
        ("eval.every", -1, "config.eval.every: found -1"),
        ("checkpoint.keep", 0, "config.checkpoint.keep: found 0"),
        ("clients", None, "config.clients: found None, allowed: a Clients"),
    ],
)
def test_impossible_values_are_named(path: str, value: object, message: str) -> None:
    config = Config()
    setter(path, value)(config)
    with pytest.raises(UserError) as error:
        resolve(config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_misspelt_field_cannot_be_set() -> None:
    with pytest.raises(AttributeError):
        Config().epoch = 3  # type: ignore[attr-defined]


def test_an_asymmetric_loss_needs_half_the_queue() -> None:
    assert resolve(Config(moco=Moco(preset="v1", queue_size=100))).moco.queue_size == 100


def test_differences_name_field_and_values() -> None:
    one, other = dataclasses.asdict(Config()), dataclasses.asdict(Config(epochs=3, clients=Clients(num=7)))
    assert differences(one, one) == []
    assert differences(one, other) == [
        "config.epochs: 200 there, 3 now",
        "config.clients.num: 100 there, 7 now",
    ]
    del one["model"]["norm"]
    assert "config.model.norm: None there, 'group' now" in differences(one, other)


@pytest.mark.parametrize(
    "num_clients, expected",
    [
        # B = 100 // N up to 50 clients; a cohort of about 100 from 200 clients on; 1000 images between syncs.
        (1, (100, 1, 10)),
        (5, (20, 5, 10)),
        (20, (5, 20, 10)),
        (50, (2, 50, 10)),
        (51, (1, 51, 19)),
        (100, (1, 100, 10)),
        (200, (1, 100, 5)),
        (250, (1, 125, 4)),
        (1000, (1, 100, 1)),
        (3000, (1, 100, 1)),
    ],
)
def test_settings_of_the_paper(num_clients: int, expected: tuple[int, int, int]) -> None:
    assert paper_settings(num_clients) == expected
    resolved = resolve(Config(clients=Clients(num=num_clients)))
    found = (resolved.clients.batch_size, resolved.clients.cohort, resolved.sync.frequency)
    assert found == expected
    assert resolved.total_epochs == 200 * (num_clients // expected[1])


@pytest.mark.parametrize(
    "preset, expected",
    [
        ("v1", (128, "linear", False, "v1", "multistep")),
        ("small_v2", (512, "mlp", True, "v2", "cosine")),
        ("v2", (1024, "mlp", True, "v2", "cosine")),
        ("large_v2", (2048, "mlp_bn", True, "v2", "cosine")),
    ],
)
def test_presets_of_the_paper(preset: str, expected: tuple[object, ...]) -> None:
    config = resolve(Config(moco=Moco(preset=preset)))
    moco = config.moco
    found = (moco.key_dim, moco.head, moco.symmetric, moco.augmentation, config.optim.schedule)
    assert found == expected
    assert config.optim.client_schedule == config.optim.schedule
    assert config.optim.client_lr == config.optim.server_lr


def test_a_cohort_of_one_has_no_place_for_the_poor() -> None:
    """Its only client would always be a rich one."""
    with pytest.raises(UserError, match=r"config.clients.cohort: found 1, allowed: 2 to 100 \(with rich cl"):
        resolve(Config(clients=Clients(num=100, cohort=1, rich=0.2)))
    assert resolve(Config(clients=Clients(num=100, cohort=2, rich=0.2))).clients.cohort == 2
    assert resolve(Config(clients=Clients(num=100, cohort=1))).clients.cohort == 1


def test_a_queue_below_the_keys_of_a_step_of_rich_and_poor_is_refused() -> None:
    """A cohort of two has a rich client, with a batch of 16, though a fifth of two rounds to none."""
    config = quickstart()
    config.clients = Clients(num=100, cohort=2, batch_size=1, rich=0.2)
    config.moco.symmetric = True
    config.moco.queue_size = 33
    with pytest.raises(UserError, match=r"config.moco.queue_size: found 33, allowed: 34 or more \(the keys"):
        prepare(config)
    config.moco.queue_size = 34
    assert prepare(config).images_per_step == 17


def test_clients_that_skip_steps_count_their_own() -> None:
    """Averages would mix the counts; FL-MoCo has no such schedule."""
    config = Config(optim=Optim(client_schedule="official_per_step"))
    config.clients.num, config.sync.buffers = 20, "average"
    resolve(config)  # all clients take part in all steps
    config.clients.cohort = 10
    with pytest.raises(ValueError, match=r"config\.sync\.buffers: found average, allowed: keep with"):
        resolve(config)
    config.sync.buffers, config.algorithm = "keep", "flmoco"
    with pytest.raises(ValueError, match=r"config\.optim\.client_schedule: found official_per_step, allowed"):
        resolve(config)


@pytest.mark.parametrize(
    "algorithm, clients, more, refused",
    [
        ("flmoco", Clients(num=100), {}, "where a client has one image in a step"),  # the paper's B is 1
        ("flmoco", Clients(num=100), {"head": "mlp"}, None),
        ("flmoco", Clients(num=50), {}, None),  # two images
        ("mocosfl", Clients(num=100), {}, None),
        ("mocosfl", Clients(num=100, cohort=1), {}, "where the cohort has one image in a step"),
        ("mocosfl", Clients(num=100), {"concatenate": False}, "where a client has one image in a step"),
        ("mocosfl", Clients(num=50), {"concatenate": False}, None),
        ("mocosfl", Clients(num=1, batch_size=1), {"preset": "v2", "head": "mlp_bn"}, "the cohort has one"),
        (
            "mocosfl",
            Clients(num=100, cohort=1),
            {"full_symmetric": True},
            None,
        ),  # both views are in the batch
        ("mocosfl", Clients(num=100, cohort=2), {}, None),
    ],
)
def test_batch_norm_over_one_row_is_refused(
    algorithm: str, clients: Clients, more: dict[str, Any], refused: str | None
) -> None:
    """The output would be the same for every image, whatever the network learns."""
    config = Config(algorithm=algorithm, clients=clients, moco=Moco(**{"preset": "large_v2"} | more))
    if refused is None:
        resolve(config)
        return
    with pytest.raises(UserError, match=r"config.moco.head: found mlp_bn .*constant, allowed: ") as error:
        resolve(config)
    assert refused in str(error.value)


def test_without_concatenation_a_queue_holds_the_keys_of_a_client() -> None:
    config = Config(clients=Clients(num=20), moco=Moco(concatenate=False, queue_size=10))
    assert resolve(config).moco.queue_size == 10  # two views of five images
    config.moco.queue_size = 9
    with pytest.raises(UserError, match=r"queue_size: found 9, allowed: 10 or more \(a client's keys of one"):
        resolve(config)
    config.moco.feature_sharing = False
    with pytest.raises(
        UserError, match=r"queue_size: found 9, allowed: 200 or more \(the keys of one step in"
    ):
        resolve(config)


def test_noise_is_not_combined_with_a_decoder() -> None:
    config = quickstart()
    config.resist.strength, config.privacy.noise = 1.0, 0.5
    with pytest.raises(UserError, match=r"config.privacy.noise: found 0.5, allowed: 0 with a config.resist"):
        resolve(config)


@pytest.mark.parametrize("path", ["clients.rich", "resist.strength"])
def test_what_needs_concatenation_is_refused_without(path: str) -> None:
    config = Config()
    setter(path, 0.2)(config)
    resolve(config)
    config.moco.concatenate = False
    message = rf"^config\.moco\.concatenate: found False, allowed: True with a config\.{path}$"
    with pytest.raises(UserError, match=message):
        resolve(config)


def test_models_that_would_part_without_gradients_are_refused() -> None:
    config = Config()
    config.sync.divergence_lambda, config.sync.momentum_models = 0.1, True
    resolve(config)
    config.saving.loss_threshold = 0.5
    with pytest.raises(UserError, match=r"config\.saving\.loss_threshold: found 0\.5 with sync\.momentum"):
        resolve(config)


@pytest.mark.parametrize(
    "path, value",
    [
        ("clients.rich", 0.2),
        ("moco.feature_sharing", False),
        ("moco.concatenate", False),
        ("moco.full_symmetric", True),
        ("saving.loss_threshold", 0.1),
        ("model.bottleneck", "C4S2"),
        ("optim.client_lr", 0),
    ],
)
def test_flmoco_has_no_server_to_choose_for(path: str, value: object) -> None:
    config = Config(algorithm="flmoco")
    resolve(config)
    setter(path, value)(config)
    with pytest.raises(UserError, match=f"config.{path}: found {value}, allowed: .* for flmoco"):
        resolve(config)


def test_a_run_from_before_the_choice_of_initialisation_started_from_xavier(tmp_path: pathlib.Path) -> None:
    """Its config.json has no model.init: it is read as Xavier, and resumes with that and nothing else."""
    config = quickstart()
    config.model.init = "xavier"
    earlier = resolve(config).as_dict()
    del earlier["model"]["init"]
    (tmp_path / "config.json").write_text(json.dumps(earlier))
    assert workdir.read_config(tmp_path) == resolve(config)
    assert workdir.claim(tmp_path, resolve(config), {}) == ([], False)
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    config.model.init = "official"
    with pytest.raises(UserError, match=r"config\.model\.init: 'xavier' there, 'official' now"):
        workdir.claim(tmp_path, resolve(config), {})
