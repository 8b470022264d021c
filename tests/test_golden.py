"""The step equals the official PyTorch code's, number by number, in float64.

Every NAME.json with its NAME.npz in the folder given by --golden-dir is one case; tests/golden/README.md
says how inputs are made and what the numbers are.
"""

import json
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import Algorithm, TrainState, Views, mocosfl, split_model
from mocosfl_jax.models import resnet

RTOL, ATOL = 1e-6, 1e-9


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = pathlib.Path(metafunc.config.getoption("--golden-dir"))
    names = sorted(p.stem for p in folder.glob("*.json") if "arch" in json.loads(p.read_text()))
    assert names, f"no golden cases in {folder}"
    cases = []
    for name in names:
        missing = not_built_yet(json.loads((folder / f"{name}.json").read_text()))
        marks = [pytest.mark.xfail(reason=missing, strict=True)] if missing else []
        cases.append(pytest.param(folder / name, id=name, marks=marks))
    metafunc.parametrize("case", cases)


def not_built_yet(settings: dict[str, Any]) -> str | None:
    """Why a case cannot pass yet; None: it must."""
    if settings["arch"].lower() not in resnet.DEPTHS:
        return f"{settings['arch']} is not built yet"
    if settings["bottleneck"] != "None":
        return "bottleneck layers at the cut are not built yet"
    if not (settings["c_residual"] and settings["WS"]):
        return "clients without shortcuts and networks without weight standardisation are not built yet"
    return None


class Case:
    """The deterministic inputs of one case, in PyTorch layout."""

    def __init__(self, path: pathlib.Path) -> None:
        self.settings = json.loads(path.with_suffix(".json").read_text())
        self.expected = np.load(path.with_suffix(".npz"))

    def rng(self, name: str) -> np.random.Generator:
        seed = zlib.crc32(name.encode()) + self.settings.get("base", 0)
        return np.random.Generator(np.random.PCG64(seed))

    def parameter(self, name: str, shape: list[int]) -> np.ndarray:
        z = self.rng(name).standard_normal(shape)
        if len(shape) >= 2:
            return z / np.sqrt(np.prod(shape[1:]))
        return 1 + 0.1 * z if name.endswith("scale") else 0.1 * z

    def cohort(self, step: int) -> list[int] | None:
        """Clients that take part in the step; None: all."""
        return self.settings["pools"][step] if self.settings["pools"] else None

    def views(self, step: int) -> Views:
        s = self.settings
        cohort = self.cohort(step) or range(s["num_client"])
        shape = (s["batch_size"], 3, s["size"], s["size"])

        def draw(view: str) -> jax.Array:
            images = [self.rng(f"{view}.client{i}.step{step}").standard_normal(shape) for i in cohort]
            return jnp.asarray(np.stack(images).transpose(0, 1, 3, 4, 2))

        return Views(draw("query"), draw("key"))

    def queue(self) -> np.ndarray:
        z = self.rng("queue").standard_normal((self.settings["K_dim"], self.settings["K"]))
        return (z / np.linalg.norm(z, axis=0)).T


def ours(name: str, mlp: bool) -> list[str]:
    """Path of an official parameter in our tree; the head has a hidden layer if `mlp`."""
    *modules, leaf = name.split(".")
    path = ".".join(modules)
    path = path.replace("shortcut.0", "shortcut_conv").replace("shortcut.1", "shortcut_norm")
    path = path.replace("head.0", "head.hidden" if mlp else "head.out").replace("head.2", "head.out")
    path = path.replace("bn", "norm")
    return [*path.split("."), "kernel" if leaf == "weight" else leaf]


def to_jax(torch_layout: np.ndarray) -> jax.Array:
    if torch_layout.ndim == 4:
        return jnp.asarray(torch_layout.transpose(2, 3, 1, 0))
    return jnp.asarray(torch_layout.T)


def to_torch(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T


def lookup(tree: Any, path: list[str]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def summary(x: np.ndarray) -> np.ndarray:
    """[sum, L2 norm, 16 entries], as in the files."""
    flat = np.ascontiguousarray(x).reshape(-1)
    positions = np.random.Generator(np.random.PCG64(flat.size)).integers(0, flat.size, 16)
    return np.concatenate([[flat.sum(), np.sqrt((flat**2).sum())], flat[positions]])


def build(case: Case) -> tuple[Algorithm, TrainState]:
    """The public algorithm of the case, in the case's initial state."""
    s = case.settings
    assert s["bottleneck"] == "None" and s["c_residual"] and s["WS"]
    model = split_model(
        s["arch"].lower(), cut_layer=s["cut"], image_size=s["size"], key_dim=s["K_dim"], mlp=s["mlp"]
    )
    algorithm = mocosfl(
        model,
        num_clients=s["num_client"],
        server_lr=s["lr"],
        # As a schedule: the number 0 would freeze the clients, and no gradient would cross.
        client_lr=lambda step: jnp.asarray(s["c_lr"]),
        sgd_momentum=s["momentum"],
        weight_decay=s["weight_decay"],
        queue_size=s["K"],
        temperature=s["T"],
        symmetric=s["symmetric"],
        feature_sharing=s["feature_sharing"],
    )
    state = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        jax.jit(algorithm.init)(jax.random.PRNGKey(0)),
    )
    seen = 0
    for parameter in s["parameters"]:
        value = to_jax(case.parameter(parameter["name"], parameter["shape"]))
        *path, leaf = ours(parameter["name"], s["mlp"])
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
    # Without feature sharing each client has an equal share of the rows.
    keys = jnp.asarray(case.queue()).reshape(state.server.queue.keys.shape)
    queue = state.server.queue._replace(keys=keys)
    return algorithm, state._replace(server=state.server._replace(queue=queue))


def test_golden(case: pathlib.Path, x64: None) -> None:
    golden = Case(case)
    s = golden.settings
    algorithm, state = build(golden)
    step, sync = jax.jit(algorithm.step), jax.jit(algorithm.sync)
    compared = set()

    def check(name: str, value: Any) -> None:
        np.testing.assert_allclose(value, golden.expected[name], rtol=RTOL, atol=ATOL, err_msg=name)
        compared.add(name)

    for t in range(s["steps"]):
        cohort = None if golden.cohort(t) is None else jnp.asarray(golden.cohort(t))
        state, info = step(state, golden.views(t), cohort)
        if t + 1 in s["sync_after"]:
            state, _ = sync(state, cohort)
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
            name, path = parameter["name"], ours(parameter["name"], s["mlp"])
            if parameter["side"] == "server":
                check(f"step{t}.server.online.{name}", summary(to_torch(lookup(state.server.params, path))))
                check(
                    f"step{t}.server.momentum.{name}",
                    summary(to_torch(lookup(state.server.key_params, path))),
                )
                continue
            online, momentum = lookup(state.clients.params, path), lookup(state.clients.key_params, path)
            for i in range(s["num_client"]):
                check(f"step{t}.client{i}.online.{name}", summary(to_torch(online[i])))
                check(f"step{t}.client{i}.momentum.{name}", summary(to_torch(momentum[i])))
        keys, cursors = state.server.queue
        if s["feature_sharing"]:
            check(f"step{t}.queue", summary(np.asarray(keys)))
            check(f"step{t}.queue_ptr", cursors)
        else:
            for i in range(s["num_client"]):
                check(f"step{t}.queue{i}", summary(np.asarray(keys[i])))
                check(f"step{t}.queue_ptr{i}", cursors[i])
    assert compared == set(golden.expected.files)
