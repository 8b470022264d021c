"""Centralised MoCo V2 on CIFAR-10, the upper reference: one client that holds all images and no layers.

    python -m mocosfl_jax.train --config=configs/centralised.py --config.data.dir=data

The cut is before the first layer, so the smashed data is the images and the server trains the whole network.
Not yet run with this code: it takes 100,000 steps of a full ResNet-18, which need an accelerator.
"""

from mocosfl_jax.config import Clients, Config, Data, Model


def get_config() -> Config:
    return Config(
        data=Data(name="cifar10"),
        clients=Clients(num=1, noniid_ratio=1.0),
        model=Model(name="resnet18", cut_layer=0),
    )
