"""Networks that can be cut in two. The only folder that imports flax."""

from mocosfl_jax.models.split import Features, SplitModel, check_model, split_model

__all__ = ["Features", "SplitModel", "check_model", "split_model"]
