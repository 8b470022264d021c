"""FL-MoCo on CIFAR-10, the federated baseline: each client trains the whole network with MoCo on its own.

    python -m mocosfl_jax.train --config=configs/flmoco.py:100 --config.data.dir=data

The parameter is N, 5 by default. An epoch consists of five passes over each client's images and one
synchronization. Memory grows with N: for 100 clients, the parameters and buffers of a full ResNet-18 take 15
GB. Batch and rate are those of MocoSFL with N clients; the official code's FL-MoCo has a batch of 128 and a
rate of 0.05 by default.
Not yet run with this code: it needs an accelerator.
"""

from mocosfl_jax.config import Clients, Config, Data, Moco, Synchronization


def get_config(num_clients: str = "5") -> Config:
    return Config(
        algorithm="flmoco",
        data=Data(name="cifar10"),
        clients=Clients(num=int(num_clients), noniid_ratio=0.2, local_epochs=5),
        sync=Synchronization(frequency=1),
        moco=Moco(preset="v2", queue_size=6000),
    )
