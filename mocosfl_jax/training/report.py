"""Text for the user: the header of a run, a line per evaluation and the closing summary."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mocosfl_jax.config import Resist, Resolved, name_of
from mocosfl_jax.data import find
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.runtime import hosts
from mocosfl_jax.runtime.environment import environment
from mocosfl_jax.training.experiment import Run

_PACKAGES = ("python", "jax", "jaxlib", "flax", "optax", "numpy", "mocosfl_jax")


def header(run: Run) -> str:
    """Describe devices, data, clients, both sides of the cut, and the plan of the run; one line each."""
    config, dataset, parts = run.config, run.dataset, run.parts
    pool, sync, optim = config.clients, config.sync, config.optim
    classes = [len(np.unique(dataset.y_train[part])) for part in parts] if run.simulated else []
    height, width, channels = dataset.x_train.shape[1:]
    client_params, server_params = jax.eval_shape(run.model.init, jax.random.key(0))
    device = meshes.first_device(run.mesh)
    versions = environment(device, run.mesh.shape)
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if name in _PACKAGES)
    rows = {
        "devices": f"{run.mesh.size} x {device.device_kind} ({device.platform})"
        f"{f' in {jax.process_count()} processes' if hosts.several() else ''}{meshes.describe(run.mesh)}"
        + (f", computing in {dtype}" if (dtype := config.model.compute_dtype) != "float32" else ""),
        "versions": f"{packages}; commit {versions['commit'] or 'unknown'}",
        "data": f"{dataset.source}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test "
        f"images, {height}x{width}x{channels}, {len(dataset.class_names)} classes",
        "source": run.source.description if run.source else "",
        "not used": find.counted(dataset.unused) + " (named with -v)" if dataset.unused else "",
        "images": f"{'resident on the device' if run.residence.resident else 'streamed from the host'}: "
        f"{_bytes(math.prod(run.views.shape))}; {run.residence.why}"
        if run.simulated
        else "held by the clients",
        "clients": f"{pool.num:,}, {'all' if run.whole_pool else f'{run.cohort:,}'} in each epoch; each has "
        f"{_span([len(part) for part in parts])} images"
        f"{f' of {_span(classes)} classes' if classes else ''}, "
        f"batch {_span(run.batch_sizes.tolist())}" + (f"; {run.rich.clients} rich" if run.rich else ""),
    }
    if config.algorithm == "flmoco":
        rows["FL-MoCo"] = (
            f"whole {network_name(config)}: {_params((client_params, server_params))} and a queue of "
            f"{config.moco.queue_size:,} keys per client"
        )
    else:
        smashed_bytes = run.smashed.size * run.smashed.dtype.itemsize
        frozen = optim.client_lr == 0
        network = [network_name(config)]
        if config.own.network is None:
            width, bottleneck = config.model.width, config.model.bottleneck
            network = [
                f"{network[0]}{f' width {width}' if width else ''} up to cut layer {config.model.cut_layer}",
                *([f"bottleneck {bottleneck}"] if bottleneck else []),
            ]
        network += ["frozen"] if frozen else []
        keys = f"queue of {config.moco.queue_size:,} keys"
        if not config.moco.feature_sharing:
            keys = f"{pool.num:,} queues of {config.moco.queue_size // pool.num:,} keys"
        rows |= {
            "client side": f"{', '.join(network)}: {_params(client_params)} per client",
            "server side": f"{_params(server_params)}; {keys}"
            + ("" if config.moco.concatenate else "; a step for each client, one after another"),
            "smashed data": f"2 x {_bytes(smashed_bytes)} up and "
            f"{_bytes(smashed_bytes if run.gradients_return else 0)} down per step",
        }
    if resist := config.resist.strength:
        rows["adversary"] = (
            f"decoder {config.resist.decoder}, {config.resist.preset}; lambda {resist:g}, SSIM target "
            f"{config.resist.ssim_target:g}"
        )
    elif config.resist != Resist():
        rows["adversary"] = "none, since config.resist.strength is 0"
    if noise := config.privacy.noise:
        rows["noise"] = (
            f"standard deviation {noise:g} of the bound on smashed data, a root mean square of "
            f"{config.privacy.clip:g}"
        )
    epochs = "1 epoch" if config.total_epochs == 1 else f"{config.total_epochs:,} epochs"
    interval = "step" if run.steps_per_round == 1 else f"{run.steps_per_round:,} steps"
    rows["plan"] = (
        f"{epochs} of {run.steps_per_epoch:,} steps of {run.images_per_step:,} images, "
        f"synchronized every {interval}{', MonAcoSFL' if sync.momentum_models else ''}; "
        f"{'' if run.whole_pool else _passes(run)}seed {config.seed}"
    )
    return "\n".join(f"{name:<13}{text}" for name, text in rows.items() if text)


def network_name(config: Resolved) -> str:
    """The name of the network, or of your own function that makes it."""
    return config.model.name if config.own.network is None else name_of(config.own.network)


def _passes(run: Run) -> str:
    """How often a client takes part: N // M is rounded, so it may not be `epochs` times."""
    passes = run.config.total_epochs * run.cohort / run.config.clients.num
    return (
        f"a client takes part in {passes:,.4g} epochs on average, for config.epochs {run.config.epochs:,}; "
    )


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _params(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    size = sum(leaf.size for leaf in leaves)
    return f"{size:,} parameters ({_bytes(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))})"


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
    "linear_probe_raw_pixels": "on raw pixels",
    "divergence": "divergence",
    "ssim_decoder": "SSIM decoder",
    "ssim_regulariser": "regulariser",
    "ssim_in_loop": "on test images",
    "ssim_fresh": "fresh decoder",
}


