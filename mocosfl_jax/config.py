"""What an experiment is: plain typed dataclasses, their defaults (the paper's) and their checks.

A file in `configs/` returns a `Config` from `get_config()`; the command line overrides single fields
(`--config.clients.num=100`). Nothing here does I/O or imports JAX.
"""

import copy
import dataclasses
import math
import typing
from typing import Any, NamedTuple

from mocosfl_jax.errors import UserError


@dataclasses.dataclass(slots=True, kw_only=True)
class Data:
    # fashion_mnist_sample, cifar10, cifar100, svhn, stl10, tiny_imagenet, imagenet12, npz, npy, image_folder,
    # or a name of tensorflow-datasets.
    name: str = "cifar10"
    # Folder of the archives, images, npy files or prepared sets; for npz, the file.
    dir: str = "data"
    # Pixels a side to which images are resized; None: as they are stored.
    image_size: int | None = None
    # Training images on the device, whole; else they are streamed from the host, with the same results. None:
    # as they fit (see batches.py).
    resident: bool | None = None
    # Share of a split's images that may be broken: they are black, counted and named. More stop the run.
    max_broken: float = 0.0


@dataclasses.dataclass(slots=True, kw_only=True)
class Clients:
    # N, the client pool.
    num: int = 100
    # M, the clients drawn for an epoch; None: the paper's for N, which is the whole pool below 200.
    cohort: int | None = None
    # B, images a client and step; None: the paper's for N, 100 // N up to 50 clients and 1 beyond.
    batch_size: int | None = None
    # Classes a client holds / classes of the data set. 1.0: IID.
    noniid_ratio: float = 0.2
    # Set: class shares of a client are drawn from Dirichlet(alpha), and noniid_ratio is not used.
    dirichlet_alpha: float | None = None
    # The first share of the pool is rich: it holds rich_data of the images, in batches rich_batch times as
    # large. The paper has 0.2, 0.8 and 16. 0: all clients are alike.
    rich: float = 0.0
    rich_data: float = 0.8
    rich_batch: int = 16
    # FL-MoCo: passes over a client's images in an epoch.
    local_epochs: int = 1


@dataclasses.dataclass(slots=True, kw_only=True)
class Sync:
    # Synchronizations (FedAvg) an epoch; None: the paper's for N, 1000 // (B N).
    frequency: int | None = None
    # Average in proportion to the clients' numbers of images.
    weighted: bool = False
    # MonAcoSFL: average the momentum models too.
    momentum_models: bool = False
    # SGD buffers of the clients: keep, reset or average.
    buffers: str = "keep"
    # Divergence-aware averaging with this first lambda; None: without.
    divergence_lambda: float | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Saving:
    # Loss by which an epoch has to get better; else the next one sends no gradients back, and the one after
    # that nothing at all: the server replays smashed data. 0: clients always take part.
    loss_threshold: float = 0.0
    # Epochs in which clients always take part.
    warmup_epochs: int = 10
    # GiB on disk, in the workdir, that the smashed data of one epoch may take.
    replay_gib: float = 20.0


@dataclasses.dataclass(slots=True, kw_only=True)
class Model:
    # resnet18, 34, 50, 101 or 152, vgg11, 13, 16 or 19, mobilenetv2.
    name: str = "resnet18"
    # Channels of the first convolution; all others scale with it. None: the paper's (64; MobileNetV2 32).
    width: int | None = None
    # Stride of the first convolution; None: the paper's for the image size.
    stem_stride: int | None = None
    # How many layers are the client's: of a ResNet [stem, block 1, ...], of a VGG convolutions and pools, of
    # MobileNetV2 [stem, group 1, ...]. "MocoSFL-1" is 1, "MocoSFL-3" is 2. 0: none, the images are sent.
    cut_layer: int = 1
    # Convolutions that make the smashed data smaller, as C4S2 or K1C8S1noReLU; None: without.
    bottleneck: str | None = None
    # Shortcuts in the client's residual blocks.
    client_residual: bool = True
    weight_standardisation: bool = True
    # group, layer or instance.
    norm: str = "group"
    # float32, or bfloat16: mixed precision, for accelerators. Convolutions, activations and smashed data are
    # then bfloat16; parameters, momentum models, queue, statistics of norms, head and losses stay float32.
    compute_dtype: str = "float32"


