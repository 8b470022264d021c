"""A deep cut with a synchronization every step: MocoSFL, or MonAcoSFL (Przewięźlikowski et al. 2024).

    python -m mocosfl_jax.train --config=configs/deep_cut.py:mocosfl
    python -m mocosfl_jax.train --config=configs/deep_cut.py:monacosfl

Data and network are those of the quickstart, with six of its nine layers on the clients. MonAcoSFL also
averages the momentum models. docs/deep_cut.md has the results.
"""

from mocosfl_jax.config import Config, quickstart


def get_config(method: str = "mocosfl") -> Config:
    config = quickstart()
    config.model.cut_layer = 6
    config.sync.frequency = 60
    if method not in ("mocosfl", "monacosfl"):
        raise ValueError(f"found {method}, allowed: mocosfl, monacosfl")
    config.sync.momentum_models = method == "monacosfl"
    return config
