"""The three claims of the paper at the scale of a laptop: every point of their curves, by name.

    python -m scripts.claims --data_dir=data
    python -m mocosfl_jax.train --config=configs/claims.py:concatenation-50-off --config.seed=2

The first command runs all points with three seeds, some hours on two CPU cores, and draws the curves; it
also writes the file of 10,000 CIFAR-10 images that every run is trained on. The second is one run. All runs
see the same number of images, 100 in each step, with the same network, and with the same learning rates
unless a point says otherwise. docs/claims.md says what each claim is, and has the results.

The points, where N is the number of clients, K the size of the queue, C the cut layer and F the number of
synchronizations in an epoch:

    concatenation-1-centralised                        MoCo on one machine that holds all images
    concatenation-N-on, -off, -off-scaled, -flmoco     with and without vector concatenation; FL-MoCo
    sharing-iid-on-K, sharing-iid-off-K                one queue for all clients, or one for each
    sharing-noniid-on-K, sharing-noniid-off-K          the same where a client has two classes
    sync-cutC-fF, sync-cutC-fF-monaco                  MocoSFL, and MonAcoSFL at the deep cuts
    deep-P-R-fF, deep-P-R-f1-monaco                    both at the deepest cut, P classes a client, rates R
"""

from typing import NamedTuple

from mocosfl_jax.config import Checkpoint, Clients, Config, Data, Eval, Moco, Model, Optim, Synchronization

EPOCHS = 6
RATE = 0.03


class Point(NamedTuple):
    """A point of a curve."""

    curve: str  # what the curve shows
    x: int  # where the point is on it
    config: Config


def base(
    clients: Clients,
    *,
    sync: Synchronization | None = None,
    cut_layer: int = 1,
    queue_size: int = 2000,
    rate: float = RATE,
    algorithm: str = "mocosfl",
    feature_sharing: bool = True,
    concatenate: bool = True,
) -> Config:
    """What all points have in common: data, network, views, loss and schedule."""
    return Config(
        algorithm=algorithm,
        epochs=EPOCHS,
        data=Data(name="npz", dir="runs/claims/cifar10.npz"),
        clients=clients,
        sync=sync or Synchronization(),
        model=Model(name="vgg11", width=16, cut_layer=cut_layer, init="xavier"),
        moco=Moco(
            preset="v1",
            min_crop_scale=0.2,
            queue_size=queue_size,
            feature_sharing=feature_sharing,
            concatenate=concatenate,
        ),
        optim=Optim(server_lr=rate, client_lr=rate, schedule="cosine"),
        eval=Eval(every=0, probe_epochs=0),
        checkpoint=Checkpoint(every=5, keep=1),
    )


def concatenation() -> dict[str, Point]:
    """N IID clients with batches of 100 / N, synchronized ten times in an epoch; FL-MoCo once."""
    points = {
        "concatenation-1-centralised": Point(
            "centralised MoCo", 1, base(Clients(num=1, noniid_ratio=1.0), cut_layer=0)
        )
    }
    for n in (5, 20, 50, 100):
        clients = Clients(num=n, noniid_ratio=1.0)
        curves = {
            "on": ("concatenated", base(clients)),
            "off": ("each client a step", base(clients, concatenate=False)),
            "off-scaled": ("each client a step, rates / N", base(clients, concatenate=False, rate=RATE / n)),
            "flmoco": ("FL-MoCo", base(clients, algorithm="flmoco", sync=Synchronization(frequency=1))),
        }
        points |= {f"concatenation-{n}-{name}": Point(curve, n, c) for name, (curve, c) in curves.items()}
    return points


def sharing() -> dict[str, Point]:
    """20 clients with one queue of K keys for all of them, or with K / 20 keys for each."""
    return {
        f"sharing-{name}-{'on' if shared else 'off'}-{keys}": Point(
            f"{partition}, {'one queue' if shared else 'a queue for each'}",
            keys,
            base(Clients(num=20, noniid_ratio=ratio), queue_size=keys, feature_sharing=shared),
        )
        for name, partition, ratio in (("iid", "IID", 1.0), ("noniid", "two classes", 0.2))
        for shared in (True, False)
        for keys in (400, 4000)
    }


DEEP = (6, 9)  # cut layers at which MonAcoSFL stands beside MocoSFL


def synchronization() -> dict[str, Point]:
    """20 clients with two classes each. At the cut layers they have 1, 2, 4 and 6 of the 8 convolutions."""
    points = {}
    for cut, convolutions, frequencies in (
        (1, 1, (1, 5, 25, 100)),
        (3, 2, (1, 5, 25, 100)),
        (6, 4, (1, 5, 25, 100)),
        (9, 6, (1, 100)),
    ):
        for frequency in frequencies:
            for monaco in (False, True) if cut in DEEP else (False,):
                curve = f"{convolutions} of 8 convolutions{', MonAcoSFL' if monaco else ''}"
                sync = Synchronization(frequency=frequency, momentum_models=monaco)
                clients = Clients(num=20, noniid_ratio=0.2)
                name = f"sync-cut{cut}-f{frequency}{'-monaco' if monaco else ''}"
                points[name] = Point(curve, frequency, base(clients, sync=sync, cut_layer=cut))
    return points


def deep() -> dict[str, Point]:
    """Clients with 6 of the 8 convolutions, and fewer classes or higher rates than above."""
    points = {}
    for classes, rate in ((1, 0.03), (2, 0.1), (1, 0.1)):
        for frequency, monaco in ((1, False), (1, True), (100, False)):
            words = f"{('one class', 'two classes')[classes - 1]}, rates {rate}"
            curve = f"{words}{', MonAcoSFL' if monaco else ''}"
            sync = Synchronization(frequency=frequency, momentum_models=monaco)
            clients = Clients(num=20, noniid_ratio=classes / 10)
            name = f"deep-{classes}-{rate}-f{frequency}{'-monaco' if monaco else ''}"
            points[name] = Point(curve, frequency, base(clients, sync=sync, cut_layer=9, rate=rate))
    return points


CLAIMS = {
    "concatenation": concatenation(),
    "sharing": sharing(),
    "synchronization": synchronization(),
    "deep": deep(),
}
POINTS = {name: point for points in CLAIMS.values() for name, point in points.items()}


def get_config(name: str = "concatenation-20-on") -> Config:
    if name not in POINTS:
        raise ValueError(f"found {name}, allowed: {', '.join(POINTS)}")
    return POINTS[name].config
