"""The networks and random data of the benchmarks, which use all devices as training does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mocosfl_jax import (
    Algorithm,
    CohortState,
    MomentumContrast,
    SplitModel,
    TrainState,
    Views,
    config,
    mocosfl,
    split_model,
)
from mocosfl_jax.costs.accounting import Plan, client_flops, server_flops
from mocosfl_jax.evaluation.features import make_encode
from mocosfl_jax.models import forms as platforms
from mocosfl_jax.models.forms import ACCELERATOR, Forms
from mocosfl_jax.parallel import exchange
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.parallel import state as states
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import experiment
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.programs import Programs, compile_programs


class Setting(NamedTuple):
    """A benchmark's setting. The default is ResNet-18 with the paper's sizes, symmetric loss, float32."""

    cut_layer: int = 1
    clients: int = 100
    batch: int = 1
    width: int = 64
    stem_stride: int = 1
    key_dim: int = 1024
    queue_size: int = 6000
    image_size: int = 32

    @property
    def case(self) -> str:
        """Name of the case, for example "resnet18/16 cut1 20x5 f32": width 16, 20 clients of 5 images."""
        network = "resnet18" if self.width == 64 else f"resnet18/{self.width}"
        return f"{network} cut{self.cut_layer} {self.clients}x{self.batch} f32"

    @property
    def images(self) -> int:
        """Number of images in a step."""
        return self.clients * self.batch


# A narrow network, whose first layer halves the resolution.
NARROW = Setting(clients=20, batch=5, width=16, stem_stride=2, key_dim=128, queue_size=2000)


def mesh() -> Mesh:
    """The mesh of all devices, along `data`."""
    return meshes.make_mesh(config.Mesh(), jax.devices())


def platform_forms() -> Forms:
    """The forms that are fast on these devices."""
    return platforms.forms(meshes.platform(mesh()))


def build(setting: Setting, forms: Forms | None = None) -> tuple[SplitModel, Algorithm]:
    """Builds the network and the algorithm of a setting. `forms` are the network's; None: the fast ones."""
    model = split_model(
        "resnet18",
        cut_layer=setting.cut_layer,
        width=setting.width,
        image_size=setting.image_size,
        stem_stride=setting.stem_stride,
        key_dim=setting.key_dim,
        forms=forms or platform_forms(),
    )
    algorithm = mocosfl(
        model,
        num_clients=setting.clients,
        moco=MomentumContrast(queue_size=setting.queue_size),
        placement=exchange.make_placement(mesh(), platform_forms()),
    )
    return model, states.distribute(algorithm, mesh())


def views(setting: Setting, seed: int = 0) -> Views:
    """Gaussian images [M, B, H, W, 3] on every device. Their values do not affect the time."""
    rng = np.random.default_rng(seed)
    shape = (setting.clients, setting.batch, setting.image_size, setting.image_size, 3)
    return Views(*(meshes.replicate(mesh(), rng.standard_normal(shape, np.float32)) for _ in range(2)))


def narrow_run() -> config.Config:
    """The quickstart's data and clients, with the network of `NARROW`."""
    made = config.quickstart()
    made.model = config.Model(name="resnet18", width=NARROW.width, stem_stride=NARROW.stem_stride)
    made.moco = config.Moco(key_dim=NARROW.key_dim, queue_size=NARROW.queue_size, min_crop_scale=0.5)
    made.moco.augmentation = "v1"
    return made


class Training(NamedTuple):
    """A run that is ready to train."""

    run: Run
    state: TrainState
    programs: Programs


def prepare(run_config: config.Config) -> Training:
    """Prepares the run of a configuration on all devices: its initial state and its compiled programs."""
    run = experiment.prepare(config.resolve(run_config), mesh())
    rng_init, rng_views = jax.random.split(jax.random.key(0))
    state = jax.jit(run.algorithm.init)(rng_init)
    encode = make_encode(run.algorithm, run.dataset.mean, run.dataset.std)
    return Training(run, state, compile_programs(run, state, rng_views, encode))


class Step(NamedTuple):
    """A compiled training step: program(state, views) -> state, (loss, contrastive accuracy)."""

    program: Any  # the state is donated
    state: CohortState
    views: Views


def compile_step(setting: Setting) -> Step:
    """Compiles a step as training does, without gathering and augmenting images.

    It returns only the scalars of `StepInfo`.
    """
    _, algorithm = build(setting)
    state = jax.jit(lambda rng: algorithm.enter(algorithm.init(rng)))(jax.random.key(0))
    both = views(setting)

    def step(state: CohortState, views: Views) -> tuple[CohortState, tuple[jax.Array, jax.Array]]:
        state, info = algorithm.step(state, views)
        return state, (info.loss, info.top1)

    options = compiler.options(meshes.platform(mesh()))
    program: Callable[..., Any] = jax.jit(step, donate_argnums=0).lower(state, both).compile(options)
    return Step(program, state, both)


def step_flops(setting: Setting) -> int:
    """The FLOPs that the algorithm needs for a step, regardless of what the compiler does."""
    model, _ = build(setting, ACCELERATOR)
    plan = Plan(
        image_size=setting.image_size,
        images=setting.images,
        num_clients=setting.clients,
        cohort=setting.clients,
        batch_size=setting.batch,
        epochs=1,
        steps=1,
        syncs=1,
        queue_size=setting.queue_size,
    )
    return setting.images * (sum(client_flops(model, plan)) + sum(server_flops(model, plan)))
