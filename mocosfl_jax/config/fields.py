"""What an experiment is: plain typed dataclasses, whose defaults are the paper's (Li et al., ICLR 2023).

A file in `configs/` returns a `Config` from `get_config()`. The command line overrides single fields, for
example `--config.clients.num=100`. A field that is None is filled in by `resolution.resolve`, unless its
comment gives None another meaning.

A comment is the meaning of a field, for --help and for the reference. `CHOICES` has the fields that take one
of a few words.

Symbols: N clients in the pool, M clients in the cohort, B images per client and step, K keys in the queue.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

# The words that a field may hold. `resolution.resolve` checks them, and --help shows them.
CHOICES: dict[str, tuple[str, ...]] = {
    "algorithm": ("mocosfl", "flmoco"),
    "sync.buffers": ("keep", "reset", "average"),
    "moco.preset": ("v1", "small_v2", "v2", "large_v2"),
    "moco.head": ("linear", "mlp", "mlp_bn"),
    "moco.augmentation": ("v1", "v2"),
    "optim.schedule": ("cosine", "multistep", "constant"),
    "optim.client_schedule": ("cosine", "multistep", "constant", "official_per_step"),
    "checkpoint.on_full_disk": ("stop", "continue"),
    "resist.preset": ("corrected", "faithful"),
    "init_parts": ("both", "client", "server"),
    "wire.dtype": ("exact", "float32", "bfloat16", "int8"),
}


@dataclasses.dataclass(slots=True, kw_only=True)
class Data:
    """The data set, and how it is read."""

    # fashion_mnist_sample, cifar10, cifar100, svhn, stl10, tiny_imagenet, imagenet12, npz, npy, image_folder,
    # or the name of a data set of tensorflow-datasets.
    name: str = "cifar10"
    # Folder with the archives, images, npy files or prepared data sets. For npz: the file, or its folder.
    dir: str = "data"
    # Height and width in pixels to which images are resized. None: the size in which they are stored.
    image_size: int | None = None
    # True: keep all training images on the device. False: stream them from the host. The results are the
    # same. None: keep them on the device if they are small enough (see feed/batches.py).
    resident: bool | None = None
    # Fraction of a split's images that may fail to decode. Such images become black, are counted and are
    # named in a warning. The run stops if there are more of them.
    max_broken: float = 0.0


@dataclasses.dataclass(slots=True, kw_only=True)
class Clients:
    """The client pool, the cohort, and how the images are distributed over the clients."""

    # N, the number of clients in the pool.
    num: int = 100
    # M, the number of clients that are drawn for each epoch. None: the paper's value for N, which is the
    # whole pool below 200 clients and about 100 clients from there on.
    cohort: int | None = None
    # B, the number of images per client and step. None: the paper's value for N, which is 100 // N up to 50
    # clients and 1 above.
    batch_size: int | None = None
    # Number of classes a client holds / number of classes in the data set. 1.0: IID clients.
    noniid_ratio: float = 0.2
    # If set, the images of each class are split over the clients in proportions drawn from Dirichlet(alpha),
    # and noniid_ratio is ignored.
    dirichlet_alpha: float | None = None
    # Fraction of the clients that are rich: together they hold the fraction rich_data of the images, and
    # their batches are rich_batch times as large. The paper uses 0.2, 0.8 and 16; the official code
    # 0.5, 0.8 and 4 for 200 clients. 0: all clients are alike.
    rich: float = 0.0
    # Fraction of the images that the rich clients hold together.
    rich_data: float = 0.8
    # How many times as large the batches of rich clients are.
    rich_batch: int = 16
    # FL-MoCo only: passes over a client's images per epoch.
    local_epochs: int = 1
    # Seed of the distribution of the images over the clients. None: `config.seed`.
    seed: int | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Synchronization:
    """How the client-side models are averaged (FedAvg)."""

    # Synchronizations per epoch. None: the paper's value for N, 1000 // (B N) with the paper's B, at least 1.
    frequency: int | None = None
    # Weight the clients in the average by the number of their images.
    weighted: bool = False
    # Average the momentum models too (MonAcoSFL).
    momentum_models: bool = False
    # What happens to the momentum buffers of the clients' SGD at a synchronization.
    buffers: str = "keep"
    # Use divergence-aware averaging (Zhuang et al. 2022) with this first lambda. None: plain averaging.
    divergence_lambda: float | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Saving:
    """Less communication while the loss hardly changes (the official code's loss_threshold)."""

    # If an epoch lowers the loss by less than this, the next epoch sends no gradients to the clients. If that
    # epoch does not lower it enough either, the one after sends nothing: the server replays the smashed data
    # that it has kept. 0: clients take part in every epoch.
    loss_threshold: float = 0.0
    # One more than so many first epochs have full traffic.
    warmup_epochs: int = 10
    # Limit, in GiB, of the smashed data of one epoch that is kept on disk, in the workdir.
    replay_gib: float = 20.0


@dataclasses.dataclass(slots=True, kw_only=True)
class Model:
    """The network, and where it is cut."""

    # resnet18, resnet34, resnet50, resnet101, resnet152, vgg9, vgg11, vgg13, vgg16, vgg19 or mobilenetv2.
    name: str = "resnet18"
    # Channels of the first convolution; all others scale with it. None: the paper's value, 64 (vgg9 and
    # MobileNetV2: 32).
    width: int | None = None
    # Stride of the first convolution. None: the paper's value for the image size.
    stem_stride: int | None = None
    # Number of layers on the clients. The layers of a ResNet are [stem, block 1, ...], of a VGG its
    # convolutions and pools, of MobileNetV2 [stem, group 1, ...]. The paper calls 1 MocoSFL-1 and 2
    # MocoSFL-3. 0: the clients have no layers and send their images.
    cut_layer: int = 1
    # Convolutions at the cut that make the smashed data smaller, for example C4S2 or K1C8S1noReLU. None: no
    # bottleneck.
    bottleneck: str | None = None
    # Whether the residual blocks of the clients have shortcuts.
    client_residual: bool = True
    # Whether the kernels of convolutions are standardised (all but those that `split_model` names).
    weight_standardisation: bool = True
    # Normalization layers: group, layer or instance.
    norm: str = "group"
    # How parameters are drawn. official: as in the official code, where weight-standardised convolutions keep
    # PyTorch's default. xavier: all kernels by Xavier. A learning rate that suits one need not suit the
    # other.
    init: str = "official"
    # float32, or bfloat16 for mixed precision on accelerators: convolutions, activations and smashed data are
    # bfloat16, whereas parameters, momentum models, queue, statistics of the normalization layers, head and
    # losses stay float32.
    compute_dtype: str = "float32"


@dataclasses.dataclass(slots=True, kw_only=True)
class Moco:
    """Momentum contrast: head, views, queue and loss."""

    # Fills in every field of this section that is None, and optim.schedule.
    preset: str = "v2"
    # Dimension of queries and keys.
    key_dim: int | None = None
    # Projection head. mlp has one hidden layer, mlp_bn one with BatchNorm.
    head: str | None = None
    # Symmetric loss: each of the two views is once the query and once the key.
    symmetric: bool | None = None
    # Augmentation of the views. v1 has no blur.
    augmentation: str | None = None
    # Clients run both of their models on both views and receive gradients for both (MonAcoSFL).
    full_symmetric: bool = False
    # True: one queue for all clients. False: one queue of K // N keys for each client.
    feature_sharing: bool = True
    # True: vector concatenation, the rows of all clients are one batch of the server. False: the rows of each
    # client are a step of the server by themselves, one client after another, and a client receives the
    # gradient of the mean over its own rows. Not with rich clients or a config.resist.strength.
    concatenate: bool = True
    # K, the number of keys in the queue.
    queue_size: int = 6000
    # Temperature of InfoNCE.
    temperature: float = 0.1
    # Momentum of the momentum models of clients and server.
    momentum: float = 0.99
    # Smallest fraction of the image's area that RandomResizedCrop keeps.
    min_crop_scale: float = 0.08


@dataclasses.dataclass(slots=True, kw_only=True)
class Optim:
    """SGD with momentum, and its learning rates."""

    # Learning rate of the server at the start.
    server_lr: float = 0.06
    # Learning rate of the clients at the start. None: the server's. 0: the clients are frozen and receive no
    # gradients.
    client_lr: float | None = None
    # Momentum of SGD, on both sides.
    momentum: float = 0.9
    # Factor of the parameters that is added to their gradients, on both sides.
    weight_decay: float = 5e-4
    # Learning rate over epochs. None: that of the MoCo preset, which is multistep for v1 and cosine
    # otherwise. multistep drops to a tenth after 60 and after 80 % of the epochs.
    schedule: str | None = None
    # Schedule of the clients. official_per_step advances that of the server with every batch in which the
    # client is trained instead of every epoch, as the official code did for the paper's numbers. None: the
    # server's schedule, but multistep drops to a fifth.
    client_schedule: str | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Resist:
    """Clients that are trained to hide their images from a decoder (ResSFL, TAResSFL)."""

    # Lambda, the weight of the regulariser, which keeps the SSIM of the decoder's pictures low. 0: there is
    # neither decoder nor regulariser.
    strength: float = 0.0
    # SSIM up to which the regulariser leaves the clients alone.
    ssim_target: float = 0.6
    # The decoder: res_normNxCy or conv_normNxCy with x blocks of y channels, or custom.
    decoder: str = "res_normN4C64"
    # Learning rate of the decoder's Adam.
    decoder_lr: float = 1e-3
    # faithful: as the official code, with its slips. corrected: without them (docs/privacy.md).
    preset: str = "corrected"
    # A second data set, from which half the images of each step come; a name as in `data.name`. Only with one
    # client. None: all images are those of `data`, the target.
    source: str | None = None
    # Folder of the second data set, as `data.dir`.
    source_dir: str = "data"
    # Share of the target's training images that are used. 0: none, all images come from the source.
    target_share: float = 1.0
    # Epochs between judgements by a decoder that is trained afresh. 0: only after the last epoch.
    judge_every: int = 0
    # Images of the target on which the fresh decoder is trained; a tenth of them is held out.
    judge_images: int = 500
    # Epochs of the fresh decoder.
    judge_epochs: int = 50
    # A warning is printed if the SSIMs of the fresh decoder and of the one in the loop differ by more.
    judge_margin: float = 0.1


@dataclasses.dataclass(slots=True, kw_only=True)
class Privacy:
    """Noise that clients add to smashed data in training."""

    # Standard deviation of the Gaussian noise in each value, in terms of `clip`. 0: neither noise nor bound.
    noise: float = 0.0
    # Root mean square to which the smashed data of an image are scaled down if theirs is larger.
    clip: float = 1.0


@dataclasses.dataclass(slots=True, kw_only=True)
class Eval:
    """kNN evaluation during training, and the linear probe after it."""

    # Epochs between kNN evaluations. 0: evaluate only the untrained and the trained network.
    every: int = 1
    # Number of neighbours that vote.
    knn_k: int = 200
    # Temperature of the votes' weights.
    knn_temperature: float = 0.1
    # Epochs of the linear probe. 0: no probe.
    probe_epochs: int = 100
    # Save and end the run once the features of all images are almost equal (see evaluation/collapse.py).
    # False: only report it.
    stop_on_collapse: bool = False


@dataclasses.dataclass(slots=True, kw_only=True)
class Checkpoint:
    """When training saves its state."""

    # Epochs between checkpoints. Training also saves at its end and when a signal stops it.
    every: int = 1
    # Number of newest checkpoints to keep.
    keep: int = 3
    # When the disk is full. continue: train on without saving until there is space again, unless
    # `saving.loss_threshold` needs the space for smashed data.
    on_full_disk: str = "stop"


@dataclasses.dataclass(slots=True, kw_only=True)
class Mesh:
    """Number of devices that share the work, along two axes. It changes the order of sums, nothing else."""

    # Devices over which clients and their data are sharded. None: what `model` leaves; by default all
    # devices.
    data: int | None = None
    # Devices over which the server's parameters and queue are sharded too. None: what `data` leaves, or 1.
    model: int | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Wire:
    """Clients over a network, of `python -m mocosfl_jax.serve`."""

    # How smashed data and their gradients are sent. exact: as they are computed. int8: with one scale per
    # array.
    dtype: str = "exact"
    # Seconds for which the server waits for a client's answer. Then its step goes on without the client.
    deadline_s: float = 60.0
    # Clients of the cohort that must be there for a step to begin.
    least: int = 1


@dataclasses.dataclass(slots=True, kw_only=True)
class Own:
    """Functions of your own, which only a config file or Python can set. config.json holds their names."""

    # A function (config, image_size, forms) that makes a `SplitModel` in place of the network of
    # `config.model`.
    network: Callable[..., Any] | None = None
    # A function (config, model, arguments) that makes an `Algorithm`. `arguments` are the keyword arguments
    # that `mocosfl`, or the function that `config.algorithm` names, would get besides the model.
    algorithm: Callable[..., Any] | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class Config:
    """One experiment. Its fields are set by a config file, then by the command line.

    Example:
      >>> config = Config(clients=Clients(num=20), model=Model(cut_layer=2))
      >>> config.epochs, config.clients.noniid_ratio, config.clients.batch_size
      (200, 0.2, None)
    """

    # flmoco is the baseline that trains the whole network on each client.
    algorithm: str = "mocosfl"
    # Seed of all random draws: the cohorts, the initialization, the views and, without `clients.seed`, the
    # partition.
    seed: int = 1234
    # Passes over the data if the whole pool takes part. Smaller cohorts train N // M times as many epochs, so
    # that a client takes part in `epochs` of them on average, or in fewer where M does not divide N.
    epochs: int = 200
    # A workdir, or an encoder file, whose momentum models start as copies: the run starts from its models.
    # None: models are drawn.
    init_from: str | None = None
    # The models that are taken from there; the others are drawn. client: those of all clients.
    init_parts: str = "both"
    data: Data = dataclasses.field(default_factory=Data)
    clients: Clients = dataclasses.field(default_factory=Clients)
    sync: Synchronization = dataclasses.field(default_factory=Synchronization)
    saving: Saving = dataclasses.field(default_factory=Saving)
    model: Model = dataclasses.field(default_factory=Model)
    moco: Moco = dataclasses.field(default_factory=Moco)
    optim: Optim = dataclasses.field(default_factory=Optim)
    resist: Resist = dataclasses.field(default_factory=Resist)
    privacy: Privacy = dataclasses.field(default_factory=Privacy)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    wire: Wire = dataclasses.field(default_factory=Wire)
    own: Own = dataclasses.field(default_factory=Own)


def quickstart() -> Config:
    """The default experiment of `python -m mocosfl_jax.train`: minutes on two CPU cores, no download.

    Small gray pictures of centred things and a short run need milder views than the paper's. The loss has one
    direction, since a step then costs half as much. README says how the recipe was chosen.
    """
    return Config(
        epochs=15,
        data=Data(name="fashion_mnist_sample"),
        clients=Clients(num=20, noniid_ratio=0.2),
        model=Model(name="vgg9", width=8, cut_layer=1, init="xavier"),
        moco=Moco(
            preset="v2",
            head="linear",
            symmetric=False,
            temperature=0.2,
            key_dim=128,
            queue_size=2000,
            augmentation="v1",
            min_crop_scale=0.95,
        ),
        optim=Optim(server_lr=0.03, client_lr=0.03),
        eval=Eval(every=5),
    )
