"""Cross-silo MocoSFL on CIFAR-100 (Li et al. 2023, table 2): 5 or 20 clients, a fifth of the classes each.

    python -m mocosfl_jax.train --config=configs/cifar100_cross_silo.py:20 --config.data.dir=data

The parameter is N. --config.model.cut_layer=2 gives MocoSFL-3, --config.clients.noniid_ratio=1.0 IID clients.

Paper's linear probe, non-IID:   N = 5    N = 20
    cut layer 1                  58.78    57.80
    cut layer 2                  57.70    57.52
Not run here yet: 100,000 steps of a full ResNet-18 want an accelerator.
"""

from mocosfl_jax.config import Clients, Config, Data, Synchronization


def get_config(num_clients: str = "5") -> Config:
    if num_clients == "20":  # a quarter of them takes part, with larger batches than N alone would give
        clients, sync = (
            Clients(num=20, cohort=5, batch_size=20, noniid_ratio=0.2),
            Synchronization(frequency=10),
        )
    else:
        clients, sync = Clients(num=int(num_clients), noniid_ratio=0.2), Synchronization()
    return Config(data=Data(name="cifar100"), clients=clients, sync=sync)
