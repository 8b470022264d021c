"""The run whose learning curve is compared with the official code's: VGG-11 on 5,000 CIFAR-10 images.

    python -m scripts.subset --data_dir=data --train=500 --test=500 --out=runs/cifar5000.npz
    python -m mocosfl_jax.train --config=configs/learning_curve.py --config.seed=1
    python -m mocosfl_jax.train --config=configs/learning_curve.py:xavier --config.seed=1

10 clients with two classes each and batches of 10. The parameter is the initialization. A run takes about two
hours on a CPU core; docs/verification.md has the curves.
"""

from mocosfl_jax.config import Checkpoint, Clients, Config, Data, Eval, Moco, Model, Optim, Synchronization


def get_config(init: str = "official") -> Config:
    return Config(
        epochs=40,
        data=Data(name="npz", dir="runs/cifar5000.npz"),
        clients=Clients(num=10, batch_size=10, noniid_ratio=0.2),
        sync=Synchronization(frequency=5),
        model=Model(name="vgg11", cut_layer=2, init=init),
        moco=Moco(preset="v2", queue_size=3000),
        optim=Optim(server_lr=0.03, client_schedule="official_per_step"),
        eval=Eval(every=5),
        checkpoint=Checkpoint(every=2, keep=1),
    )
