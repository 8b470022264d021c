"""Networks that can be cut in two. Only this folder imports Flax."""

from mocosfl_jax.models.forms import Forms
from mocosfl_jax.models.named import check_model, split_model
from mocosfl_jax.models.split import Features, SplitModel, check_independence

__all__ = ["Features", "Forms", "SplitModel", "check_independence", "check_model", "split_model"]
