"""What an experiment is: plain typed dataclasses with the paper's defaults.

A file in `configs/` returns a `Config` from `get_config()`; the command line overrides single fields
(`--config.clients.num=100`). A field that is None is filled in by `resolution.resolve`, unless its comment says
what None means.
"""

import dataclasses


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
class Synchronization:
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
    sync: Synchronization = dataclasses.field(default_factory=Synchronization)
    saving: Saving = dataclasses.field(default_factory=Saving)
    model: Model = dataclasses.field(default_factory=Model)
    moco: Moco = dataclasses.field(default_factory=Moco)
    optim: Optim = dataclasses.field(default_factory=Optim)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)


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
