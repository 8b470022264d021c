"""Centralised MoCo V2 on CIFAR-10, the upper reference: one client with all images and no layer of its own.

    python -m mocosfl_jax.train --config=configs/centralised.py --config.data.dir=data

The cut lies before the first layer, so the smashed data are the images and the server does all of MoCo.
Not run here yet: 100,000 steps of a full ResNet-18 want an accelerator.
"""

from mocosfl_jax.config import Clients, Config, Data, Model


def get_config() -> Config:
    return Config(
        data=Data(name="cifar10"),
        clients=Clients(num=1, noniid_ratio=1.0),
        model=Model(name="resnet18", cut_layer=0),
    )
