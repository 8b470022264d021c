"""MocoSFL with MobileNetV2 on CIFAR-10: 100 clients, cut layer 2.

    python -m mocosfl_jax.train --config=configs/mobilenetv2.py --config.data.dir=data

The parameter is N, 100 by default.
Not yet run with this code: it takes 100,000 steps, which need an accelerator.
"""

from mocosfl_jax.config import Clients, Config, Data, Model, Optim


def get_config(num_clients: str = "100") -> Config:
    return Config(
        data=Data(name="cifar10"),
        clients=Clients(num=int(num_clients), noniid_ratio=0.2),
        model=Model(name="mobilenetv2", cut_layer=2),
        optim=Optim(server_lr=0.03),  # as in the official code
    )
