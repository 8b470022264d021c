"""An encoder in one safetensors file: parameters of both sides of the cut, and what is needed to use them.

The format holds arrays and a header of text, nothing that could run, and other programs read it too.
Parameters are named after their place, such as "client/layer0/conv1/kernel".
"""

import json
import math
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mocosfl_jax.errors import UserError
from mocosfl_jax.models import SplitModel, split_model

FORMAT = "mocosfl_jax encoder 1"

Params = Any  # a tree of arrays


class Metadata(NamedTuple):
    """What a file says of its encoder. Plain values, in the header as JSON."""

    network: dict[str, Any]  # arguments of `split_model`
    mean: tuple[float, ...]  # of each channel, on [0, 1], with which images are normalised
    std: tuple[float, ...]
    source: str = ""  # where the parameters are from, for people


class Encoder(NamedTuple):
    model: SplitModel
    params: tuple[Params, Params]  # of the client and of the server
    metadata: Metadata


def export_encoder(path: Path, client_params: Params, server_params: Params, metadata: Metadata) -> None:
    """Write one client's and the server's parameters; a reader sees the old file or the whole new one."""
    tensors = {
        name: np.ascontiguousarray(leaf) for name, leaf in _named((client_params, server_params)).items()
    }
    header = {field: json.dumps(value) for field, value in metadata._asdict().items()}
    try:
        header["version"] = version("mocosfl-jax")
    except PackageNotFoundError:  # used from a folder
        header["version"] = "unknown"
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(tensors, temporary, {"format": FORMAT, **header})
    temporary.replace(path)


def describe(client_params: Params, server_params: Params, metadata: Metadata) -> str:
    """One line on an encoder."""
    name, cut_layer = metadata.network["name"], metadata.network["cut_layer"]
    client, server = (sum(x.size for x in jax.tree.leaves(side)) for side in (client_params, server_params))
    parameters = f"{client:,} parameters of the client and {server:,} of the server"
    return f"{name} cut at {cut_layer}, {parameters}, from {metadata.source}"


def load_encoder(path: Path | str) -> Encoder:
    """The encoder of a file that `export_encoder` wrote, with its network.

    Raises:
      UserError: if it is another or a damaged file.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = _metadata(file.metadata() or {})
            model = split_model(**metadata.network)
            like = jax.eval_shape(model.init, jax.random.key(0))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    # From the header come arguments of any type.
    except (SafetensorError, ValueError, TypeError, AttributeError, OverflowError) as error:
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
    leaves = [tensors[name] for name in expected]
    params = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return Encoder(model, params, metadata)


def _named(params: tuple[Params, Params]) -> dict[str, Any]:
    """All leaves by their names in the file, in the order of the tree."""
    leaves = jax.tree.leaves_with_path({"client": params[0], "server": params[1]})
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def _metadata(header: dict[str, str]) -> Metadata:
    """What the header says; ValueError if it is of another program, or makes no sense."""
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
    if not isinstance(values["network"], dict):
        raise ValueError("network is not arguments of split_model")
    return Metadata(**values)
