"""What an experiment is: plain typed dataclasses, their defaults (the paper's) and their checks.

A file in `configs/` returns a `Config` from `get_config()`; the command line overrides single fields
(`--config.clients.num=100`). Nothing here does I/O or imports JAX.
"""

import copy
import dataclasses
import math
import typing
from typing import Any

from mocosfl_jax.errors import UserError


@dataclasses.dataclass(slots=True, kw_only=True)
class Data:
    # fashion_mnist_sample, cifar10, cifar100, npz, image_folder, or a name of tensorflow-datasets.
    name: str = "cifar10"
    # Folder of the archives, images or prepared sets; for npz, the file.
    dir: str = "data"
    # Pixels a side to which images are resized; none: as they are stored.
    image_size: int | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Clients:
    # N, the client pool.
    num: int = 100
    # M, the clients drawn for an epoch; none: the whole pool.
    cohort: int | None = None
    # B, images a client and step.
    batch_size: int = 1
    # Classes a client holds / classes of the data set. 1.0: IID.
    noniid_ratio: float = 0.2
    # Set: class shares of a client are drawn from Dirichlet(alpha), and noniid_ratio is not used.
    dirichlet_alpha: float | None = None
    # Synchronizations (FedAvg) an epoch.
    sync_frequency: int = 10


@dataclasses.dataclass(slots=True, kw_only=True)
class Model:
    # resnet18, resnet34 or resnet50.
    name: str = "resnet18"
    # Channels of the stem; the paper's networks have 64.
    width: int = 64
    # Stride of the stem; none: the paper's for the image size (1 at 32 px, 2 at 64 and 224 px).
    stem_stride: int | None = None
    # The first cut_layer of [stem, block 1, block 2, ...] are the client's. "MocoSFL-1" is 1, "-3" is 2.
    cut_layer: int = 1


@dataclasses.dataclass(slots=True, kw_only=True)
class Moco:
    # v1 or v2. Fills in every field below that is none.
    preset: str = "v2"
    key_dim: int | None = None
    # Hidden layer in the projection head.
    mlp: bool | None = None
    symmetric: bool | None = None
    # Views: v1 (no blur) or v2.
    augmentation: str | None = None
    # K, keys in the queue that all clients share.
    queue_size: int = 6000
    # T of InfoNCE.
    temperature: float = 0.1
    # tau of both momentum models.
    momentum: float = 0.99
    # Smallest share of the image that RandomResizedCrop keeps.
    min_crop_scale: float = 0.08


@dataclasses.dataclass(slots=True, kw_only=True)
class Optim:
    server_lr: float = 0.06
    client_lr: float = 0.06
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # cosine, multistep or constant; none: the MoCo preset's (v1 multistep, v2 cosine).
    schedule: str | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Eval:
    # Epochs between kNN evaluations; 0: only the untrained and the trained network.
    every: int = 1
    knn_k: int = 200
    knn_temperature: float = 0.1
    # Epochs of the linear probe after training; 0: no probe.
    probe_epochs: int = 100


