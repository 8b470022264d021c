"""A client that hides its images from a decoder: TAResSFL, step A (Li et al. 2023, table 4).

    python -m mocosfl_jax.train --config=configs/resistant_expert.py:0.01
    python -m mocosfl_jax.train --config=configs/taressfl.py --init_from=runs/resistant_expert_0.01

The parameter is the share of CIFAR-10, the target, that the expert sees beside all of CIFAR-100, the source:
0, 0.005 or, by default, 0.01. It trains client and server in one place; the second command trains
the federation with this client frozen. --config.model.cut_layer=2 is the paper's MocoSFL-3,
--config.resist.strength its lambda, and --config.resist.preset=faithful repeats the slips of the official
code (docs/privacy.md).
Not yet run with this code: it takes 78,200 steps of a full ResNet-18, which need an accelerator.
"""

from mocosfl_jax.config import Clients, Config, Data, Model, Resist


def get_config(target_share: str = "0.01") -> Config:
    share = float(target_share)
    return Config(
        data=Data(name="cifar10"),
        clients=Clients(num=1, batch_size=256 if share else 128, noniid_ratio=1.0),
        model=Model(name="resnet18", cut_layer=1, bottleneck="C4S2"),
        resist=Resist(strength=2.0, ssim_target=0.6, source="cifar100", target_share=share),
    )
