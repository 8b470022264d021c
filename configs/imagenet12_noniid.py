"""Cross-client MocoSFL on ImageNet-12 (Li et al. 2023, table 3): 100 to 1,000 clients with two of the
twelve classes each.

    python -m mocosfl_jax.train --config=configs/imagenet12_noniid.py:1000 --config.data.dir=data

The parameter is N. --config.model.cut_layer=2 gives MocoSFL-3, --config.clients.noniid_ratio=1.0 IID clients.
From 200 clients on, about 100 of them take part in an epoch, and there are as many times more epochs.
The images are yours: data/train/CLASS/*.JPEG and data/val/CLASS/*.JPEG of twelve classes of ImageNet.

Paper's linear probe:            N = 100   N = 200  N = 1000
    cut layer 1, non-IID            92.24     91.44     91.28
    cut layer 2, non-IID            92.60     91.83     91.28
Not run here yet: 31,200 steps of a full ResNet-18 want an accelerator.
"""

from mocosfl_jax.config import Checkpoint, Clients, Config, Data, Eval, resolve


def get_config(num_clients: str = "100") -> Config:
    config = Config(data=Data(name="imagenet12"), clients=Clients(num=int(num_clients), noniid_ratio=0.2))
    # Count in epochs of the whole pool: the other ones are short, and checkpoints of many clients are large.
    longer = resolve(config).total_epochs // config.epochs
    config.eval, config.checkpoint = Eval(every=longer), Checkpoint(every=longer)
    return config
