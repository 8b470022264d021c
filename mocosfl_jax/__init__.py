"""MocoSFL: self-supervised learning across many small clients, in JAX (Li et al., ICLR 2023)."""

from mocosfl_jax.algorithm.clients import Sync
from mocosfl_jax.algorithm.flmoco import flmoco
from mocosfl_jax.algorithm.interface import Algorithm, StepInfo, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.algorithm.mocosfl import mocosfl
from mocosfl_jax.feed.augment import normalise, two_views
from mocosfl_jax.models import Features, SplitModel, split_model
from mocosfl_jax.weights.encoder_file import load_encoder

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
