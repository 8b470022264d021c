"""CIFAR-10, 100 clients with 2 classes each, ResNet-18 cut after its first layer (MocoSFL-1).

    python -m mocosfl_jax.train --config=configs/cifar10_noniid_100.py --config.data.dir=data

Li et al. 2023, table 3: linear probe 87.71 % at cut layer 1, 87.10 % at cut layer 2 (the paper's numbers).
Not run here yet: it takes 100,000 steps of a full ResNet-18 and wants an accelerator.
"""

from mocosfl_jax.config import Clients, Config, Data, Moco, Model, Optim


def get_config() -> Config:
    return Config(
        epochs=200,
        data=Data(name="cifar10"),
        clients=Clients(num=100, noniid_ratio=0.2),
        model=Model(name="resnet18", cut_layer=1),
        moco=Moco(preset="v2", queue_size=6000),
        optim=Optim(server_lr=0.06, client_lr=0.06),
    )
