"""Fine-tuning: train all layers of an encoder further, on a few labels.

    python -m mocosfl_jax.export --workdir=runs/quickstart --out=encoder.safetensors
    python examples/finetune.py encoder.safetensors

Of each class of the bundled Fashion-MNIST sample, 10 images have labels. The program prints the test accuracy
of a linear classifier on the frozen features, and that after fine-tuning.
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from mocosfl_jax import Encoder, data, encode_images, forms, linear_probe, load_encoder, normalise
from mocosfl_jax.evaluation.classifiers import stratified

Params = Any  # ((client side, server side), classifier)


def finetune(
    encoder: Encoder,
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    epochs: int = 30,
    batch_size: int = 20,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Params:
    """Train the encoder and a new linear classifier on images [n, H, W, 3] with labels [n], by Adam."""
    features = backbone(encoder, encoder.params, images[:1]).shape[1]
    classifier = {"kernel": jnp.zeros((features, num_classes)), "bias": jnp.zeros((1, num_classes))}
    params = (encoder.params, classifier)
    optimizer = optax.adam(learning_rate)
    opt_state = optimizer.init(params)

    def loss(params: Params, images: Array, labels: Array) -> Array:
        scores = logits(encoder, params, images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))

    @jax.jit
    def step(params: Params, opt_state: Any, images: Array, labels: Array) -> tuple[Params, Any]:
        gradients = jax.grad(loss)(params, images, labels)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state

    for rows in batches(len(images), batch_size, epochs, seed):
        params, opt_state = step(params, opt_state, images[rows], labels[rows])
    return params


def logits(encoder: Encoder, params: Params, images: ArrayLike) -> Array:
    """Scores [n, classes] of images [n, H, W, 3]."""
    parameters, classifier = params
    return backbone(encoder, parameters, images) @ classifier["kernel"] + classifier["bias"]


def backbone(encoder: Encoder, parameters: Any, images: ArrayLike) -> Array:
    """Features [n, D] of images [n, H, W, 3]."""
    client, server = parameters
    x = normalise(images, encoder.metadata.mean, encoder.metadata.std)
    return encoder.model.backbone(server, encoder.model.client(client, x))


def batches(images: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of the images of each step; an incomplete last batch of an epoch is dropped."""
    rng = np.random.default_rng(seed)
    size = min(batch_size, images)
    for _ in range(epochs):
        order = rng.permutation(images)
        yield from order[: images // size * size].reshape(-1, size)


def accuracy(encoder: Encoder, params: Params, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images that are classified correctly."""
    scores = jax.jit(lambda params, images: logits(encoder, params, images))
    blocks = [scores(params, images[i : i + 250]) for i in range(0, len(images), 250)]
    return float(np.mean(np.argmax(np.concatenate(blocks), axis=1) == labels))


def main(
    file: str, labels_per_class: int = 10, epochs: int = 30, max_test_images: int = 1000
) -> tuple[float, float]:
    """Print and return the test accuracies with frozen features and after fine-tuning."""
    encoder = load_encoder(file, forms(jax.default_backend()))
    dataset = data.load("fashion_mnist_sample", "data", image_size=None)
    classes = len(dataset.class_names)
    share = labels_per_class * classes / len(dataset.y_train)
    labelled = stratified(jax.random.key(0), dataset.y_train, share)
    images, labels = dataset.x_train[labelled], dataset.y_train[labelled]
    test_images, test_labels = dataset.x_test[:max_test_images], dataset.y_test[:max_test_images]

    train, test = (encode_images(encoder, each).backbone for each in (images, test_images))
    probe = linear_probe(
        jax.random.key(1), train, labels, test, test_labels, num_classes=classes, epochs=epochs, batch_size=20
    )
    params = finetune(encoder, images, labels, classes, epochs=epochs)
    tuned = accuracy(encoder, params, test_images, test_labels)
    print(f"{len(labels)} labels: linear probe {probe.last_epoch:.3f}, fine-tuned {tuned:.3f}")
    return probe.last_epoch, tuned


if __name__ == "__main__":
    main(sys.argv[1])
