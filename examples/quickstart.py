"""The quickstart in Python: MocoSFL on 20 clients that hold at most two classes of pictures each.

    python examples/quickstart.py

This is the experiment of `python -m mocosfl_jax.train` with a training loop that you can read and change. It
needs no data set and no GPU.
"""

from functools import partial

import jax
import numpy as np

from mocosfl_jax import (
    MomentumContrast,
    TrainState,
    data,
    forms,
    mocosfl,
    one_device,
    split_model,
    two_views,
)
from mocosfl_jax.algorithm import optim
from mocosfl_jax.data import Dataset
from mocosfl_jax.evaluation.features import Encode, extract, make_encode
from mocosfl_jax.evaluation.knn import knn_accuracy
from mocosfl_jax.feed import partition

SEED = 1234


def main(
    epochs: int = 15,
    num_clients: int = 20,
    batch_size: int = 5,
    syncs_per_epoch: int = 10,
    width: int = 8,
    queue_size: int = 2000,
    max_images: int = 6000,
) -> list[dict[str, float]]:
    """Train, print a line for each epoch, and return these lines as dictionaries.

    The defaults are those of the quickstart. A small `width` and few images make it a matter of seconds.
    """
    # The data set: images [n, H, W, 3] uint8 and labels [n], here a sample that comes with the package.
    dataset = data.load("fashion_mnist_sample", "data", image_size=None)
    dataset = dataset._replace(x_train=dataset.x_train[:max_images], y_train=dataset.y_train[:max_images])
    print(f"{dataset.source}; {len(dataset.x_train):,} of its training images are used")

    # The partition: indices of the images of each client. With a ratio of 0.2 a client holds at most two of
    # the ten classes. Labels are used for this and for the evaluation, never for training.
    parts = partition.partition(
        dataset.y_train,
        num_clients=num_clients,
        batch_size=batch_size,
        noniid_ratio=0.2,
        dirichlet_alpha=None,
        seed=SEED,
    )
    batch_sizes = partition.batch_sizes(num_clients, batch_size)
    steps = partition.steps_per_epoch(parts, batch_sizes)
    first = parts[0]
    print(f"client 0 holds {len(first)} images of the classes {np.unique(dataset.y_train[first]).tolist()}")

    # The network, cut after its first layer: that layer runs on the clients, everything else on the server.
    # Then the algorithm, a handful of pure functions. Both sides have a learning rate that falls to 0.
    # A program that is fast on a CPU is slow on an accelerator: `forms` chooses. The numbers are the same.
    platform = forms(jax.default_backend())
    model = split_model(
        "vgg9", cut_layer=1, width=width, key_dim=128, head="linear", init="xavier", forms=platform
    )
    rate = optim.schedule("cosine", 0.03, epochs=epochs, steps_per_epoch=steps)
    algorithm = mocosfl(
        model,
        num_clients=num_clients,
        moco=MomentumContrast(queue_size=queue_size, temperature=0.2, symmetric=False),
        client_optimizer=optim.sgd(rate),
        server_optimizer=optim.sgd(rate),
        placement=one_device(platform),
    )

    # The compiled programs. Donation lets a step overwrite the state that it gets.
    enter, leave = jax.jit(algorithm.enter), jax.jit(algorithm.leave)
    step = jax.jit(algorithm.step, donate_argnums=0)
    sync = jax.jit(algorithm.sync, donate_argnums=0)
    views = jax.jit(
        partial(two_views, size=32, mean=dataset.mean, std=dataset.std, version="v1", min_crop_scale=0.95)
    )
    # The encoder of whole images, without augmentation: state, images -> features.
    encode = make_encode(algorithm, dataset.mean, dataset.std)

    # Training. At the start of each epoch a cohort enters, here all clients, and at its end they leave. Each
    # step takes a batch from every client; a synchronization averages the client-side models.
    rng_init, rng_views = jax.random.split(jax.random.key(SEED))
    state = jax.jit(algorithm.init)(rng_init)
    lines = [{"epoch": 0, "kNN": evaluate(encode, state, dataset)}]
    report(lines[-1])
    everyone = np.arange(num_clients)
    for epoch in range(epochs):
        indices = partition.epoch_indices(
            parts, everyone, batch_sizes=batch_sizes, steps=steps, seed=SEED, epoch=epoch
        )  # [steps, clients, batch]
        losses = []
        at_work = enter(state)
        for i in range(steps):
            rng = jax.random.fold_in(rng_views, epoch * steps + i)
            at_work, info = step(at_work, views(rng, dataset.x_train[indices[i]]))
            losses.append(info.loss)
            if (i + 1) % max(1, steps // syncs_per_epoch) == 0 or i + 1 == steps:
                at_work, _ = sync(at_work)
        state = leave(at_work)
        accuracy = evaluate(encode, state, dataset)
        lines.append({"epoch": epoch + 1, "loss": float(np.mean(losses)), "kNN": accuracy})
        report(lines[-1])
    return lines


def evaluate(encode: Encode, state: TrainState, dataset: Dataset) -> float:
    """kNN accuracy on the features: the nearest training images vote for the class of a test image."""
    train, test = (extract(encode, state, images).backbone for images in (dataset.x_train, dataset.x_test))
    return knn_accuracy(train, dataset.y_train, test, dataset.y_test, num_classes=len(dataset.class_names))


def report(line: dict[str, float]) -> None:
    print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)


if __name__ == "__main__":
    main()
