"""Configurations: what an experiment is, the paper's defaults, and the checks.

    resolved = resolve(Config(clients=Clients(num=20)))

Nothing here reads files or imports JAX.
"""

from mocosfl_jax.config.comments import comments
from mocosfl_jax.config.fields import (
    CHOICES,
    Checkpoint,
    Clients,
    Config,
    Data,
    Eval,
    Mesh,
    Moco,
    Model,
    Optim,
    Own,
    Privacy,
    Resist,
    Saving,
    Synchronization,
    Wire,
    quickstart,
)
from mocosfl_jax.config.record import differences, from_dict, upgraded
from mocosfl_jax.config.resolution import PRESET_FIELDS, Resolved, name_of, paper_settings, resolve

__all__ = [
    "CHOICES",
    "PRESET_FIELDS",
    "Checkpoint",
    "Clients",
    "Config",
    "Data",
    "Eval",
    "Mesh",
    "Moco",
    "Model",
    "Optim",
    "Own",
    "Privacy",
    "Resist",
    "Resolved",
    "Saving",
    "Synchronization",
    "Wire",
    "comments",
    "differences",
    "from_dict",
    "name_of",
    "paper_settings",
    "quickstart",
    "resolve",
    "upgraded",
]
