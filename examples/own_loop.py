"""Your own loop and data: any arrays of images, Weights & Biases, early stopping, and fine-tuning at the end.

    pip install wandb
    python examples/own_loop.py

`run` trains as the command does: it saves, resumes and evaluates. `on_epoch` is where everything else goes.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import wandb
from jax import Array

from mocosfl_jax import Config, normalise, run
from mocosfl_jax.config import Data, quickstart
from mocosfl_jax.data import load

PATIENCE = 3  # evaluations without a better kNN accuracy


def main(
    config: Config, folder: Path, images: dict[str, Any], tuning_steps: int = 100, share: float = 0.1
) -> float:
    """Train on `images`, stop early, fine-tune with a share of the labels, and return the test accuracy."""
    # Data: an npz file with x_train [n, H, W, 3] uint8, y_train [n] integers, x_test and y_test.
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "images.npz", **images)
    config.data = Data(name="npz", dir=str(folder / "images.npz"))

    # Weights & Biases in offline mode: `wandb sync` uploads the run later.
    tracker = wandb.init(mode="offline", dir=folder, project="mocosfl", config={"epochs": config.epochs})
    accuracies: list[float] = []

    def on_epoch(metrics: Any, state: Any) -> bool:
        tracker.log(dict(metrics), step=int(metrics["step"]))
        if "knn_backbone" in metrics:
            accuracies.append(metrics["knn_backbone"])
        return len(accuracies) > PATIENCE and max(accuracies[-PATIENCE:]) < max(accuracies)

    trained = run(config, folder / "run", on_epoch=on_epoch)
    tracker.finish()

    # Fine-tuning: all parameters of the encoder, and a linear layer on top of it.
    model, encoder, metadata = trained.encoder
    prepare = partial(normalise, mean=metadata.mean, std=metadata.std)
    count = len(images["y_train"])
    few = np.random.default_rng(0).permutation(count)[: int(share * count)]
    width = jax.eval_shape(model.whole_backbone, encoder, prepare(images["x_train"][:1])).shape[-1]
    params = {"encoder": encoder, "linear": jnp.zeros((width, int(images["y_train"].max()) + 1))}
    optimizer = optax.adam(1e-3)

    def logits(params: Any, batch: Array) -> Array:
        return model.whole_backbone(params["encoder"], batch) @ params["linear"]

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Array, labels: Array) -> tuple[Any, Any]:
        def loss(params: Any) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch), labels).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for i in range(tuning_steps):
        rows = np.random.default_rng(i).choice(few, min(100, len(few)), replace=False)
        params, opt_state = step(params, opt_state, prepare(images["x_train"][rows]), images["y_train"][rows])
    predict = jax.jit(lambda params, batch: jnp.argmax(logits(params, batch), axis=1))
    batches = np.array_split(np.arange(len(images["y_test"])), max(1, len(images["y_test"]) // 250))
    found = np.concatenate([predict(params, prepare(images["x_test"][rows])) for rows in batches])
    return float(np.mean(found == images["y_test"]))


if __name__ == "__main__":
    sample = load("fashion_mnist_sample", ".", image_size=None)
    arrays = {name: getattr(sample, name)[:] for name in ("x_train", "y_train", "x_test", "y_test")}
    accuracy = main(quickstart(), Path("runs/own_loop"), arrays)
    print(f"test accuracy after fine-tuning with 10 % of the labels: {accuracy:.3f}")
