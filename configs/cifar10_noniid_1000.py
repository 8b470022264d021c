"""The paper's headline: CIFAR-10, 1,000 clients with 2 classes and 50 images each, ResNet-18 cut after its
first block (MocoSFL-3).

    python -m mocosfl_jax.train --config=configs/cifar10_noniid_1000.py --config.data.dir=data

100 clients take part in an epoch, so an epoch is 50 steps and there are ten times 200 of them.

Li et al. 2023, table 3: linear probe 84.75 % at cut layer 2, 86.46 % at cut layer 1 (the paper's numbers).
Not run here yet: it takes 100,000 steps of a full ResNet-18 and wants an accelerator.
"""

from mocosfl_jax.config import Checkpoint, Clients, Config, Data, Eval, Moco, Model, Optim


def get_config() -> Config:
    return Config(
        epochs=200,
        data=Data(name="cifar10"),
        clients=Clients(num=1000, noniid_ratio=0.2),
        model=Model(name="resnet18", cut_layer=2),
        moco=Moco(preset="v2", queue_size=6000),
        optim=Optim(server_lr=0.06, client_lr=0.06),
        # An epoch is only 50 steps, and a checkpoint holds the state of all clients: about 0.9 GB.
        eval=Eval(every=20),
        checkpoint=Checkpoint(every=20),
    )
