"""The models with which a run starts, if it continues from those of another one (`config.init_from`)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import Array

from mocosfl_jax.algorithm.interface import Models
from mocosfl_jax.errors import UserError
from mocosfl_jax.models.named import stem_stride_of
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.paths import utf8_path
from mocosfl_jax.training import checkpoint, workdir
from mocosfl_jax.training.build import FIELDS, build, network_record
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.weights.encoder_file import load_encoder

SIDES = ("client", "server")  # the order of the parameters in `Models`
# What changes the network, but not the shapes of its parameters.
SHAPELESS = ("norm", "weight_standardisation", "client_residual", "bottleneck", "stem_stride")


class Found(NamedTuple):
    """Models, and the images that they were trained on."""

    models: Models
    image_size: int | None  # in pixels; None: not recorded
    mean: Sequence[float]  # by which images are normalised
    std: Sequence[float]
    network: Mapping[str, Any]  # from `network_record`


def initial_models(run: Run, rng: Array) -> Models | None:
    """Return the models with which the run starts, or None if `algorithm.init` draws all of them from `rng`.

    A workdir in `config.init_from` gives the online and the momentum models of its newest checkpoint. An
    encoder file holds online models; the momentum models start as their copies. A side of the cut that
    `config.init_parts` does not name is drawn, as without `config.init_from`.

    Raises:
      UserError: if there are no models, or they are those of another network or of other images.
    """
    source, parts = run.config.init_from, run.config.init_parts
    if source is None:
        return None
    path = utf8_path("config.init_from", source)
    if not path.exists():
        raise UserError(f"config.init_from: found no {path}, allowed: a workdir or an encoder file")
    found = _of_workdir(run, path) if path.is_dir() else _of_file(path)
    _require_images(run, found, path)
    models = found.models
    if parts == "client" and not jax.tree.leaves(models.online[0]):
        raise UserError("config.init_parts: found client, whose model has no parameters, allowed: server")
    sides = SIDES if parts == "both" else (parts,)
    _require_network(run, models.online, sides, path)
    _require_layers(run, found.network, parts, path)
    if parts != "both":
        draw = jax.jit(
            lambda rng: run.algorithm.models(run.algorithm.init(rng)),
            out_shardings=meshes.everywhere(run.mesh),  # so that each process can read them
        )
        drawn: Models = draw(rng)
        models = Models(*(_chosen(parts, *both) for both in zip(drawn, models, strict=True)))
    at_host: Models = jax.device_get(models)  # of no device in particular
    wanted = jax.tree.leaves(jax.eval_shape(run.model.init, jax.random.key(0)))

    def in_dtypes_of_run(model: Any) -> Any:  # a file may have others
        leaves, structure = jax.tree.flatten(model)
        return jax.tree.unflatten(
            structure, [leaf.astype(like.dtype) for leaf, like in zip(leaves, wanted, strict=True)]
        )

    return Models(*map(in_dtypes_of_run, at_host))


def _chosen(part: str, drawn: tuple[Any, Any], found: tuple[Any, Any]) -> tuple[Any, Any]:
    """The drawn parameters, with those of one side replaced by the ones that were found."""
    return (found[0], drawn[1]) if part == "client" else (drawn[0], found[1])


def _of_file(path: Path) -> Found:
    encoder = load_encoder(path)
    metadata = encoder.metadata
    size = metadata.network.get("image_size")
    return Found(Models(encoder.params, encoder.params), size, metadata.mean, metadata.std, metadata.network)


def _of_workdir(run: Run, folder: Path) -> Found:
    config = workdir.read_config(folder, run.config.own)
    images = workdir.read_preprocessing(folder)
    device = run.mesh.local_devices[0]
    _, algorithm = build(config, meshes.one_device(device), run.forms, image_size=images.image_size)
    state, _ = checkpoint.restore(folder / "checkpoints", None, algorithm, device)
    models: Models = jax.jit(algorithm.models)(state)
    record = network_record(config, images.image_size)
    return Found(models, images.image_size, images.mean, images.std, record)


def _require_images(run: Run, found: Found, path: Path) -> None:
    """Raise UserError unless the images are like the run's.

    Another normalisation is refused where the clients are frozen: others can learn it.
    """
    size = run.dataset.x_train.shape[1]
    if found.image_size not in (None, size):
        raise UserError(
            f"config.init_from: {path} is of images of {found.image_size} pixels, allowed: {size}, those of "
            "this run (config.data.image_size)"
        )
    if run.config.optim.client_lr or run.config.init_parts == "server":
        return
    for name, there, here in (("mean", found.mean, run.dataset.mean), ("std", found.std, run.dataset.std)):
        if not all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(there, here, strict=True)):
            raise UserError(
                f"config.init_from: {path} is of images normalised by {name} {_numbers(there)}, allowed: "
                f"{_numbers(here)}, that of this run, since its clients are frozen"
            )


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"


def _require_network(run: Run, found: Any, sides: Sequence[str], path: Path) -> None:
    """Raise UserError unless these sides of the parameters have the names and shapes of the run's network."""
    wanted = jax.eval_shape(run.model.init, jax.random.key(0))
    shapes = [
        {
            jax.tree_util.keystr(name): leaf.shape
            for name, leaf in jax.tree_util.tree_leaves_with_path(params)
            if SIDES[name[0].idx] in sides
        }
        for params in (found, wanted)
    ]
    for name in [*shapes[0], *shapes[1]]:
        there, here = (shape.get(name, "no such parameter") for shape in shapes)
        if there != here:
            raise UserError(
                f"config.init_from: {path} has {name} of shape {there}, allowed: {here}, as in the network "
                "of this run"
            )


def _require_layers(run: Run, found: Mapping[str, Any], parts: str, path: Path) -> None:
    """Raise UserError unless the layers compute what those of the run's network compute with the parameters.

    Networks of your own are compared by their shapes only.
    """
    size = run.dataset.x_train.shape[1]
    wanted = network_record(run.config, size)
    if "function" in found or "function" in wanted:
        return
    of_client = ("client_residual", "stem_stride") if run.config.model.cut_layer > 0 else ("client_residual",)
    for name in SHAPELESS:
        if parts == "server" and name in of_client:
            continue
        there, here = (
            stem_stride_of(record.get(name), size) if name == "stem_stride" else record.get(name)
            for record in (found, wanted)
        )
        if name in found and there != here:
            raise UserError(
                f"config.init_from: {path} is of a network with {FIELDS[name]} of {there}, allowed: {here}, "
                "as in the network of this run"
            )
