"""Golden cases: their inputs, and the path of each official parameter in our trees."""

import json
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax import (
    Algorithm,
    CohortState,
    Forms,
    MomentumContrast,
    Views,
    mocosfl,
    one_device,
    split_model,
)
from mocosfl_jax.algorithm import optim
from mocosfl_jax.models import mobilenetv2, vgg

RTOL, ATOL = 1e-6, 1e-9


class Case:
    """The deterministic inputs of one case, in PyTorch layout."""

    def __init__(self, path: pathlib.Path) -> None:
        self.settings = json.loads(path.with_suffix(".json").read_text())
        with np.load(path.with_suffix(".npz")) as arrays:
            self.expected = dict(arrays)

    def rng(self, name: str) -> np.random.Generator:
        seed = zlib.crc32(name.encode()) + self.settings.get("base", 0)
        return np.random.Generator(np.random.PCG64(seed))

    def parameter(self, name: str, shape: list[int]) -> np.ndarray:
        z = self.rng(name).standard_normal(shape)
        if len(shape) >= 2:
            return z / np.sqrt(np.prod(shape[1:]))
        return 1 + 0.1 * z if name.endswith("scale") else 0.1 * z

    def views(self, step: int) -> Views:
        s = self.settings
        shape = (s["batch_size"], 3, s["size"], s["size"])

        def draw(view: str) -> jax.Array:
            images = [
                self.rng(f"{view}.client{i}.step{step}").standard_normal(shape)
                for i in range(s["num_client"])
            ]
            return jnp.asarray(np.stack(images).transpose(0, 1, 3, 4, 2))

        return Views(draw("query"), draw("key"))

    def queue(self) -> np.ndarray:
        z = self.rng("queue").standard_normal((self.settings["K_dim"], self.settings["K"]))
        return (z / np.linalg.norm(z, axis=0)).T


def ours(name: str, settings: dict[str, Any]) -> list[str]:
    """The path of an official parameter in our tree."""
    *modules, leaf = name.split(".")
    layer, rest = modules[0], ".".join(modules[1:])
    if settings["arch"].lower() in vgg.ENTRIES and layer != "head" and layer != "bottleneck":
        # Official names count convolutions and norms; ours count the configuration's entries with pools.
        entries = vgg.ENTRIES[settings["arch"].lower()]
        convs = [i for i, entry in enumerate(entries) if entry != "M"]
        i, is_norm = divmod(int(layer.removeprefix("layer")), 2)
        layer, rest = f"layer{convs[i]}", "norm" if is_norm else "conv"
    elif settings["arch"].lower() == "mobilenetv2" and layer.startswith("layer"):
        # Official names count convolution and norm of the stem, blocks, those of the last layer.
        theirs = ["layer0.conv", "layer0.norm"]
        for group, (_, _, blocks, _) in enumerate(mobilenetv2.GROUPS, start=1):
            theirs += [f"layer{group}.block{i}" for i in range(blocks)]
        last = f"layer{1 + len(mobilenetv2.GROUPS)}"
        theirs += [f"{last}.conv", f"{last}.norm"]
        layer = theirs[int(layer.removeprefix("layer"))]
    path = f"{layer}.{rest}".rstrip(".")
    path = path.replace("shortcut.0", "shortcut_conv").replace("shortcut.1", "shortcut_norm")
    path = path.replace("head.0", "head.hidden" if settings["mlp"] else "head.out")
    path = path.replace("head.2", "head.out").replace("bn", "norm")
    path = path.replace("bottleneck.client", "bottleneck.conv").replace(
        "bottleneck.server", "bottleneck.conv"
    )
    return [*path.split("."), "kernel" if leaf == "weight" else leaf]


def is_transposed(name: str, settings: dict[str, Any]) -> bool:
    """Whether this is the kernel of a transposed convolution: [in, out, kh, kw] in PyTorch."""
    return name.startswith("bottleneck.server") and "S1" not in settings["bottleneck"]


def to_jax(torch_layout: np.ndarray, *, transposed: bool) -> jax.Array:
    if torch_layout.ndim == 4:
        return jnp.asarray(torch_layout.transpose((2, 3, 0, 1) if transposed else (2, 3, 1, 0)))
    return jnp.asarray(torch_layout.T)


def to_torch(leaf: Any, *, transposed: bool) -> np.ndarray:
    leaf = np.asarray(leaf)
    if leaf.ndim == 4:
        return leaf.transpose((2, 3, 0, 1) if transposed else (3, 2, 0, 1))
    return leaf.T


