"""Accuracy against leak at the scale of a laptop: clients with and without a defence, by name.

    python -m scripts.leaks --data_dir=data
    python -m mocosfl_jax.train --config=configs/leaks.py:noise-0.25 --config.data.dir=runs/leaks/target.npz

The first command trains and attacks all points with three seeds, some hours on two CPU cores, and draws
accuracy against leak; it also writes the files of images. The target, on which all points are trained and
attacked, is half of the classes of CIFAR-10. The other half is the source, on which experts are trained.

The points, where C is the cut layer:

    open-C                 no defence
    bottleneck             cut after the first convolution, with the bottleneck C4S2
    taressfl-L-T           and a client with it that an expert was trained to be: lambda L, SSIM target T
    expert-L-T             that expert
    taressfl-0, expert-0   the same pre-training without a decoder: what the expert adds to the accuracy
    noise-S                cut after the first convolution, noise with a standard deviation of S of the bound
"""

from mocosfl_jax.config import (
    Checkpoint,
    Clients,
    Config,
    Data,
    Eval,
    Moco,
    Model,
    Optim,
    Privacy,
    Resist,
    Synchronization,
)

FOLDER = "runs/leaks"
STRENGTHS, TARGETS = (1, 4, 16), (0.3, 0.6)


def base(
    cut_layer: int = 1,
    *,
    bottleneck: str | None = None,
    init_from: str | None = None,
    frozen: bool = False,
    privacy: Privacy | None = None,
) -> Config:
    """What all points have in common: data, clients, network, views, loss and schedule."""
    return Config(
        epochs=10,
        init_from=init_from,
        data=Data(name="npz", dir=f"{FOLDER}/target.npz"),
        clients=Clients(num=10, batch_size=10, noniid_ratio=0.4),
        sync=Synchronization(frequency=10),
        model=Model(name="vgg11", width=16, cut_layer=cut_layer, init="xavier", bottleneck=bottleneck),
        moco=Moco(preset="v1", min_crop_scale=0.2, queue_size=2000),
        optim=Optim(server_lr=0.03, client_lr=0.0 if frozen else 0.03, schedule="cosine"),
        privacy=privacy or Privacy(),
        eval=Eval(every=0, probe_epochs=50),
        checkpoint=Checkpoint(every=5, keep=1),
    )


def expert(strength: float, target: float = 0.6) -> Config:
    """Client and server in one place, on the source and two percent of the target."""
    config = base(bottleneck="C4S2")
    config.epochs = 5
    config.clients = Clients(num=1, batch_size=100, noniid_ratio=1.0)
    config.resist = Resist(
        strength=strength,
        ssim_target=target,
        decoder="res_normN1C16",
        source="npz",
        source_dir=f"{FOLDER}/source.npz",
        target_share=0.02,
        judge_images=500,
        judge_epochs=5,
    )
    config.eval = Eval(every=0, probe_epochs=0)
    return config


def frozen(name: str) -> Config:
    """Clients that stay as those of the expert of this name."""
    return base(bottleneck="C4S2", init_from=f"{FOLDER}/{name}", frozen=True)


POINTS = {
    **{f"open-{cut}": base(cut) for cut in (1, 3, 6)},
    "bottleneck": base(bottleneck="C4S2"),
    **{
        f"taressfl-{strength}-{target}": frozen(f"expert-{strength}-{target}")
        for strength in STRENGTHS
        for target in TARGETS
    },
    "taressfl-0": frozen("expert-0"),
    **{f"noise-{std}": base(privacy=Privacy(noise=std)) for std in (0.25, 1.0)},
}
EXPERTS = {
    "expert-0": expert(0),
    **{
        f"expert-{strength}-{target}": expert(strength, target)
        for strength in STRENGTHS
        for target in TARGETS
    },
}


def get_config(name: str = "open-1") -> Config:
    configs = POINTS | EXPERTS
    if name not in configs:
        raise ValueError(f"found {name}, allowed: {', '.join(configs)}")
    return configs[name]
