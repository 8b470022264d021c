"""FL-MoCo on CIFAR-10, the federated baseline: every client trains the whole network with MoCo by itself.

    python -m mocosfl_jax.train --config=configs/flmoco.py:100 --config.data.dir=data

The parameter is N. An epoch is five passes over each client's images, and one synchronization.
Memory grows with N times the network: 100 clients of a full ResNet-18 take 15 GB of parameters and buffers.
Not run here yet: it wants an accelerator.
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