@dataclasses.dataclass(slots=True, kw_only=True)
class Checkpoint:
    # Epochs between checkpoints. The end of the run and a signal save too.
    every: int = 1
    # Newest checkpoints kept.
    keep: int = 3


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
    """One experiment. Fields take their values from a config file, then from the command line."""

    seed: int = 1234
    # Passes over the data at full participation; smaller cohorts take N // M times as many.
    epochs: int = 200
    data: Data = dataclasses.field(default_factory=Data)
    clients: Clients = dataclasses.field(default_factory=Clients)
    model: Model = dataclasses.field(default_factory=Model)
    moco: Moco = dataclasses.field(default_factory=Moco)
    optim: Optim = dataclasses.field(default_factory=Optim)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)

    def resolved(self) -> "Config":
        """A copy with every field that was left to a preset filled in, checked.

        Raises:
          UserError: naming the first field with a wrong type or an impossible value.
        """
        _check_types(self, "config")
        config = copy.deepcopy(self)
        moco, optim, clients = config.moco, config.optim, config.clients
        _allow("moco.preset", moco.preset, tuple(_PRESETS))
        for field, value in _PRESETS[moco.preset].items():
            if getattr(moco, field) is None:
                setattr(moco, field, value)
        if optim.schedule is None:
            optim.schedule = _PRESET_SCHEDULE[moco.preset]
        if clients.cohort is None:
            clients.cohort = clients.num
        _check_values(config)
        return config

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as config.json holds them."""
        return dataclasses.asdict(self)

    @property
    def total_epochs(self) -> int:
        """Epochs that are run: smaller cohorts take N // M times as many."""
        return self.epochs * (self.clients.num // (self.clients.cohort or self.clients.num))


_PRESETS: dict[str, dict[str, Any]] = {
    "v1": {"key_dim": 128, "mlp": False, "symmetric": False, "augmentation": "v1"},
    "v2": {"key_dim": 1024, "mlp": True, "symmetric": True, "augmentation": "v2"},
}
_PRESET_SCHEDULE = {"v1": "multistep", "v2": "cosine"}


def _check_types(node: Any, path: str) -> None:
    """Config files are Python, so any value can be in any field."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        assert not isinstance(field.type, str)
        allowed = typing.get_args(field.type) or (field.type,)
        if dataclasses.is_dataclass(field.type):
            if type(value) is not field.type:
                raise UserError(f"{path}.{field.name}: found {value!r}, allowed: a {allowed[0].__name__}")
            _check_types(value, f"{path}.{field.name}")
            continue
        fits = isinstance(value, int) and not isinstance(value, bool) if float in allowed else False
        if not fits and type(value) not in allowed:
            names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
            raise UserError(f"{path}.{field.name}: found {value!r}, allowed: {names}")


def _check_values(config: Config) -> None:
    """Everything that can be known before data is read and a network is built."""
    clients, moco, optim, evaluation = config.clients, config.moco, config.optim, config.eval
    assert clients.cohort is not None
    _allow("moco.augmentation", moco.augmentation, ("v1", "v2"))
    _allow("optim.schedule", optim.schedule, ("cosine", "multistep", "constant"))
    _in_range("seed", config.seed, 0, 2**32 - 1)
    _in_range("epochs", config.epochs, 1)
    _in_range("clients.num", clients.num, 1)
    _in_range("clients.cohort", clients.cohort, 1, clients.num, "the clients of the pool")
    _in_range("clients.batch_size", clients.batch_size, 1)
    _in_range("clients.sync_frequency", clients.sync_frequency, 1)
    _in_range("clients.noniid_ratio", clients.noniid_ratio, 0.0, 1.0, open_low=True)
    if clients.dirichlet_alpha is not None:
        _in_range("clients.dirichlet_alpha", clients.dirichlet_alpha, 0.0, open_low=True)
    _in_range("model.cut_layer", config.model.cut_layer, 1)
    if config.model.stem_stride is not None:
        _in_range("model.stem_stride", config.model.stem_stride, 1, 4)
    assert moco.key_dim is not None
    _in_range("moco.key_dim", moco.key_dim, 1)
    keys = clients.cohort * clients.batch_size * (2 if moco.symmetric else 1)
    _in_range("moco.queue_size", moco.queue_size, keys, why="the keys of one step")
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


def _allow(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"config.{field}: found {value!r}, allowed: {', '.join(allowed)}")


def _in_range(
    field: str, value: float, low: float, high: float = math.inf, why: str = "", *, open_low: bool = False
) -> None:
    """`low` itself is allowed unless `open_low`; `why` says where the bound comes from."""
    if math.isfinite(value) and low <= value <= high and not (open_low and value == low):
        return
    bounds = f"more than {low:g}" if open_low else f"{low} or more"
    if high < math.inf:
        bounds = f"more than {low:g}, at most {high:g}" if open_low else f"{low} to {high}"
    raise UserError(f"config.{field}: found {value}, allowed: {bounds}" + (f" ({why})" if why else ""))


def from_dict(values: Any) -> Config:
    """The resolved configuration of which `Config.as_dict` made these values.

    Raises:
      UserError: naming the first field that is missing, unknown or impossible.
    """
    return _from_dict(Config, values, "config").resolved()


def _from_dict(kind: Any, values: Any, path: str) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {values!r}, allowed: fields {', '.join(fields)}")
    for name in [*values, *fields]:
        if name not in fields:
            raise UserError(f"{path}: found field {name!r}, allowed: {', '.join(fields)}")
        if name not in values:
            raise UserError(f"{path}.{name}: found no such field, as in a run of another version")
    return kind(
        **{
            name: _from_dict(type_, values[name], f"{path}.{name}")
            if dataclasses.is_dataclass(type_)
            else values[name]
            for name, type_ in fields.items()
        }
    )


def differences(found: dict[str, Any], wanted: dict[str, Any], path: str = "config") -> list[str]:
    """The fields in which two configurations differ, as `path: found, now wanted`."""
    lines = []
    for name in dict.fromkeys([*wanted, *found]):
        there, now = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(now, dict):
            lines += differences(there, now, f"{path}.{name}")
        elif there != now:
            lines.append(f"{path}.{name}: {there!r} there, {now!r} now")
    return lines


def quickstart() -> Config:
    """What the command runs by default: minutes on two CPU cores, no download.

    Small gray pictures and a short run want milder views and a smaller learning rate than the paper's.
    """
    return Config(
        epochs=14,
        data=Data(name="fashion_mnist_sample"),
        clients=Clients(num=20, batch_size=5, noniid_ratio=0.2, sync_frequency=10),
        model=Model(name="resnet18", width=16, stem_stride=2, cut_layer=1),
        moco=Moco(preset="v2", key_dim=128, queue_size=2000, augmentation="v1", min_crop_scale=0.5),
        optim=Optim(server_lr=0.01, client_lr=0.01),
        eval=Eval(every=2),
    )
