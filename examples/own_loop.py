"""Your own loop and data: any arrays of images, Weights & Biases, early stopping, and fine-tuning at the end.

    pip install wandb
    python examples/own_loop.py

`run` trains as the command does: it saves, resumes and evaluates. `on_epoch` is where everything else goes.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import wandb
from finetune import accuracy, finetune  # examples/finetune.py

from mocosfl_jax import Config, run
from mocosfl_jax.config import Data, quickstart
from mocosfl_jax.data import load
from mocosfl_jax.evaluation.classifiers import stratified
from mocosfl_jax.runtime.compiler import set_up

PATIENCE = 3  # evaluations without a better kNN accuracy


def main(config: Config, folder: Path, images: dict[str, Any], share: float = 0.1, epochs: int = 30) -> float:
    """Train on `images`, stop early, fine-tune with a share of the labels, and return the test accuracy."""
    # Data: an npz file with x_train [n, H, W, 3] uint8, y_train [n] integers, x_test and y_test. Labels say
    # which images a client holds, and evaluate the features; no loss sees them.
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "images.npz", **images)
    config.data = Data(name="npz", dir=str(folder / "images.npz"))

    # Weights & Biases in offline mode: `wandb sync` uploads the run later.
    tracker = wandb.init(mode="offline", dir=folder, project="mocosfl", config={"epochs": config.epochs})
    accuracies: list[float] = []

    def on_epoch(metrics: Any, state: Any) -> bool:
        """Log an epoch. True ends the training: the last evaluations were all below the best one."""
        tracker.log(dict(metrics), step=int(metrics["step"]))
        if "knn_backbone" in metrics:  # every `config.eval.every` epochs
            accuracies.append(metrics["knn_backbone"])
        return len(accuracies) > PATIENCE and max(accuracies[-PATIENCE:]) < max(accuracies)

    trained = run(config, folder / "run", on_epoch=on_epoch)
    tracker.finish()

    # Fine-tuning: train all layers of the encoder further, on a share of the labels of each class.
    labels, classes = images["y_train"], int(images["y_train"].max()) + 1
    few = stratified(jax.random.key(0), labels, share)
    params = finetune(trained.encoder, images["x_train"][few], labels[few], classes, epochs=epochs)
    return accuracy(trained.encoder, params, images["x_test"], images["y_test"])


if __name__ == "__main__":
    set_up()  # before JAX's first operation
    sample = load("fashion_mnist_sample", "data", image_size=None)
    arrays = {name: getattr(sample, name)[:] for name in ("x_train", "y_train", "x_test", "y_test")}
    config = quickstart()
    config.eval.every = 1
    tuned = main(config, Path("runs/own_loop"), arrays)
    print(f"test accuracy after fine-tuning with 10 % of the labels: {tuned:.3f}")
