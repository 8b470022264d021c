"""MocoSFL: self-supervised learning across many small clients, in JAX (Li et al., ICLR 2023)."""

from mocosfl_jax.runtime import import_path

if import_path.is_command():  # before anything else is imported
    import_path.leave_current_folder()

    from mocosfl_jax.runtime import streams

    streams.make_safe()

from typing import TYPE_CHECKING, Any

from mocosfl_jax.algorithm.clients import ClientState, Pool, Sync
from mocosfl_jax.algorithm.flmoco import flmoco
from mocosfl_jax.algorithm.interface import Algorithm, CohortState, StepInfo, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.algorithm.moco import Contrast, MomentumContrast, momentum_contrast
from mocosfl_jax.algorithm.mocosfl import mocosfl
from mocosfl_jax.algorithm.optim import sgd
from mocosfl_jax.algorithm.placement import Placement, one_device
from mocosfl_jax.config import Config
from mocosfl_jax.evaluation.classifiers import linear_probe, semi_supervised
from mocosfl_jax.evaluation.features import encode_images
from mocosfl_jax.evaluation.knn import knn_accuracy
from mocosfl_jax.feed.augment import normalise, two_views
from mocosfl_jax.models import Features, SplitModel, check_independence, split_model
from mocosfl_jax.models.forms import Forms, forms
from mocosfl_jax.training.encoder import encoder_of_run
from mocosfl_jax.weights.encoder_file import Encoder, load_encoder

if TYPE_CHECKING:
    from mocosfl_jax.training.session import run


def __getattr__(name: str) -> Any:
    """Import `run` when it is first used: training needs packages that take seconds to import."""
    if name != "run":
        raise AttributeError(f"module 'mocosfl_jax' has no attribute {name!r}")
    from mocosfl_jax.training.session import run

    return run


__all__ = [
    "Algorithm",
    "ClientState",
    "CohortState",
    "Config",
    "Contrast",
    "Encoder",
    "Features",
    "Forms",
    "MomentumContrast",
    "Placement",
    "Pool",
    "SmashedData",
    "SplitModel",
    "StepInfo",
    "Sync",
    "SyncInfo",
    "TrainState",
    "Views",
    "check_independence",
    "encode_images",
    "encoder_of_run",
    "flmoco",
    "forms",
    "knn_accuracy",
    "linear_probe",
    "load_encoder",
    "mocosfl",
    "momentum_contrast",
    "normalise",
    "one_device",
    "run",
    "semi_supervised",
    "sgd",
    "split_model",
    "two_views",
]
