"""A deep cut with a synchronization every step: MocoSFL, or MonAcoSFL (Przewięźlikowski et al. 2024).

    python -m mocosfl_jax.train --config=configs/deep_cut.py:mocosfl
    python -m mocosfl_jax.train --config=configs/deep_cut.py:monacosfl

Data and clients are those of the quickstart. The network is a narrow ResNet-18 with six of its nine layers
on the clients. MonAcoSFL also averages the momentum models. docs/deep_cut.md has the results.
"""

from mocosfl_jax.config import Config, Eval, Moco, Model, Optim, quickstart


def get_config(method: str = "mocosfl") -> Config:
    config = quickstart()
    config.epochs = 14
    config.model = Model(name="resnet18", width=16, stem_stride=2, cut_layer=6, init="xavier")
    config.moco = Moco(preset="v2", key_dim=128, queue_size=2000, augmentation="v1", min_crop_scale=0.5)
    config.optim = Optim(server_lr=0.01, client_lr=0.01)
    config.eval = Eval(every=2)
    config.sync.frequency = 60
    if method not in ("mocosfl", "monacosfl"):
        raise ValueError(f"found {method}, allowed: mocosfl, monacosfl")
    config.sync.momentum_models = method == "monacosfl"
    return config
