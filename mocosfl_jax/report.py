"""What a run tells a person: its header, a line per evaluation, its closing summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mocosfl_jax.experiment import Run
from mocosfl_jax.mocosfl import TrainState


def header(run: Run, state: TrainState) -> str:
    """Devices, data, clients, both sides of the cut, and the plan of the run; one line each."""
    config, dataset, model, parts = run.config, run.dataset, run.model, run.parts
    clients = config.clients
    sizes = [len(part) for part in parts]
    classes = [len(np.unique(dataset.y_train[part])) for part in parts]
    height, width, channels = dataset.x_train.shape[1:]
    batch = (run.images_per_step, height, width, channels)
    client_params = jax.tree.map(lambda leaf: leaf[0], state.clients.params)
    smashed = jax.eval_shape(model.client, client_params, jax.ShapeDtypeStruct(batch, np.float32))
    smashed_bytes = smashed.size * smashed.dtype.itemsize
    device = jax.devices()[0]
    rows = {
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform}), jax {jax.__version__}",
        "data": f"{dataset.source}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test "
        f"images, {height}x{width}x{channels}, {len(dataset.class_names)} classes",
        "clients": f"{clients.num:,}, {'all' if run.whole_pool else f'{run.cohort:,}'} in an epoch; each "
        f"{_span(sizes)} images of {_span(classes)} classes, batch {clients.batch_size}",
        "client side": f"{config.model.name} width {config.model.width} up to cut layer "
        f"{config.model.cut_layer}: {_params(client_params)} a client",
        "server side": f"{_params(state.server.params)}; queue of {config.moco.queue_size:,} keys",
        "smashed data": f"2 x {_bytes(smashed_bytes)} up and {_bytes(smashed_bytes)} down a step",
        "plan": f"{config.total_epochs:,} epochs of {run.steps_per_epoch:,} steps of {batch[0]:,} images, "
        f"synchronized every {run.steps_per_round:,} steps; seed {config.seed}",
    }
    return "\n".join(f"{name:<13}{text}" for name, text in rows.items())


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _params(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    size = sum(leaf.size for leaf in leaves)
    return f"{size:,} parameters ({_bytes(sum(leaf.nbytes for leaf in leaves))})"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


_NAMES = {
    "loss": "loss",
    "top1": "contrastive accuracy",
    "knn_backbone": "kNN backbone",
    "knn_projection": "kNN projection",
    "knn_raw_pixels": "raw pixels",
    "linear_probe": "linear probe",
}


def metrics_line(metrics: Mapping[str, float]) -> str:
    """A line of metrics.jsonl for a person."""
    parts = [f"epoch {metrics['epoch']:>3}"]
    parts += [f"{name} {metrics[field]:.3f}" for field, name in _NAMES.items() if field in metrics]
    if "images_per_s" in metrics:
        parts.append(f"{metrics['images_per_s']:,.0f} images/s")
    return "  ".join(parts)


def summary(metrics: Sequence[Mapping[str, float]], workdir: Path) -> str:
    """What came out of a finished run, from the lines of its metrics.jsonl."""
    trained = [m for m in metrics if "knn_backbone" in m][-1]
    return (
        f"{accuracies({**metrics[0], **trained, **metrics[-1]}, metrics[0])}\n"
        f"{workdir}: config.json, metrics.jsonl, checkpoints, curves.png, partition.png"
    )


_PROBES = {
    "linear_probe": "linear probe",
    "semi_supervised_10_percent": "10 % of the labels",
    "semi_supervised_1_percent": "1 % of the labels",
}


def accuracies(trained: Mapping[str, float], untrained: Mapping[str, float]) -> str:
    """A table of what was evaluated.

    Args:
      trained: accuracies by their names in metrics.jsonl and evaluation.json.
      untrained: those of the untrained network; may be empty.
    """
    rows = [f"{'':<24}{'backbone':>10}{'projection':>12}"]
    for name, numbers in (("kNN, untrained", untrained), ("kNN, trained", trained)):
        if numbers:
            rows.append(f"{name:<24}{numbers['knn_backbone']:>10.3f}{numbers['knn_projection']:>12.3f}")
    if "knn_raw_pixels" in trained:
        rows.append(f"{'kNN, raw pixels':<24}{trained['knn_raw_pixels']:>10.3f}")
    for field, name in _PROBES.items():
        if field in trained:
            rows.append(
                f"{name:<24}{trained[field]:>10.3f}"
                f"   (last epoch; best epoch on the test images {trained[f'{field}_best_on_test']:.3f})"
            )
    return "\n".join(rows)
