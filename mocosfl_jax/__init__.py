"""MocoSFL: self-supervised learning across many small clients, in JAX (Li et al., ICLR 2023)."""

from mocosfl_jax.augment import Views, normalise, two_views
from mocosfl_jax.clients import SmashedData, Sync
from mocosfl_jax.encoder_file import load_encoder
from mocosfl_jax.flmoco import flmoco
from mocosfl_jax.mocosfl import Algorithm, StepInfo, SyncInfo, TrainState, mocosfl
from mocosfl_jax.models import Features, SplitModel, split_model

__all__ = [
    "Algorithm",
    "Features",
    "SmashedData",
    "SplitModel",
    "StepInfo",
    "Sync",
    "SyncInfo",
    "TrainState",
    "Views",
    "flmoco",
    "load_encoder",
    "mocosfl",
    "normalise",
    "split_model",
    "two_views",
]
