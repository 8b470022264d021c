"""Networks that can be cut in two. The only folder that imports flax."""

from mocosfl_jax.models.split import Features, SplitModel, split_model

__all__ = ["Features", "SplitModel", "split_model"]
