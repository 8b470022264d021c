"""MocoSFL: self-supervised learning across many small clients, in JAX (Li et al., ICLR 2023)."""

from mocosfl_jax.augment import Views
from mocosfl_jax.models import Features, SplitModel, split_model
from mocosfl_jax.mocosfl import Algorithm, StepInfo, TrainState, mocosfl

__all__ = [
    "Algorithm",
    "Features",
    "SplitModel",
    "StepInfo",
    "TrainState",
    "Views",
    "mocosfl",
    "split_model",
]
