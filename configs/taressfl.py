"""MocoSFL with a frozen client that hides its images: TAResSFL, step B (Li et al. 2023, table 4).

    python -m mocosfl_jax.train --config=configs/resistant_expert.py
    python -m mocosfl_jax.train --config=configs/taressfl.py

Clients and server start from the expert that the first command has trained; --init_from names another one.
The clients are never trained, so they receive nothing and are not synchronized. The parameter is N, 100 by
default. --config.model.cut_layer must be that of the expert. --config.clients.noniid_ratio=1.0 gives IID
clients.

In the paper, for N = 100 and the target shares 0, 0.5 and 1 % of the expert:
                                    0             0.5 %          1 %
    cut layer 1, linear probe, %    81.14         80.78         79.96
    cut layer 2, linear probe, %    81.19         80.51         83.13
Its attack's MSE is 0.033 to 0.045. An attacker who guesses one colour has 0.0405 (docs/privacy.md).
Not yet run with this code: it takes 100,000 steps of a full ResNet-18, which need an accelerator.
"""

from mocosfl_jax.config import Clients, Config, Data, Model, Optim


def get_config(num_clients: str = "100") -> Config:
    return Config(
        init_from="runs/resistant_expert",
        data=Data(name="cifar10"),
        clients=Clients(num=int(num_clients), noniid_ratio=0.2),
        model=Model(name="resnet18", cut_layer=1, bottleneck="C4S2"),
        optim=Optim(client_lr=0.0, server_lr=0.001),
    )
