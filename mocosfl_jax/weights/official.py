"""Converts checkpoints of the official MocoSFL code (checkpoint_c_*.tar, checkpoint_s_*.tar).

In the official code, each side of the cut is one `nn.Sequential`, whose numbering includes modules without
parameters. For example, "9.0.weight" is the first layer of the head of a ResNet-18 with cut layer 1: it
follows eight blocks and the global average pool.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mocosfl_jax.errors import UserError
from mocosfl_jax.models import split_model
from mocosfl_jax.models.bottleneck import Bottleneck, read_bottleneck
from mocosfl_jax.models.named import NETWORKS
from mocosfl_jax.models.network import Network

State = Mapping[str, np.ndarray]
Modules = dict[tuple[str, ...], str]  # path in our tree -> prefix of the official names
# Paths in our tree of consecutive modules in the official Sequential. None: a module without parameters.
Paths = Sequence[tuple[str, ...] | None]

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def from_official(client_state: State, server_state: State, **network: Any) -> tuple[Any, Any]:
    """Converts the state dicts of an official checkpoint to parameters of both sides of the cut.

    Args:
      client_state: The client's tensors by name, as `torch_file.read_state_dict` reads them.
      server_state: The server's tensors by name.
      **network: Arguments of `split_model`. The official code has group norm. Weight standardisation and the
        clients' shortcuts leave no trace in a checkpoint, so they have to be known.

    Returns:
      Client-side and server-side parameters, float32.

    Raises:
      UserError: If the tensors are not exactly those of this network.
    """
    fields = [f"{field} {value}" for field, value in network.items() if value is not None and field != "name"]
    described = f"{network['name']} ({', '.join(fields)})"
    if network.get("norm", "group") != "group":
        raise UserError(f"norm: found {network['norm']!r}, allowed: group for official checkpoints")
    trees = jax.eval_shape(split_model(**network).init, jax.random.key(0))
    modules = _modules(server_state=server_state, **network)
    transposed = network.get("bottleneck") is not None and read_bottleneck(network["bottleneck"]).halvings > 0
    names = NETWORKS[network["name"]].official_names
    return (
        _side("client", client_state, trees[0], modules[0], names, described, None),
        _side(
            "server",
            server_state,
            trees[1],
            modules[1],
            names,
            described,
            "bottleneck" if transposed else None,
        ),
    )


def client_from_official(client_state: State, **network: Any) -> Any:
    """Converts the state dict of a client alone, where the server's is not known.

    Args:
      client_state: The client's tensors by name.
      **network: Arguments of `split_model`, as for `from_official`.

    Returns:
      Client-side parameters, float32.

    Raises:
      UserError: If the tensors are not exactly those of this network's client.
    """
    tree, _ = jax.eval_shape(split_model(**network).init, jax.random.key(0))
    modules, _ = _modules(server_state={}, **network)
    described = f"{network['name']} cut at {network['cut_layer']}, bottleneck {network.get('bottleneck')}"
    names = NETWORKS[network["name"]].official_names
    return _side("client", client_state, tree, modules, names, described, None)


def official_key(path: tuple[str, ...], modules: Modules, names: Mapping[str, str]) -> str:
    """The official name of one of our parameters.

    Example:
      >>> official_key(("layer3", "norm1", "scale"), {("layer3",): "2"}, {})
      '2.bn1.weight'

    Args:
      path: The parameter's path in our tree.
      modules: The prefixes of the official names, by path of the module.
      names: Official names of submodules, by ours. Others differ only in norm, "bn" there.
    """
    *inner, leaf = path
    for length in range(len(inner), -1, -1):
        prefix = modules.get(tuple(inner[:length]))
        if prefix is not None:
            submodules = [names.get(name, name.replace("norm", "bn")) for name in inner[length:]]
            return ".".join([prefix, *submodules, _LEAVES[leaf]])
    raise AssertionError(path)


def _side(
    side: str,
    state: State,
    tree: Any,
    modules: Modules,
    names: Mapping[str, str],
    network: str,
    transposed: str | None,
) -> Any:
    """Converts one side. `transposed` names the module of transposed convolutions, [in, out, kh, kw]."""
    unused = dict(state)
    batch_norm = modules.get(("head", "norm"))
    # The large V2 head has running statistics, but here it normalises by the statistics of the batch.
    for statistic in _STATISTICS:
        unused.pop(f"{batch_norm}.{statistic}", None)
    for key in unused:
        if key.rsplit(".", 1)[-1] in _STATISTICS:
            raise UserError(
                f"{side} side: found {key}, of a batch norm with running statistics, but {network} has "
                "another norm, so its features would differ"
            )

    def take(key_path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = tuple(entry.key for entry in key_path)
        key = official_key(path, modules, names)
        # Our kernels are [kh, kw, in, out] and [in, out].
        axes = {4: (2, 3, 0, 1) if path[0] == transposed else (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[
            len(leaf.shape)
        ]
        expected = tuple(leaf.shape[axes.index(axis)] for axis in range(len(axes)))
        if key not in unused:
            raise UserError(f"{side} side: found no {key}, which {network} has, of shape {expected}")
        value = unused.pop(key)
        if value.shape != expected or value.dtype.kind != "f":
            raise UserError(
                f"{side} side: {key}: found {value.dtype} of shape {value.shape}, expected floats of shape "
                f"{expected} for {network}"
            )
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            converted = np.ascontiguousarray(value.transpose(axes), np.float32)
        if not np.isfinite(converted).all():
            raise UserError(
                f"{side} side: {key}: found numbers that are not finite in float32, allowed: finite ones"
            )
        return converted

    params = jax.tree.map_with_path(take, tree)
    if unused:
        key, value = next(iter(unused.items()))
        raise UserError(f"{side} side: found {key} of shape {value.shape}, which {network} does not have")
    return params


def _modules(
    *,
    name: str,
    cut_layer: int,
    server_state: State,
    head: str = "mlp",
    bottleneck: str | None = None,
    **_: Any,
) -> tuple[Modules, Modules]:
    """The prefixes of the official names of the modules, for client and server."""
    network = NETWORKS[name]
    layers = _layers(network)
    read = read_bottleneck(bottleneck) if bottleneck is not None else None
    client: Modules = {}
    place = _append(client, 0, layers[:cut_layer])
    _append_bottleneck(client, place, read)
    server: Modules = {}
    place = _append(server, _append_bottleneck(server, 0, read), layers[cut_layer:])
    place += 1  # global average pool
    hidden = {"linear": [], "mlp": [("hidden", 0)], "mlp_bn": [("hidden", 0), ("norm", 1)]}[head]
    members = [*hidden, ("out", {"linear": 0, "mlp": 2, "mlp_bn": 3}[head])]
    for member, index in members:
        if network.official_flat_head or (head == "linear" and f"{place}.weight" in server_state):
            server["head", member] = f"{place + index}"
        else:
            server["head", member] = f"{place}.{index}"
    return client, server


def _append(modules: Modules, place: int, layers: Sequence[Paths]) -> int:
    """Numbers the modules of the layers from `place` on, and returns the next number."""
    for path in (path for layer in layers for path in layer):
        if path is not None:
            modules[path] = str(place)
        place += 1
    return place


def _append_bottleneck(modules: Modules, place: int, bottleneck: Bottleneck | None) -> int:
    if bottleneck is None:
        return place
    relu: Paths = [None] if bottleneck.relu else []
    convolutions = [[("bottleneck", f"conv{i}"), *relu] for i in range(max(1, bottleneck.halvings))]
    return _append(modules, place, convolutions)


def _layers(network: Network) -> list[Paths]:
    """The official modules of all layers. They do not depend on width and images."""
    layers = network.layers(width=network.paper_width, image_size=32, stem_stride=1)
    return [
        [None if module is None else (f"layer{i}", *filter(None, [module])) for module in layer.official]
        for i, layer in enumerate(layers)
    ]
