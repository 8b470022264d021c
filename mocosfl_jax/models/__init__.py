"""Networks that can be cut in two. Only this folder imports Flax."""

from mocosfl_jax.models.forms import Forms
from mocosfl_jax.models.split import Features, SplitModel, check_model, split_model

__all__ = ["Features", "Forms", "SplitModel", "check_model", "split_model"]
