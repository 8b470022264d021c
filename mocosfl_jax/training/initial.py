"""The models with which a run starts, if it continues from those of another one (`config.init_from`)."""

from pathlib import Path
from typing import Any

import jax

from mocosfl_jax.algorithm.interface import Models
from mocosfl_jax.errors import UserError
from mocosfl_jax.parallel.mesh import one_device
from mocosfl_jax.paths import utf8_path
from mocosfl_jax.training import checkpoint, workdir
from mocosfl_jax.training.build import build
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.weights.encoder_file import load_encoder


def initial_models(run: Run) -> Models | None:
    """Return the models in `config.init_from`, or None if the models of `run` are drawn.

    A workdir gives the online and the momentum models of its newest checkpoint. An encoder file holds online
    models; the momentum models start as their copies.

    Raises:
      UserError: if there are no models, or they are those of another network.
    """
    source = run.config.init_from
    if source is None:
        return None
    path = utf8_path("config.init_from", source)
    if not path.exists():
        raise UserError(f"config.init_from: found no {path}, allowed: a workdir or an encoder file")
    if path.is_dir():
        models = _of_workdir(run, path)
    else:
        online = load_encoder(path).params
        models = Models(online, online)
    _require_network(run, models.online, path)
    at_host: Models = jax.device_get(models)  # of no device in particular
    return at_host


def _of_workdir(run: Run, folder: Path) -> Models:
    config = workdir.read_config(folder, run.config.own)
    image_size = workdir.read_preprocessing(folder).image_size
    device = run.mesh.local_devices[0]
    _, algorithm = build(config, one_device(device), run.forms, image_size=image_size)
    state, _ = checkpoint.restore(folder / "checkpoints", None, algorithm, device)
    models: Models = jax.jit(algorithm.models)(state)
    return models


def _require_network(run: Run, found: Any, path: Path) -> None:
    """Raise UserError unless the parameters `found` have the names and shapes of the run's network."""
    wanted = jax.eval_shape(run.model.init, jax.random.key(0))
    shapes = [
        {jax.tree_util.keystr(name): leaf.shape for name, leaf in jax.tree_util.tree_leaves_with_path(params)}
        for params in (found, wanted)
    ]
    for name in [*shapes[0], *shapes[1]]:
        there, here = (shape.get(name, "no such parameter") for shape in shapes)
        if there != here:
            raise UserError(
                f"config.init_from: {path} has {name} of shape {there}, allowed: {here}, as in the network "
                "of this run"
            )
