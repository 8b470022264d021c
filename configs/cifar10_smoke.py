"""Real CIFAR-10 in minutes on two CPU cores: 20 clients with at most 2 classes each, a narrow ResNet-18.

    python -m mocosfl_jax.train --config=configs/cifar10_smoke.py --config.data.dir=data

It shows that training works end to end, and is far too short to reach the paper's numbers. Measured on
2026-11-22 with JPEG-encoded images, on two CPU cores, in 8 min: kNN accuracy 0.169 untrained, 0.447 trained,
0.411 on raw pixels; linear probe 0.452.
"""

from mocosfl_jax.config import Clients, Config, Data, Moco, Model, Optim, Synchronization


def get_config() -> Config:
    return Config(
        epochs=3,
        data=Data(name="cifar10"),
        clients=Clients(num=20, batch_size=5, noniid_ratio=0.2),
        sync=Synchronization(frequency=50),
        model=Model(name="resnet18", width=16, stem_stride=2, cut_layer=1, init="xavier"),
        moco=Moco(preset="v2", key_dim=128, queue_size=2000, min_crop_scale=0.2),
        optim=Optim(server_lr=0.02, client_lr=0.02),
    )
