"""MocoSFL: self-supervised learning across many small clients, in JAX (Li et al., ICLR 2023)."""

from mocosfl_jax.runtime import import_path

if import_path.is_command():  # before anything else is imported
    import_path.leave_current_folder()

    from mocosfl_jax.runtime import streams

    streams.make_safe()

from mocosfl_jax.algorithm.clients import ClientState, Pool, Sync
from mocosfl_jax.algorithm.flmoco import flmoco
from mocosfl_jax.algorithm.interface import Algorithm, CohortState, StepInfo, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.algorithm.moco import MomentumContrast
from mocosfl_jax.algorithm.mocosfl import mocosfl
from mocosfl_jax.algorithm.placement import Placement, one_device
from mocosfl_jax.feed.augment import normalise, two_views
from mocosfl_jax.models import Features, SplitModel, check_independence, split_model
from mocosfl_jax.models.forms import Forms, forms
from mocosfl_jax.weights.encoder_file import load_encoder

__all__ = [
    "Algorithm",
    "ClientState",
    "CohortState",
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
    "flmoco",
    "forms",
    "load_encoder",
    "mocosfl",
    "normalise",
    "one_device",
    "split_model",
    "two_views",
]
