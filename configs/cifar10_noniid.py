"""Cross-client MocoSFL on CIFAR-10 (Li et al. 2023, table 3): 100 to 1,000 clients.

Each client holds a fifth of the classes.

    python -m mocosfl_jax.train --config=configs/cifar10_noniid.py:1000 --config.data.dir=data

The parameter is N, 100 by default. The default cut layer, 1, is the paper's MocoSFL-1;
--config.model.cut_layer=2 is its MocoSFL-3. --config.clients.noniid_ratio=1.0 gives IID clients. With 200
clients or more, about 100 of them take part in an epoch, and the number of epochs grows accordingly.

Accuracy in the paper (linear probe, %):
                                N = 100   N = 200  N = 1000
    cut layer 1, non-IID            87.71     87.39     86.46
    cut layer 2, non-IID            87.10     85.22     84.75
    cut layer 1, IID                87.29     87.38     87.51
    cut layer 2, IID                87.29     87.15     87.25
Not yet run with this code: it takes 100,000 steps of a full ResNet-18. On an H100 these are about nine
minutes with cut layer 2, 1,000 clients and bfloat16, by the time of single steps (docs/speed.md).
"""

from mocosfl_jax.config import Checkpoint, Clients, Config, Data, Eval, resolve


def get_config(num_clients: str = "100") -> Config:
    config = Config(data=Data(name="cifar10"), clients=Clients(num=int(num_clients), noniid_ratio=0.2))
    # Evaluate and save once per pass of the whole pool: epochs of a cohort are short, and checkpoints of many
    # clients are large.
    longer = resolve(config).total_epochs // config.epochs
    config.eval, config.checkpoint = Eval(every=longer), Checkpoint(every=longer)
    return config
