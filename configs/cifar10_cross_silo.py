"""Cross-silo MocoSFL on CIFAR-10 (Li et al. 2023, table 2): 5 or 20 clients with a fifth of the classes each.

    python -m mocosfl_jax.train --config=configs/cifar10_cross_silo.py:20 --config.data.dir=data

The parameter is N, 5 by default. The default cut layer, 1, is the paper's MocoSFL-1;
--config.model.cut_layer=2 is its MocoSFL-3. --config.clients.noniid_ratio=1.0 gives IID clients.

Accuracy in the paper (linear probe, %, non-IID):
                                 N = 5    N = 20
    cut layer 1                  87.81    85.84
    cut layer 2                  87.29    85.32
Not yet run with this code: it takes 100,000 steps of a full ResNet-18, which need an accelerator.
"""

from mocosfl_jax.config import Clients, Config, Data, Synchronization


def get_config(num_clients: str = "5") -> Config:
    if num_clients == "20":  # a quarter of the clients take part, with larger batches than the default for N
        clients, sync = (
            Clients(num=20, cohort=5, batch_size=20, noniid_ratio=0.2),
            Synchronization(frequency=10),
        )
    else:
        clients, sync = Clients(num=int(num_clients), noniid_ratio=0.2), Synchronization()
    return Config(data=Data(name="cifar10"), clients=clients, sync=sync)
