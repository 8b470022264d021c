"""Attack the smashed data of clients by model inversion: how much of an image do they give away?

    python -m mocosfl_jax.attack --workdir=FOLDER [--checkpoint=STEP] [--config=FILE]
    python -m mocosfl_jax.attack --encoder=FILE.safetensors --out=FOLDER
    python -m mocosfl_jax.attack --official_clients=FILE.npz --out=FOLDER

  --workdir=FOLDER     attack client 0 of a run of mocosfl_jax.train, on the run's data set
  --checkpoint=STEP    a number in the run's checkpoints; default: the newest
  --smashed=query,key  which smashed data of a run; default: both
  --config=FILE        the config file of a run with functions of its own, which no workdir holds
  --encoder=FILE       attack the client side of an exported encoder, without the noise of its run
  --official_clients=FILE.npz
                       attack ResNet-18 clients of the official code: arrays NAME/PARAMETER, with the official
                       names of parameters; victims are attack_test_images_uint8_nhwc if the file has them
  --clients=NAME,...   only these of --official_clients
  --bottleneck=CxSy    of --official_clients; "none" for none; default: C4S2
  --data.name=NAME     data set for --encoder and --official_clients; default: cifar10
  --data.dir=FOLDER    where the data set is; default: config.data.dir of the run, or data
  --resist.source_dir=FOLDER
                       the same for the second data set of a run with config.resist.source
  --data.max_broken=SHARE  how large a share of a split's images may fail to decode; such images are black
  --out=FOLDER         for privacy.json and reconstructions.png; default: the run's folder
  --protocol=NAME      clean (default): true pixels, attackers without the victims' images, validation in
                       evaluation mode; official: with the official code's slips, for comparison
  --attackers=A,B,...  of trivial, ridge, official, strong, optimisation; default: all, or the first three
                       with --protocol=official
  --victims=N          images to reconstruct, the first of the test set, or drawn ones if it is in order
                       of class; default: 128
  --images=N           at most this many images for the strong and the larger ridge attacker; default: all
                       that fit
  --epochs=N           of the strong attacker; default: 20
  --official_epochs=N  of the official attacker; default: 50
  --decoder=NAME       of the strong attacker; default: res_normN4C64
  --loss=NAME          on which the strong attacker is trained: mse (default) or ssim
  --steps=N            of the optimisation; default: 1000
  --optimised=N        victims of the optimisation; default: 16
  --seed=N, --seeds=N  the first seed, and the number of attackers of each kind but optimisation, which has
                       one; default: 0 and 1
  --accept_other_data  use the data set even if it is not the one that the run was trained on

Prints a table. MSE/const is the attacker's error in terms of the error of one constant colour, the mean of
its own images: 1 means that nothing was learned, clearly more that the attack did not converge. Nothing is
downloaded.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from mocosfl_jax import commandline, data
from mocosfl_jax.algorithm.noise import Noise
from mocosfl_jax.commandline import say
from mocosfl_jax.config import Data
from mocosfl_jax.data import download
from mocosfl_jax.errors import UserError, renamed
from mocosfl_jax.paths import replacing, user_path, utf8_path
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import workdir

USAGE = "--workdir=FOLDER, --encoder=FILE, --official_clients=FILE and others, see --help"
# Flags that belong to one way of naming clients.
BELONGS = {
    "checkpoint": "workdir",
    "config": "workdir",
    "smashed": "workdir",
    "accept_other_data": "workdir",
    "resist.source_dir": "workdir",
    "clients": "official_clients",
    "bottleneck": "official_clients",
}
VICTIMS = "attack_test_images_uint8_nhwc"  # in a file of official clients


class Material(NamedTuple):
    """What is attacked, and with what."""

    clients: Mapping[str, Mapping[str, Any]]  # client -> view ("query", "key") -> model of normalised images
    images: data.Images  # of the attackers
    victims: np.ndarray  # [m, H, W, 3] uint8
    mean: Sequence[float]
    std: Sequence[float]
    victims_std: Sequence[float] | None  # the official protocol's, where it is another
    source: str
    data_name: str
    noise: Noise | None = None  # what the clients add to their smashed data


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, __doc__ or "", attack)


def attack(argv: Sequence[str]) -> None:
    """Attack as requested on the command line.

    Raises:
      UserError: if an argument is wrong, or the files do not hold what they should.
    """

    def define(values: flags.FlagValues) -> None:
        for name in ("workdir", "config", "encoder", "official_clients", "out"):
            flags.DEFINE_string(name, None, "Path.", flag_values=values)
        flags.DEFINE_integer("checkpoint", None, "Training step of the checkpoint.", flag_values=values)
        flags.DEFINE_list("smashed", ["query", "key"], "Of a run.", flag_values=values)
        flags.DEFINE_list("clients", None, "Names of official clients.", flag_values=values)
        flags.DEFINE_string("bottleneck", "C4S2", "Of the official clients.", flag_values=values)
        flags.DEFINE_string("resist.source_dir", None, "Where the run's source is.", flag_values=values)
        commandline.define_data(values)
        flags.DEFINE_string("protocol", "clean", "clean or official.", flag_values=values)
        flags.DEFINE_list("attackers", None, "Kinds of attackers.", flag_values=values)
        flags.DEFINE_string("decoder", "res_normN4C64", "Of the strong attacker.", flag_values=values)
        flags.DEFINE_string("loss", "mse", "Of the strong attacker.", flag_values=values)
        for name, default in (
            ("victims", 128),
            ("images", None),
            ("epochs", 20),
            ("official_epochs", 50),
            ("steps", 1000),
            ("optimised", 16),
            ("seeds", 1),
        ):
            flags.DEFINE_integer(name, default, "A number.", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("seed", 0, "Of the first attackers.", 0, 2**32 - 1, flag_values=values)
        flags.DEFINE_bool("accept_other_data", False, "Use other data.", flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define)
    given = [name for name in ("workdir", "encoder", "official_clients") if values[name].value]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise UserError(f"found {found}, allowed: one of --workdir, --encoder and --official_clients")
    for name, allowed in BELONGS.items():
        if values[name].present and given != [allowed]:
            raise UserError(f"--{name}: found with --{given[0]}, allowed: with --{allowed}")
    data_name = commandline.given_data(values).get("name")
    if data_name is not None and given == ["workdir"]:
        raise UserError(
            f"--data.name: found {data_name} with --workdir, allowed: with --encoder and "
            "--official_clients, since a run is attacked on its own data set"
        )
    if values.out is None and given != ["workdir"]:
        raise UserError(f"--out is missing; allowed: {USAGE}")
    out = user_path("--out", values.out) if values.out is not None else utf8_path("--workdir", values.workdir)
    name = "--out" if values.out is not None else "--workdir"
    if out.exists() and not out.is_dir():
        raise UserError(f"{name}: found {out}, allowed: a folder")

    compiler.set_up()
    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.models.forms import forms
    from mocosfl_jax.privacy import attacks, report

    default = attacks.ATTACKERS if values.protocol == "clean" else attacks.ATTACKERS[:3]
    settings = attacks.Settings(
        attackers=tuple(values.attackers or default),
        protocol=values.protocol,
        seed=values.seed,
        seeds=values.seeds,
        images=values.images,
        epochs=values.epochs,
        official_epochs=values.official_epochs,
        decoder=values.decoder,
        loss=values.loss,
        optimised=values.optimised,
        steps=values.steps,
    )
    with renamed({"decoder": "--decoder"}):
        attacks.check_names(settings)
    load = {"workdir": _of_run, "encoder": _of_encoder, "official_clients": _of_official_clients}[given[0]]
    with download.forbidden():
        material = load(values)
    size = material.victims.shape[1]
    for views in material.clients.values():
        with renamed({"decoder": "--decoder"}):
            attacks.check(settings, len(material.images), next(iter(views.values())), size)

    commandline.make_folder(name, out)

    images = data.images.in_memory(material.images)
    about = {"source": material.source, "data": material.data_name, **settings._asdict()}
    about |= {"noise": 0.0, "clip": None}
    if material.noise is not None:
        about |= {"noise": material.noise.std, "clip": material.noise.clip}
    results = {}
    for client, views in material.clients.items():
        results[client] = attacks.attack(
            views,
            images,
            material.victims,
            material.mean,
            material.std,
            settings=settings,
            forms=forms(jax.devices()[0].platform),
            victims_std=material.victims_std,
            noise=material.noise,
            bar=_bar,
        )
        say(f"{client}, {_noise_shown(material.noise)}\n{report.table(results[client])}")
        # After each client, since the next may take long.
        with replacing(out / "privacy.json") as temporary:
            temporary.write_text(json.dumps(report.record(results, about), indent=2) + "\n")
        report.draw_reconstructions(out / "reconstructions.png", material.victims, results)
    say(f"{out}: privacy.json, reconstructions.png")


def _of_run(values: flags.FlagValues) -> Material:
    """Client 0 of a run: its online model and its momentum model."""
    folder = utf8_path("--workdir", values.workdir)
    config = workdir.read_config(folder, commandline.own_functions(values.config))
    for name, value in commandline.given_data(values).items():
        setattr(config.data, name, value)
    config.resist.source_dir = values["resist.source_dir"].value or config.resist.source_dir
    if config.algorithm != "mocosfl":
        raise UserError(
            f"config.algorithm: found {config.algorithm}, allowed: mocosfl, as others send no smashed data"
        )
    _require_layers(config.model.cut_layer)
    workdir.chosen_checkpoints(folder / "checkpoints", values.checkpoint)
    wanted = dict.fromkeys(values.smashed)
    if not wanted or not set(wanted) <= {"query", "key"}:
        raise UserError(
            f"--smashed: found {','.join(values.smashed) or 'nothing'}, allowed: query, key or both"
        )

    from mocosfl_jax.algorithm.clients import Pool
    from mocosfl_jax.parallel.mesh import one_device
    from mocosfl_jax.training import checkpoint, experiment
    from mocosfl_jax.training.build import noise_of, online_models

    device = jax.devices()[0]
    run = experiment.of_workdir(
        config, one_device(device), folder, accept_other_data=values.accept_other_data
    )
    state, progress = checkpoint.restore(folder / "checkpoints", values.checkpoint, run.algorithm, device)
    say(f"{folder}: checkpoint {progress.step:,}")
    views = {}
    for name in wanted:
        if name == "query":
            views[name] = online_models(run.algorithm, state)[0]
        elif isinstance(state.pool, Pool):
            views[name] = _momentum_model(state)
        else:
            raise UserError(
                "--smashed: found key, allowed: query for an algorithm that keeps its clients in its own way"
            )
    return Material(
        {"client 0": {name: partial(run.model.client, params) for name, params in views.items()}},
        run.dataset.x_train,
        _victims(run.dataset, values.victims),
        run.dataset.mean,
        run.dataset.std,
        _victims_std(config.data.name),
        f"checkpoint {progress.step:,} of {folder}",
        config.data.name,
        noise_of(config),
    )


def _momentum_model(state: Any) -> Any:
    """The momentum model of client 0, which computes the keys."""
    shared = state.pool.shared.key_params
    return jax.tree.map(lambda leaf: leaf[0], state.pool.own.key_params) if shared is None else shared


def _of_encoder(values: flags.FlagValues) -> Material:
    """The client side of an exported encoder."""
    from mocosfl_jax.models.forms import forms
    from mocosfl_jax.weights.encoder_file import load_encoder

    path = user_path("--encoder", values.encoder)
    encoder = load_encoder(path, forms(jax.devices()[0].platform))
    network = encoder.metadata.network
    _require_layers(network["cut_layer"])
    dataset, data_name = _load(values, network.get("image_size", 32))
    mean, std = encoder.metadata.mean, encoder.metadata.std
    if not np.allclose([mean, std], [dataset.mean, dataset.std], atol=5e-4):
        say(f"{path}: normalises by mean {_shown(mean)} and std {_shown(std)}, not those of {data_name}")
    return Material(
        {path.name: {"query": partial(encoder.model.client, encoder.params[0])}},
        dataset.x_train,
        _victims(dataset, values.victims),
        mean,
        std,
        _victims_std(data_name),
        str(path),
        data_name,
    )


def _of_official_clients(values: flags.FlagValues) -> Material:
    """ResNet-18 clients of the official code. The number of their layers follows from their parameters."""
    path = user_path("--official_clients", values.official_clients)
    arrays = _read_npz(path)
    states: dict[str, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        name, slash, parameter = key.rpartition("/")
        if slash:
            states.setdefault(name, {})[parameter] = value
    names = values.clients or list(states)
    if not states or set(names) - set(states):
        missing = sorted(set(names) - set(states)) or "no array NAME/PARAMETER"
        raise UserError(f"{path}: found {missing}, allowed for --clients: {', '.join(states) or 'none'}")
    victims = arrays.get(VICTIMS)
    if victims is not None and (
        victims.dtype != np.uint8
        or victims.ndim != 4
        or victims.shape[-1] != 3
        or victims.shape[1] != victims.shape[2]
        or not victims.size
    ):
        raise UserError(
            f"{path}: {VICTIMS}: found {victims.dtype} of shape {victims.shape}, allowed: uint8 [m, H, H, 3] "
            "with m of 1 or more"
        )

    from mocosfl_jax.models import split_model
    from mocosfl_jax.models.forms import forms
    from mocosfl_jax.weights.official import client_from_official

    size = 32 if victims is None else victims.shape[1]
    bottleneck = None if values.bottleneck.lower() == "none" else values.bottleneck
    clients = {}
    for name in names:
        layers = {key.split(".")[0] for key in states[name] if re.fullmatch(r"\d+\.conv1\.weight", key)}
        _require_layers(len(layers))
        network: dict[str, Any] = {"name": "resnet18", "cut_layer": len(layers), "bottleneck": bottleneck}
        first = states[name].get("0.conv1.weight")
        width = len(first) if first is not None and first.ndim == 4 else 64
        network |= {"width": width, "image_size": size}
        try:
            params = client_from_official(states[name], **network)
        except UserError as error:
            raise UserError(f"{path}: {name}: {error}") from error
        model = split_model(**network, forms=forms(jax.devices()[0].platform))
        clients[name] = {"query": partial(model.client, params)}
    dataset, data_name = _load(values, size)
    shown = _victims(dataset, values.victims) if victims is None else victims[: values.victims]
    std = _victims_std(data_name)
    return Material(
        clients,
        dataset.x_train,
        shown,
        dataset.mean,
        dataset.std,
        std,
        str(path),
        data_name,
    )


def _noise_shown(noise: Noise | None) -> str:
    return "no noise" if noise is None else f"noise {noise.std:g}, clip {noise.clip:g}"


def _shown(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.3f}" for number in numbers)


def _require_layers(cut_layer: int) -> None:
    if not cut_layer:
        raise UserError("config.model.cut_layer: found 0, allowed: 1 or more; such clients send their images")


def _load(values: flags.FlagValues, image_size: int) -> tuple[data.Dataset, str]:
    """The data set that the flags name, and its name."""
    given = commandline.given_data(values)
    return commandline.load_data(given, image_size), Data(**given).name


def _victims(dataset: data.Dataset, count: int) -> np.ndarray:
    """The test images that are attacked: [m, H, W, 3] uint8."""
    from mocosfl_jax.privacy import protocol

    return dataset.x_test[protocol.victim_rows(dataset.y_test, count)]


def _victims_std(data_name: str) -> Sequence[float] | None:
    """The official code normalises its file of CIFAR-10 victims by another standard deviation."""
    from mocosfl_jax.privacy import protocol

    return protocol.OFFICIAL_VICTIMS_STD if data_name == "cifar10" else None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{path}: not an npz file ({' '.join(str(error).split())})") from error


@contextmanager
def _bar(name: str, total: int) -> Iterator[Any]:
    with tqdm(total=total, desc=name, unit="epoch", disable=None, dynamic_ncols=True) as bar:
        yield bar.update


if __name__ == "__main__":
    sys.exit(main(sys.argv))
