"""An encoder in one safetensors file: the parameters of both sides of the cut, and how to use them.

The format holds arrays and a text header but no code, and other programs can read it. Parameters are named
after their place in the tree, for example "client/layer0/conv1/kernel".
"""

import json
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mocosfl_jax.errors import UserError
from mocosfl_jax.models import SplitModel, split_model
from mocosfl_jax.models.forms import ACCELERATOR, Forms
from mocosfl_jax.paths import replacing

FORMAT = "mocosfl_jax encoder 1"

Params = Any  # a tree of arrays


class Metadata(NamedTuple):
    """Describes the encoder in a file. The values are plain and are stored in the header as JSON."""

    network: dict[str, Any]  # arguments of `split_model`
    mean: tuple[float, ...]  # mean of each channel, for images in [0, 1], to normalise images with
    std: tuple[float, ...]  # standard deviation of each channel, for images in [0, 1]
    source: str = ""  # where the parameters come from, for human readers


class Encoder(NamedTuple):
    """A trained network, as `load_encoder` returns it."""

    model: SplitModel
    params: tuple[Params, Params]  # client-side and server-side parameters
    metadata: Metadata


def export_encoder(path: Path, client_params: Params, server_params: Params, metadata: Metadata) -> None:
    """Writes the parameters of one client and of the server to a safetensors file.

    The file is replaced atomically: a reader sees either the old file or the complete new one.

    Args:
      path: The file to write.
      client_params: Client-side parameters, without a client axis.
      server_params: Server-side parameters.
      metadata: The network that the parameters belong to, and the statistics of its images.

    Raises:
      OSError: If the file cannot be written.
    """
    tensors = {
        name: np.ascontiguousarray(leaf) for name, leaf in _named((client_params, server_params)).items()
    }
    header = {field: json.dumps(value) for field, value in metadata._asdict().items()}
    try:
        header["version"] = version("mocosfl-jax")
    except PackageNotFoundError:  # the package is used without being installed
        header["version"] = "unknown"
    content = save(tensors, {"format": FORMAT, **header})
    # Not by safetensors, whose errors are no OSError, and whose files only their owner may read.
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def describe(client_params: Params, server_params: Params, metadata: Metadata) -> str:
    """One line that describes an encoder: its network, its numbers of parameters and its source."""
    name, cut_layer = metadata.network["name"], metadata.network["cut_layer"]
    client, server = (sum(x.size for x in jax.tree.leaves(side)) for side in (client_params, server_params))
    parameters = f"{client:,} parameters of the client and {server:,} of the server"
    return f"{name} cut at {cut_layer}, {parameters}, from {metadata.source}"


def load_encoder(path: Path | str, forms: Forms = ACCELERATOR) -> Encoder:
    """Loads an encoder and its network from a file that `export_encoder` has written.

    Example:
      >>> import tempfile
      >>> network = {"name": "resnet18", "cut_layer": 1, "width": 4, "key_dim": 8}
      >>> shapes = jax.eval_shape(split_model(**network).init, jax.random.key(0))
      >>> params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "encoder.safetensors"
      ...     export_encoder(path, *params, Metadata(network, mean=(0.5,) * 3, std=(0.25,) * 3))
      ...     load_encoder(path).metadata.network["cut_layer"]
      1

    Args:
      path: The file.
      forms: Of the platform on which the encoder will run, such as `forms("cpu")`. The default suits
        accelerators.

    Returns:
      The model, the client-side and server-side parameters (NumPy arrays), and the metadata.

    Raises:
      UserError: If the file is missing, damaged, or not an encoder of mocosfl_jax.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = _metadata(file.metadata() or {})
            model = split_model(**metadata.network, forms=forms)
            like = jax.eval_shape(model.init, jax.random.key(0))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    # The header may hold arguments of any type.
    except (SafetensorError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = " ".join(f"{error}".split())[:300]
        raise UserError(f"{path}: not an encoder of mocosfl_jax ({reason})") from error
    expected = _named(like)
    for name in [*tensors, *expected]:
        found = tensors[name].shape if name in tensors else "no such array"
        wanted = expected[name].shape if name in expected else "no such array"
        if found != wanted:
            raise UserError(f"{path}: {name}: found {found}, expected {wanted} for {metadata.network}")
        if tensors[name].dtype.kind != "f":
            raise UserError(f"{path}: {name}: found {tensors[name].dtype}, allowed: floats")
        if not np.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name}: found numbers that are not finite, allowed: finite ones")
    leaves = [tensors[name] for name in expected]
    params = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Encoder(model, params, metadata)


def _named(params: tuple[Params, Params]) -> dict[str, Any]:
    """Name in the file -> leaf, in the order of the tree."""
    leaves = jax.tree.leaves_with_path({"client": params[0], "server": params[1]})
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def _metadata(header: dict[str, str]) -> Metadata:
    """Parses the header. Raises ValueError if another program wrote it, or a value is impossible."""
    if header.get("format") != FORMAT:
        raise ValueError(f"its header does not say {FORMAT!r}")
    if missing := [field for field in Metadata._fields if field not in header]:
        raise ValueError(f"its header lacks {missing[0]}")
    values = {field: json.loads(header[field]) for field in Metadata._fields}
    for field in ("mean", "std"):
        numbers = values[field]
        if not isinstance(numbers, list) or len(numbers) != 3 or not all(map(math.isfinite, numbers)):
            raise ValueError(f"{field} is not three numbers")
        values[field] = tuple(numbers)
    if min(values["std"]) <= 0:
        raise ValueError("std is not above 0")
    if not isinstance(values["network"], dict):
        raise ValueError("network is not arguments of split_model")
    return Metadata(**values)