@dataclasses.dataclass(slots=True, kw_only=True)
class Moco:
    # v1, small_v2, v2 or large_v2. Fills in every field below that is None.
    preset: str = "v2"
    key_dim: int | None = None
    # Projection head: linear, mlp (one hidden layer) or mlp_bn (and BatchNorm).
    head: str | None = None
    symmetric: bool | None = None
    # Views: v1 (no blur) or v2.
    augmentation: str | None = None
    # MonAcoSFL: clients run both models on both views, and get gradients for both.
    full_symmetric: bool = False
    # One queue for all clients; else one of K // N keys for each.
    feature_sharing: bool = True
    # K, keys in the queue.
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
    # None: the server's. 0 freezes the clients: no gradients are sent to them.
    client_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # cosine, multistep or constant; None: the MoCo preset's (v1 multistep, else cosine).
    schedule: str | None = None
    # The clients': one of these or official_per_step, which takes a step of the schedule every batch instead
    # of every epoch, as for the paper's numbers. None: the server's.
    client_schedule: str | None = None


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
    # stop, or continue: train on without saving until there is room again.
    on_full_disk: str = "stop"


@dataclasses.dataclass(slots=True, kw_only=True)
class Mesh:
    """How many devices share the work, and how. Results do not depend on it."""

    # Devices along which clients and their data are cut; None: what `model` leaves, which is all by default.
    data: int | None = None
    # Devices along which the server's parameters and queue are cut too; None: what `data` leaves, or 1.
    model: int | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
    """One experiment. Fields take their values from a config file, then from the command line."""

    # mocosfl, or flmoco: the baseline that trains the whole network on each client.
    algorithm: str = "mocosfl"
    seed: int = 1234
    # Passes over the data at full participation; smaller cohorts take N // M times as many.
    epochs: int = 200
    data: Data = dataclasses.field(default_factory=Data)
    clients: Clients = dataclasses.field(default_factory=Clients)
    sync: Sync = dataclasses.field(default_factory=Sync)
    saving: Saving = dataclasses.field(default_factory=Saving)
    model: Model = dataclasses.field(default_factory=Model)
    moco: Moco = dataclasses.field(default_factory=Moco)
    optim: Optim = dataclasses.field(default_factory=Optim)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)

    def resolved(self) -> "Config":
        """A copy with every field filled in that was left to a preset or to N, checked.

        Raises:
          UserError: naming the first field with a wrong type or an impossible value.
        """
        _check_types(self, "config")
        config = copy.deepcopy(self)
        moco, optim, clients, sync = config.moco, config.optim, config.clients, config.sync
        _allow("moco.preset", moco.preset, tuple(_PRESETS))
        _fill(moco, _PRESETS[moco.preset])
        _fill(optim, {"schedule": _PRESET_SCHEDULE[moco.preset], "client_lr": optim.server_lr})
        _fill(optim, {"client_schedule": optim.schedule})
        _in_range("clients.num", clients.num, 1)
        paper = paper_settings(clients.num)
        _fill(clients, {"batch_size": paper.batch_size, "cohort": paper.cohort})
        _fill(sync, {"frequency": paper.sync_frequency})
        _check_values(config)
        return config

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, as config.json holds them."""
        return dataclasses.asdict(self)

    @property
    def total_epochs(self) -> int:
        """Epochs that are run: smaller cohorts take N // M times as many."""
        return self.epochs * (self.clients.num // (self.clients.cohort or self.clients.num))


class PaperSettings(NamedTuple):
    """What the paper's experiments set by the number of clients alone."""

    batch_size: int  # B
    cohort: int  # M
    sync_frequency: int  # synchronizations an epoch


def paper_settings(num_clients: int) -> PaperSettings:
    """The automatic settings of the paper's tables for N clients (the official code's auto_adjust)."""
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
_PRESET_SCHEDULE = {"v1": "multistep", "small_v2": "cosine", "v2": "cosine", "large_v2": "cosine"}


def _fill(node: Any, values: dict[str, Any]) -> None:
    """Give the fields that are None their values."""
    for field, value in values.items():
        if getattr(node, field) is None:
            setattr(node, field, value)


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
        if isinstance(value, int) and abs(value) >= 2**63:  # beyond, arithmetic with floats overflows
            raise UserError(f"{path}.{field.name}: found {value}, allowed: a number of 64 bits")


def _check_values(config: Config) -> None:
    """Everything that can be known before data is read and a network is built."""
    clients, sync, moco, optim = config.clients, config.sync, config.moco, config.optim
    evaluation, saving = config.eval, config.saving
    assert clients.cohort is not None and clients.batch_size is not None and sync.frequency is not None
    assert moco.key_dim is not None and optim.client_lr is not None
    _allow("algorithm", config.algorithm, ("mocosfl", "flmoco"))
    _allow("moco.augmentation", moco.augmentation, ("v1", "v2"))
    _allow("moco.head", moco.head, ("linear", "mlp", "mlp_bn"))
    _allow("optim.schedule", optim.schedule, ("cosine", "multistep", "constant"))
    client_schedules = ("cosine", "multistep", "constant", "official_per_step")
    _allow("optim.client_schedule", optim.client_schedule, client_schedules)
    _allow("sync.buffers", sync.buffers, ("keep", "reset", "average"))
    _in_range("seed", config.seed, 0, 2**32 - 1)
    _in_range("epochs", config.epochs, 1)
    _in_range("data.max_broken", config.data.max_broken, 0.0, 1.0)
    _in_range("clients.cohort", clients.cohort, 1, clients.num, "the clients of the pool")
    _in_range("clients.batch_size", clients.batch_size, 1)
    _in_range("clients.noniid_ratio", clients.noniid_ratio, 0.0, 1.0, open_low=True)
    if clients.dirichlet_alpha is not None:
        _in_range("clients.dirichlet_alpha", clients.dirichlet_alpha, 0.0, open_low=True)
    if not 0 <= clients.rich < 1:
        raise UserError(f"config.clients.rich: found {clients.rich}, allowed: 0 or more, less than 1")
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
    _in_range("saving.warmup_epochs", saving.warmup_epochs, 0)
    _in_range("saving.replay_gib", saving.replay_gib, 0.0, open_low=True)
    _in_range("model.cut_layer", config.model.cut_layer, 0)
    _in_range("moco.key_dim", moco.key_dim, 1)
    views = 2 if moco.symmetric or moco.full_symmetric else 1
    largest = clients.batch_size * (clients.rich_batch if clients.rich else 1)
    if config.algorithm == "flmoco":
        _in_range("moco.queue_size", moco.queue_size, largest * views, why="a client's keys of one step")
    elif not moco.feature_sharing:
        keys = clients.num * largest * views
        _in_range("moco.queue_size", moco.queue_size, keys, why="the keys of one step in N queues")
    elif not clients.rich:  # else `experiment.prepare` sees how many of the cohort are
        keys = clients.cohort * largest * views
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
    for axis in ("data", "model"):
        if getattr(config.mesh, axis) is not None:
            _in_range(f"mesh.{axis}", getattr(config.mesh, axis), 1)
    _allow("checkpoint.on_full_disk", config.checkpoint.on_full_disk, ("stop", "continue"))
    if config.algorithm == "flmoco":
        _only_mocosfl(config)
    elif clients.local_epochs != 1:
        raise UserError(f"config.clients.local_epochs: found {clients.local_epochs}, allowed: 1 (not flmoco)")


def _only_mocosfl(config: Config) -> None:
    """Refuse what FL-MoCo, which has no server to train, does not have."""
    for field, value, allowed in (
        ("clients.rich", config.clients.rich, 0.0),
        ("moco.feature_sharing", config.moco.feature_sharing, True),
        ("moco.full_symmetric", config.moco.full_symmetric, False),
        ("saving.loss_threshold", config.saving.loss_threshold, 0.0),
        ("model.bottleneck", config.model.bottleneck, None),
    ):
        if value != allowed:
            raise UserError(f"config.{field}: found {value}, allowed: {allowed} for flmoco")


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


# Fields that say how a run is done and not what comes out: a run may go on with other values.
INDIFFERENT = frozenset(
    {"config.data.resident", "config.data.max_broken", "config.checkpoint", "config.mesh"}
)


def differences(found: dict[str, Any], wanted: dict[str, Any], path: str = "config") -> list[str]:
    """The fields in which two configurations differ, as `path: found, now wanted`, but for `INDIFFERENT`."""
    lines = []
    for name in dict.fromkeys([*wanted, *found]):
        if f"{path}.{name}" in INDIFFERENT:
            continue
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
        clients=Clients(num=20, noniid_ratio=0.2),
        model=Model(name="resnet18", width=16, stem_stride=2, cut_layer=1),
        moco=Moco(preset="v2", key_dim=128, queue_size=2000, augmentation="v1", min_crop_scale=0.5),
        optim=Optim(server_lr=0.01, client_lr=0.01),
        eval=Eval(every=2),
    )
