"""Resolves a configuration: every setting gets a value, and all values are checked.

Settings that a configuration leaves open come from the paper's defaults for N clients and from a MoCo preset.
"""

import copy
import dataclasses
import math
import operator
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mocosfl_jax.config.fields import CHOICES, Clients, Config, Moco, Optim, Synchronization
from mocosfl_jax.errors import UserError

# Each has the fields of its parent. Those that are named here have a value, whatever was left open.


@dataclasses.dataclass(slots=True, kw_only=True)
class ResolvedClients(Clients):
    """`fields.Clients` with every default filled in."""

    cohort: int
    batch_size: int
    seed: int


@dataclasses.dataclass(slots=True, kw_only=True)
class ResolvedSynchronization(Synchronization):
    """`fields.Synchronization` with every default filled in."""

    frequency: int


@dataclasses.dataclass(slots=True, kw_only=True)
class ResolvedMoco(Moco):
    """`fields.Moco` with every default filled in."""

    key_dim: int
    head: str
    symmetric: bool
    augmentation: str


@dataclasses.dataclass(slots=True, kw_only=True)
class ResolvedOptim(Optim):
    """`fields.Optim` with every default filled in."""

    client_lr: float
    schedule: str
    client_schedule: str


@dataclasses.dataclass(slots=True, kw_only=True)
class Resolved(Config):
    """A `fields.Config` in which no value depends on a preset or on the number of clients any more."""

    clients: ResolvedClients
    sync: ResolvedSynchronization
    moco: ResolvedMoco
    optim: ResolvedOptim

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, as stored in config.json; functions by name."""
        values = dataclasses.asdict(self)
        own = {name: function and name_of(function) for name, function in values["own"].items()}
        return values | {"own": own}

    @property
    def total_epochs(self) -> int:
        """The number of epochs in the run: `epochs` times N // M, as each sees only the data of a cohort."""
        return self.epochs * (self.clients.num // self.clients.cohort)

    @property
    def clients_skip_steps(self) -> bool:
        """Whether some steps of the run do not train all clients."""
        return self.clients.cohort < self.clients.num or self.saving.loss_threshold > 0


def name_of(function: Callable[..., Any]) -> str:
    """The name by which config.json knows a function: the last part of its module, and its own name.

    Example:
      >>> name_of(resolve)
      'resolution.resolve'
    """
    code = getattr(function, "__code__", None)
    module = function.__module__
    if module == "<run_path>" and code:  # a config file
        module = Path(code.co_filename).stem
    return f"{module.rpartition('.')[2]}.{getattr(function, '__qualname__', type(function).__name__)}"


def resolve(config: Config) -> Resolved:
    """Fills in every field that depends on a preset or on N, and checks all fields.

    `config` itself is not changed.

    Example:
      >>> resolved = resolve(Config())  # 100 clients, preset v2
      >>> resolved.clients.batch_size, resolved.sync.frequency, resolved.moco.key_dim
      (1, 10, 1024)

    Raises:
      UserError: If a field has a wrong type or an impossible value. The message names the first one.
    """
    _check_types(config, "config")
    config = copy.deepcopy(config)
    moco, optim, clients, sync = config.moco, config.optim, config.clients, config.sync
    _allow("moco.preset", moco.preset)
    _fill(moco, _PRESETS[moco.preset])
    _fill(optim, {"schedule": _PRESET_SCHEDULE[moco.preset], "client_lr": optim.server_lr})
    _fill(optim, {"client_schedule": optim.schedule})
    _in_range("clients.num", clients.num, 1)
    paper = paper_settings(clients.num)
    _fill(clients, {"batch_size": paper.batch_size, "cohort": paper.cohort, "seed": config.seed})
    _fill(sync, {"frequency": paper.sync_frequency})
    resolved = _as_resolved(config)
    _check_values(resolved)
    return resolved


def _as_resolved(config: Config) -> Resolved:
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    kinds = {
        "clients": ResolvedClients,
        "sync": ResolvedSynchronization,
        "moco": ResolvedMoco,
        "optim": ResolvedOptim,
    }
    filled = {name: kind(**dataclasses.asdict(sections[name])) for name, kind in kinds.items()}
    return Resolved(**sections | filled)


class PaperSettings(NamedTuple):
    """The settings of the paper's experiments that depend on the number of clients alone."""

    batch_size: int  # B, images per client and step
    cohort: int  # M, clients per epoch
    sync_frequency: int  # synchronizations per epoch


def paper_settings(num_clients: int) -> PaperSettings:
    """The settings of the paper's tables for N clients, as the official code's auto_adjust computes them.

    Example:
      >>> paper_settings(1000)
      PaperSettings(batch_size=1, cohort=100, sync_frequency=1)
    """
    batch_size = 100 // num_clients if num_clients <= 50 else 1
    cohort = num_clients if num_clients < 200 else num_clients // (num_clients // 100)
    return PaperSettings(batch_size, cohort, max(1, 1000 // (batch_size * num_clients)))


_V2 = {"head": "mlp", "symmetric": True, "augmentation": "v2"}
_PRESETS: dict[str, dict[str, Any]] = {
    "v1": {"key_dim": 128, "head": "linear", "symmetric": False, "augmentation": "v1"},
    "small_v2": {"key_dim": 512} | _V2,
    "v2": {"key_dim": 1024} | _V2,
    "large_v2": {"key_dim": 2048} | _V2 | {"head": "mlp_bn"},
}
PRESET_FIELDS = tuple(_PRESETS["v2"])  # of the section `moco`
_PRESET_SCHEDULE = {"v1": "multistep", "small_v2": "cosine", "v2": "cosine", "large_v2": "cosine"}


def _fill(node: Any, values: dict[str, Any]) -> None:
    """Sets the fields that are None to these values."""
    for field, value in values.items():
        if getattr(node, field) is None:
            setattr(node, field, value)


def _check_types(node: Any, path: str) -> None:
    """Checks the type of every field. Config files are Python, so a field can hold anything."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        assert not isinstance(field.type, str)
        allowed = typing.get_args(field.type) or (field.type,)
        if dataclasses.is_dataclass(field.type):
            if type(value) is not field.type:
                raise UserError(f"{path}.{field.name}: found {value!r}, allowed: a {allowed[0].__name__}")
            _check_types(value, f"{path}.{field.name}")
            continue
        if path == "config.own":
            if value is not None and not callable(value):
                raise UserError(f"{path}.{field.name}: found {value!r}, allowed: a function or None")
            continue
        fits = isinstance(value, int) and not isinstance(value, bool) if float in allowed else False
        if not fits and type(value) not in allowed:
            names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
            raise UserError(f"{path}.{field.name}: found {value!r}, allowed: {names}")
        if isinstance(value, int) and abs(value) >= 2**63:  # larger ones overflow in arithmetic with floats
            raise UserError(f"{path}.{field.name}: found {value}, allowed: a number of 64 bits")


def _check_values(config: Resolved) -> None:
    """Checks everything that is known before data is read and a network is built."""
    clients, sync, moco, optim = config.clients, config.sync, config.moco, config.optim
    evaluation, saving = config.eval, config.saving
    for field in CHOICES:
        _allow(field, operator.attrgetter(field)(config))
    _in_range("seed", config.seed, 0, 2**32 - 1)
    _in_range("clients.seed", clients.seed, 0, 2**32 - 1)
    _in_range("epochs", config.epochs, 1)
    _in_range("data.max_broken", config.data.max_broken, 0.0, 1.0)
    if config.data.image_size is not None:
        _in_range("data.image_size", config.data.image_size, 1)
    _in_range("clients.cohort", clients.cohort, 1, clients.num, "the clients of the pool")
    _in_range("clients.batch_size", clients.batch_size, 1)
    _in_range("clients.noniid_ratio", clients.noniid_ratio, 0.0, 1.0, open_low=True)
    if clients.dirichlet_alpha is not None:
        _in_range("clients.dirichlet_alpha", clients.dirichlet_alpha, 0.0, open_low=True)
    if not 0 <= clients.rich < 1:
        raise UserError(f"config.clients.rich: found {clients.rich}, allowed: 0 or more, less than 1")
    if clients.rich:
        if round(clients.rich * clients.num) >= clients.num:
            raise UserError(
                f"config.clients.rich: found {clients.rich} of {clients.num} clients, allowed: a share that "
                "leaves a poor one"
            )
        why = "with rich clients, one of them rich and one poor"
        _in_range("clients.cohort", clients.cohort, 2, clients.num, why)
    if not 0 < clients.rich_data < 1:
        raise UserError(
            f"config.clients.rich_data: found {clients.rich_data}, allowed: more than 0, less than 1"
        )
    _in_range("clients.rich_batch", clients.rich_batch, 1)
    _in_range("clients.local_epochs", clients.local_epochs, 1)
    _in_range("sync.frequency", sync.frequency, 1)
    if sync.divergence_lambda is not None:
        _in_range("sync.divergence_lambda", sync.divergence_lambda, 0.0, open_low=True)
    _in_range("saving.loss_threshold", saving.loss_threshold, 0.0)
    if saving.loss_threshold and sync.momentum_models and sync.divergence_lambda is not None:
        # Momentum models would part in an epoch without gradients, and be averaged when a run stops in it.
        raise UserError(
            f"config.saving.loss_threshold: found {saving.loss_threshold} with sync.momentum_models and "
            "sync.divergence_lambda, allowed: 0.0"
        )
    _in_range("saving.warmup_epochs", saving.warmup_epochs, 0)
    _in_range("saving.replay_gib", saving.replay_gib, 0.0, open_low=True)
    own_steps = config.optim.client_schedule == "official_per_step" and config.clients_skip_steps
    if own_steps and sync.buffers != "keep":
        raise UserError(
            f"config.sync.buffers: found {sync.buffers}, allowed: keep with official_per_step where clients "
            "skip steps, since each then counts its own"
        )
    _in_range("model.cut_layer", config.model.cut_layer, 0)
    _in_range("moco.key_dim", moco.key_dim, 1)
    views = 2 if moco.symmetric or moco.full_symmetric else 1
    largest = clients.batch_size * (clients.rich_batch if clients.rich else 1)
    if config.own.algorithm:  # which may not need a queue
        _in_range("moco.queue_size", moco.queue_size, 0)
    elif config.algorithm == "flmoco" or (moco.feature_sharing and not moco.concatenate):
        _in_range("moco.queue_size", moco.queue_size, largest * views, why="a client's keys of one step")
    elif not moco.feature_sharing:
        keys = clients.num * largest * views
        _in_range("moco.queue_size", moco.queue_size, keys, why="the keys of one step in N queues")
    elif not clients.rich:  # `experiment.prepare` knows how many of a cohort are rich
        keys = clients.cohort * largest * views
        _in_range("moco.queue_size", moco.queue_size, keys, why="the keys of one step")
    if moco.head == "mlp_bn":
        _check_batch_norm(config)
    _in_range("moco.temperature", moco.temperature, 0.0, open_low=True)
    _in_range("moco.momentum", moco.momentum, 0.0, 1.0)
    _in_range("moco.min_crop_scale", moco.min_crop_scale, 0.0, 1.0, open_low=True)
    for name in ("server_lr", "client_lr", "weight_decay"):
        _in_range(f"optim.{name}", getattr(optim, name), 0.0)
    _in_range("optim.momentum", optim.momentum, 0.0, 1.0)
    _in_range("eval.every", evaluation.every, 0)
    _in_range("eval.knn_k", evaluation.knn_k, 1)
    _in_range("eval.knn_temperature", evaluation.knn_temperature, 0.0, open_low=True)
    _in_range("eval.probe_epochs", evaluation.probe_epochs, 0)
    _in_range("checkpoint.every", config.checkpoint.every, 1)
    _in_range("checkpoint.keep", config.checkpoint.keep, 1)
    _check_resist(config)
    _in_range("privacy.noise", config.privacy.noise, 0.0)
    _in_range("privacy.clip", config.privacy.clip, 0.0, open_low=True)
    _in_range("wire.deadline_s", config.wire.deadline_s, 0.0, open_low=True)
    _in_range("wire.least", config.wire.least, 1, clients.cohort, "the clients of the cohort")
    _check_init_parts(config)
    for axis in ("data", "model"):
        if getattr(config.mesh, axis) is not None:
            _in_range(f"mesh.{axis}", getattr(config.mesh, axis), 1)
    if not moco.concatenate:
        _check_one_by_one(config)
    if config.algorithm == "flmoco":
        _only_mocosfl(config)
    elif clients.local_epochs != 1:
        raise UserError(f"config.clients.local_epochs: found {clients.local_epochs}, allowed: 1 (not flmoco)")


def _check_init_parts(config: Resolved) -> None:
    found = f"config.init_parts: found {config.init_parts}"
    if config.init_parts != "both" and config.init_from is None:
        raise UserError(f"{found} without config.init_from, allowed: both")
    if config.init_parts == "client" and config.model.cut_layer == 0 and not config.own.network:
        raise UserError(f"{found} and config.model.cut_layer 0, allowed: server or both")


def _check_resist(config: Resolved) -> None:
    """Checks the section `resist`."""
    resist = config.resist
    _in_range("resist.strength", resist.strength, 0.0)
    if not 0 < resist.ssim_target < 1:
        raise UserError(
            f"config.resist.ssim_target: found {resist.ssim_target}, allowed: more than 0, less than 1"
        )
    _in_range("resist.decoder_lr", resist.decoder_lr, 0.0)
    _in_range("resist.target_share", resist.target_share, 0.0, 1.0)
    _in_range("resist.judge_every", resist.judge_every, 0)
    _in_range("resist.judge_images", resist.judge_images, 20)
    _in_range("resist.judge_epochs", resist.judge_epochs, 1)
    _in_range("resist.judge_margin", resist.judge_margin, 0.0)
    if resist.source is None and resist.target_share == 0:
        raise UserError("config.resist.target_share: found 0, allowed: more than 0 without a resist.source")
    if resist.source is not None or resist.target_share < 1:
        given = "resist.source" if resist.source is not None else "resist.target_share"
        for field, value, allowed in (
            ("clients.num", config.clients.num, 1),
            ("algorithm", config.algorithm, "mocosfl"),
            ("moco.full_symmetric", config.moco.full_symmetric, False),
            ("sync.weighted", config.sync.weighted, False),
        ):
            if value != allowed:
                raise UserError(f"config.{field}: found {value}, allowed: {allowed} with a config.{given}")
    if resist.source is not None and resist.target_share and config.clients.batch_size % 2:
        raise UserError(
            f"config.clients.batch_size: found {config.clients.batch_size}, allowed: even numbers, half of a "
            "step's images are from config.resist.source"
        )
    if not resist.strength:
        return
    for name, wrong, found, other in (
        ("algorithm", config.algorithm == "flmoco", config.algorithm, "mocosfl"),
        ("model.cut_layer", config.model.cut_layer == 0, 0, "1 or more"),
        ("optim.client_lr", config.optim.client_lr == 0, 0, "more than 0"),
        ("saving.loss_threshold", config.saving.loss_threshold > 0, config.saving.loss_threshold, "0"),
        ("privacy.noise", config.privacy.noise > 0, config.privacy.noise, "0"),
    ):
        if wrong:
            raise UserError(f"config.{name}: found {found}, allowed: {other} with a config.resist.strength")


def _check_batch_norm(config: Resolved) -> None:
    """Refuses a head with batch norm over one row, which is constant: nothing would be learnt."""
    clients, moco = config.clients, config.moco
    rows = clients.batch_size * (2 if moco.full_symmetric else 1)
    what = "a client"
    if config.algorithm != "flmoco" and moco.concatenate:
        what = "the cohort"
        rows *= clients.cohort
    if rows == 1:
        raise UserError(
            f"config.moco.head: found mlp_bn where {what} has one image in a step, over which batch norm is "
            "constant, allowed: linear, mlp, or a larger config.clients.batch_size"
        )


def _check_one_by_one(config: Resolved) -> None:
    """Refuses what cannot be without vector concatenation."""
    for field, value in (("clients.rich", config.clients.rich), ("resist.strength", config.resist.strength)):
        if value:
            raise UserError(f"config.moco.concatenate: found False, allowed: True with a config.{field}")


def _only_mocosfl(config: Resolved) -> None:
    """Refuses options that FL-MoCo does not have, since it trains no server."""
    for field, value, allowed in (
        ("clients.rich", config.clients.rich, 0.0),
        ("moco.feature_sharing", config.moco.feature_sharing, True),
        ("moco.concatenate", config.moco.concatenate, True),
        ("moco.full_symmetric", config.moco.full_symmetric, False),
        ("saving.loss_threshold", config.saving.loss_threshold, 0.0),
        ("model.bottleneck", config.model.bottleneck, None),
        ("privacy.noise", config.privacy.noise, 0.0),
    ):
        if value != allowed:
            raise UserError(f"config.{field}: found {value}, allowed: {allowed} for flmoco")
    if config.optim.client_schedule == "official_per_step":
        raise UserError(
            "config.optim.client_schedule: found official_per_step, allowed: another for flmoco, whose rate "
            "falls from epoch to epoch in the official code too"
        )
    if config.optim.client_lr == 0:
        raise UserError(
            "config.optim.client_lr: found 0, allowed: more than 0 for flmoco, which trains no server"
        )


def _allow(field: str, value: Any) -> None:
    """Refuses a word that `CHOICES` does not have."""
    if value not in CHOICES[field]:
        raise UserError(f"config.{field}: found {value!r}, allowed: {', '.join(CHOICES[field])}")


def _in_range(
    field: str, value: float, low: float, high: float = math.inf, why: str = "", *, open_low: bool = False
) -> None:
    """Refuses values outside [low, high], and `low` itself if `open_low`; `why` explains the bound."""
    if math.isfinite(value) and low <= value <= high and not (open_low and value == low):
        return
    bounds = f"more than {low:g}" if open_low else f"{low} or more"
    if high < math.inf:
        bounds = f"more than {low:g}, at most {high:g}" if open_low else f"{low} to {high}"
    raise UserError(f"config.{field}: found {value}, allowed: {bounds}" + (f" ({why})" if why else ""))