def lookup(tree: Any, path: list[str]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def summary(x: np.ndarray) -> np.ndarray:
    """[sum, L2 norm, 16 entries], as in the golden files."""
    flat = np.ascontiguousarray(x).reshape(-1)
    positions = np.random.Generator(np.random.PCG64(flat.size)).integers(0, flat.size, 16)
    return np.concatenate([[flat.sum(), np.sqrt((flat**2).sum())], flat[positions]])


def build(case: Case, forms: Forms) -> tuple[Algorithm, CohortState]:
    """The public algorithm of the case, and the case's initial state, in which all clients have entered."""
    s = case.settings
    model = split_model(
        s["arch"].lower(),
        cut_layer=s["cut"],
        image_size=s["size"],
        key_dim=s["K_dim"],
        head="mlp" if s["mlp"] else "linear",
        bottleneck=None if s["bottleneck"] == "None" else s["bottleneck"],
        client_residual=s["c_residual"],
        weight_standardisation=s["WS"],
        forms=forms,
    )
    algorithm = mocosfl(
        model,
        num_clients=s["num_client"],
        server_optimizer=optim.sgd(s["lr"], s["momentum"], s["weight_decay"]),
        client_optimizer=optim.sgd(s["c_lr"], s["momentum"], s["weight_decay"]),
        placement=one_device(forms),
        moco=MomentumContrast(
            queue_size=s["K"],
            temperature=s["T"],
            symmetric=s["symmetric"],
            feature_sharing=s["feature_sharing"],
        ),
    )
    state = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, float if leaf.dtype == jnp.float32 else leaf.dtype),
        jax.eval_shape(lambda rng: algorithm.enter(algorithm.init(rng)), jax.random.key(0)),
    )
    seen = 0
    for parameter in s["parameters"]:
        value = to_jax(
            case.parameter(parameter["name"], parameter["shape"]),
            transposed=is_transposed(parameter["name"], s),
        )
        *path, leaf = ours(parameter["name"], s)
        side = state.clients if parameter["side"] == "client" else state.server
        for tree in (side.params, side.key_params):
            holder = lookup(tree, path)
            wanted = holder[leaf].shape[1:] if parameter["side"] == "client" else holder[leaf].shape
            assert value.shape == wanted, parameter["name"]
            holder[leaf] = jnp.broadcast_to(value, holder[leaf].shape)
            seen += 1
    assert seen == len(jax.tree.leaves((state.clients.params, state.clients.key_params))) + len(
        jax.tree.leaves((state.server.params, state.server.key_params))
    )
    keys = jnp.asarray(case.queue())
    if s["feature_sharing"]:
        queue = state.server.queue._replace(keys=keys)
        return algorithm, state._replace(server=state.server._replace(queue=queue))
    # Each client has an equal share of the rows.
    queue = state.clients.queue._replace(keys=keys.reshape(state.clients.queue.keys.shape))
    return algorithm, state._replace(clients=state.clients._replace(queue=queue))


def cases_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """The cases in a folder, as the NAME of each NAME.json and NAME.npz."""
    cases = [p.with_suffix("") for p in sorted(folder.glob("*.json")) if "arch" in json.loads(p.read_text())]
    assert cases, f"no golden cases in {folder}"
    return cases


def assert_equals_official(
    case: pathlib.Path, forms: Forms, compiler_options: dict[str, Any] | None = None
) -> None:
    """Compare every number of the case, to a relative 1e-6. Requires float64 to be enabled."""
    golden = Case(case)
    s = golden.settings
    assert not s["pools"], "all clients take part in every step"
    algorithm, state = build(golden, forms)
    step = jax.jit(algorithm.step, compiler_options=compiler_options)
    sync = jax.jit(algorithm.sync)
    compared = set()

    def check(name: str, value: Any) -> None:
        np.testing.assert_allclose(value, golden.expected[name], rtol=RTOL, atol=ATOL, err_msg=name)
        compared.add(name)

    for t in range(s["steps"]):
        state, info = step(state, golden.views(t))
        if t + 1 in s["sync_after"]:
            state, _ = sync(state)
        check(f"step{t}.loss", info.loss)
        check(f"step{t}.top1_percent", 100 * info.top1)
        crossed = {
            "smashed_query": info.smashed.query,
            "smashed_key": info.smashed.key,
            "smashed_query_grad": info.smashed_grad,
        }
        for name, value in crossed.items():
            check(f"step{t}.{name}", summary(np.asarray(value).transpose(0, 3, 1, 2)))
        for parameter in s["parameters"]:
            name, path = parameter["name"], ours(parameter["name"], s)

            def torch_summary(leaf: Any, name: str = name) -> np.ndarray:
                return summary(to_torch(leaf, transposed=is_transposed(name, s)))

            if parameter["side"] == "server":
                check(f"step{t}.server.online.{name}", torch_summary(lookup(state.server.params, path)))
                check(f"step{t}.server.momentum.{name}", torch_summary(lookup(state.server.key_params, path)))
                continue
            online, momentum = lookup(state.clients.params, path), lookup(state.clients.key_params, path)
            for i in range(s["num_client"]):
                check(f"step{t}.client{i}.online.{name}", torch_summary(online[i]))
                check(f"step{t}.client{i}.momentum.{name}", torch_summary(momentum[i]))
        keys, cursors = state.server.queue or state.clients.queue
        if s["feature_sharing"]:
            check(f"step{t}.queue", summary(np.asarray(keys)))
            check(f"step{t}.queue_ptr", cursors)
        else:
            for i in range(s["num_client"]):
                check(f"step{t}.queue{i}", summary(np.asarray(keys[i])))
                check(f"step{t}.queue_ptr{i}", cursors[i])
    assert compared == set(golden.expected)
