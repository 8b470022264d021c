"""What an experiment is: plain typed dataclasses, their defaults (the paper's) and their checks.

A file in `configs/` returns a `Config` from `get_config()`; the command line overrides single fields
(`--config.clients.num=100`). Nothing here does I/O or imports JAX.
"""

import dataclasses
import math
from collections.abc import Callable
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