def metrics_line(metrics: Mapping[str, float]) -> str:
    """Format a line of metrics.jsonl for the screen.

    Example:
      >>> metrics_line({"step": 60, "epoch": 1, "loss": 7.25, "knn_backbone": 0.5})
      'epoch   1  loss 7.250  kNN backbone 0.500'
    """
    parts = [f"epoch {metrics['epoch']:>3}"]
    parts += [f"{name} {metrics[field]:.3f}" for field, name in _NAMES.items() if field in metrics]
    if "smashed_up_bytes" in metrics:
        up, down = metrics["smashed_up_bytes"], metrics["smashed_down_bytes"]
        parts.append(f"sent {_bytes(up)} up, {_bytes(down)} down")
    if "images_per_s" in metrics:
        parts.append(f"{metrics['images_per_s']:,.0f} images/s")
    return "  ".join(parts)


def collapse_line(config: Resolved, metrics: Mapping[str, float]) -> str:
    """Say that the features have collapsed, and what usually helps.

    Args:
      config: of the run.
      metrics: the line of metrics.jsonl with `collapsed`.
    """
    loss = f"loss {metrics['loss']:.4g}"
    if config.own.algorithm is None:
        loss += f", and {constant_loss(config):.4g} if all keys were equal"
    return (
        f"the features have collapsed: those of all images are almost equal (spread {metrics['spread']:.1e}, "
        f"{loss}). What usually helps is a smaller config.optim.server_lr or client_lr; at a deep cut, "
        "config.sync.momentum_models=True"
    )


def constant_loss(config: Resolved) -> float:
    """Return InfoNCE if all queries and keys are equal: ln(K + 1), twice with the symmetric loss."""
    moco = config.moco
    own_queues = not moco.feature_sharing and config.algorithm == "mocosfl"
    keys = moco.queue_size // config.clients.num if own_queues else moco.queue_size
    directions = 2 if moco.symmetric and not moco.full_symmetric else 1
    return directions * math.log(keys + 1)


def summary(metrics: Sequence[Mapping[str, float]], workdir: Path, start: str = "untrained") -> str:
    """Summarize a finished run.

    Args:
      metrics: the lines of its metrics.jsonl.
      workdir: its folder.
      start: what the network is before the first step.
    """
    trained = [m for m in metrics if "knn_backbone" in m][-1]
    rows = [accuracies({**metrics[0], **trained, **metrics[-1]}, metrics[0], start)]
    epochs = [m for m in metrics if "smashed_up_bytes" in m]
    if epochs:
        sent = sum(m["smashed_up_bytes"] + m["smashed_down_bytes"] for m in epochs)
        whole = len(epochs) * max(m["smashed_up_bytes"] + m["smashed_down_bytes"] for m in epochs)
        saved = f"{_bytes(whole - sent)} of {_bytes(whole)} saved"
        rows.append(f"smashed data and gradients: {_bytes(sent)} sent, {saved}")
    pictures = ("curves.png", "partition.png", "neighbours.png", "embedding.png")
    drawn = [name for name in pictures if (workdir / name).exists()]
    files = ", ".join(["config.json, preprocessing.json, metrics.jsonl, checkpoints", *drawn])
    rows.append(f"{workdir}: {files}")
    return "\n".join(rows)


_PROBES = {
    "linear_probe": "linear probe",
    "linear_probe_raw_pixels": "linear, raw pixels",
    "semi_supervised_10_percent": "10 % of the labels",
    "semi_supervised_1_percent": "1 % of the labels",
}


def before_training(init_from: str | None) -> str:
    """What the network before the first step is called: it need not be untrained.

    Example:
      >>> before_training(None), before_training("runs/expert")
      ('untrained', 'at the start')
    """
    return "untrained" if init_from is None else "at the start"


def accuracies(trained: Mapping[str, float], untrained: Mapping[str, float], start: str = "untrained") -> str:
    """Format accuracies as a table.

    Args:
      trained: accuracies by their names in metrics.jsonl and evaluation.json.
      untrained: those of the network before the first step; may be empty.
      start: what that network is.

    Example:
      >>> print(accuracies({"knn_backbone": 0.758, "knn_projection": 0.783}, {}))
                                backbone  projection
      kNN, trained                 0.758       0.783
    """
    rows = [f"{'':<24}{'backbone':>10}{'projection':>12}"]
    for name, numbers in ((f"kNN, {start}", untrained), ("kNN, trained", trained)):
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
