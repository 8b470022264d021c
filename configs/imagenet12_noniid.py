"""Cross-client MocoSFL on ImageNet-12 (Li et al. 2023, table 3): 100 to 1,000 clients.

Each client holds two of the twelve classes.

    python -m mocosfl_jax.train --config=configs/imagenet12_noniid.py:1000 --config.data.dir=data

The parameter is N, 100 by default. The default cut layer, 1, is the paper's MocoSFL-1;
--config.model.cut_layer=2 is its MocoSFL-3. --config.clients.noniid_ratio=1.0 gives IID clients. With 200
clients or more, about 100 of them take part in an epoch, and the number of epochs grows accordingly.
You provide the images of twelve classes of ImageNet: data/train/CLASS/*.JPEG and data/val/CLASS/*.JPEG.

Accuracy in the paper (linear probe, %):
                                N = 100   N = 200  N = 1000
    cut layer 1, non-IID            92.24     91.44     91.28
    cut layer 2, non-IID            92.60     91.83     91.28
The official code evaluates on random crops of training and test images, this one on centre crops.
Not yet run with this code: it takes 31,200 steps of a full ResNet-18, which need an accelerator.
"""

from mocosfl_jax.config import Checkpoint, Clients, Config, Data, Eval, resolve


def get_config(num_clients: str = "100") -> Config:
    config = Config(data=Data(name="imagenet12"), clients=Clients(num=int(num_clients), noniid_ratio=0.2))
    # Evaluate and save once per pass of the whole pool: epochs of a cohort are short, and checkpoints of many
    # clients are large.
    longer = resolve(config).total_epochs // config.epochs
    config.eval, config.checkpoint = Eval(every=longer), Checkpoint(every=longer)
    return config
