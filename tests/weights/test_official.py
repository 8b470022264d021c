"""Official checkpoints as parameters of ours; the oracle is the map of test_golden.py."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.weights.official import from_official
from mocosfl_jax.weights.torch_file import read_state_dict
from tests.support.golden import Case, is_transposed, lookup, ours, to_jax

TESTS = pathlib.Path(__file__).parents[1]
CASES = sorted(
    p.with_suffix("") for p in (TESTS / "golden").glob("*.json") if "arch" in json.loads(p.read_text())
)
TINY: dict[str, Any] = {"name": "resnet18", "cut_layer": 1, "width": 4, "key_dim": 6}

State = dict[str, np.ndarray]


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_every_tensor_lands_where_the_golden_map_has_it(case: pathlib.Path) -> None:
    golden = Case(case)
    s = golden.settings
    states: dict[str, State] = {"client": {}, "server": {}}
    for parameter in s["parameters"]:
        value = golden.parameter(parameter["name"], parameter["shape"])
        states[parameter["side"]][parameter["official_key"]] = value
    client, server = from_official(
        states["client"],
        states["server"],
        name=s["arch"].lower(),
        cut_layer=s["cut"],
        image_size=s["size"],
        key_dim=s["K_dim"],
        head="mlp" if s["mlp"] else "linear",
        bottleneck=None if s["bottleneck"] == "None" else s["bottleneck"],
    )
    trees = {"client": client, "server": server}
    for parameter in s["parameters"]:
        found = lookup(trees[parameter["side"]], ours(parameter["name"], s))
        value = states[parameter["side"]][parameter["official_key"]]
        expected = to_jax(value.astype(np.float32), transposed=is_transposed(parameter["name"], s))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected, err_msg=parameter["name"])
    assert len(jax.tree.leaves(trees)) == len(s["parameters"])


@pytest.fixture
def tiny() -> tuple[State, State]:
    """Client and server state of the files in tests/official."""
    client, server = (read_state_dict(TESTS / "official" / f"checkpoint_{side}_best.tar") for side in "cs")
    return client, server


def test_real_files(tiny: tuple[State, State]) -> None:
    client, server = from_official(*tiny, **TINY)
    kernel = tiny[1]["2.shortcut.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(server["layer3"]["shortcut_conv"]["kernel"], kernel)
    np.testing.assert_array_equal(server["head"]["out"]["kernel"], tiny[1]["9.2.weight"].T)
    assert client["layer0"]["conv1"]["kernel"].shape == (3, 3, 3, 4)


def shifted(state: State, by: int) -> State:
    """With every module `by` places further on."""
    parts = ((name.split(".", 1), value) for name, value in state.items())
    return {f"{int(place) + by}.{rest}": value for (place, rest), value in parts}


@pytest.mark.parametrize(("bottleneck", "step"), [("C2S4", 2), ("C2S4noReLU", 1)])
def test_activations_between_bottleneck_layers_are_counted(
    bottleneck: str, step: int, tiny: tuple[State, State]
) -> None:
    def layer(place: int, *shape: int) -> State:
        kernel = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        return {f"{place}.weight": kernel, f"{place}.bias": np.full(shape[1], place, np.float32)}

    client = tiny[0] | layer(1, 2, 4, 3, 3) | layer(1 + step, 2, 2, 3, 3)
    client["1.bias"] = np.full(2, 1, np.float32)
    server = shifted(tiny[1], 2 * step) | layer(0, 2, 2, 3, 3) | layer(step, 2, 4, 3, 3)
    ours_client, ours_server = from_official(client, server, **TINY, bottleneck=bottleneck)
    for tree, first in ((ours_client, 1), (ours_server, 0)):
        assert tree["bottleneck"]["conv0"]["bias"][0] == first
        assert tree["bottleneck"]["conv1"]["bias"][0] == first + step
    kernel = server[f"{step}.weight"]  # [in, out, kh, kw]
    assert ours_server["bottleneck"]["conv1"]["kernel"][2, 1, 0, 3] == kernel[0, 3, 2, 1]


def test_linear_head_without_a_sequential(tiny: tuple[State, State]) -> None:
    client, server = tiny
    server = {name: value for name, value in server.items() if not name.startswith("9.")}
    server |= {"9.weight": np.ones((6, 32), np.float32), "9.bias": np.zeros(6, np.float32)}
    _, params = from_official(client, server, **TINY, head="linear")
    assert params["head"]["out"]["kernel"].shape == (32, 6)


def test_statistics_of_the_large_head_are_ignored(tiny: tuple[State, State]) -> None:
    client, server = tiny[0], dict(tiny[1])
    server |= {"9.0.weight": np.ones((12, 32), np.float32), "9.0.bias": np.ones(12, np.float32)}
    server |= {"9.3.weight": np.ones((6, 12), np.float32), "9.3.bias": server.pop("9.2.bias")}
    del server["9.2.weight"]
    server |= {f"9.1.{name}": np.full(12, 3, np.float32) for name in ("weight", "bias")}
    server |= {"9.1.running_mean": np.zeros(12), "9.1.running_var": np.ones(12)}
    server["9.1.num_batches_tracked"] = np.array(5)
    _, params = from_official(client, server, **TINY, head="mlp_bn")
    assert params["head"]["norm"]["scale"][0] == 3


def edit(key: str, value: np.ndarray | None) -> Callable[[State], State]:
    return lambda state: (
        {k: v for k, v in state.items() if k != key} | ({} if value is None else {key: value})
    )


@pytest.mark.parametrize(
    ("change", "network", "expected"),
    [
        (edit("3.bn1.bias", None), {}, "server side: found no 3.bn1.bias, which resnet18 (cut_layer 1"),
        (
            edit("10.weight", np.ones(2)),
            {},
            "server side: found 10.weight of shape (2,), which resnet18 (cut_layer 1",
        ),
        (
            edit("9.2.weight", np.ones((7, 6))),
            {},
            "9.2.weight: found float64 of shape (7, 6), expected floats of shape (6, 6) for resnet18 (",
        ),
        (edit("9.2.bias", np.ones(6, np.int64)), {}, "9.2.bias: found int64 of shape (6,), expected floats"),
        (edit("9.2.bias", np.full(6, np.nan)), {}, "9.2.bias: found numbers that are not finite in float32"),
        (edit("9.2.bias", np.full(6, 1e300)), {}, "9.2.bias: found numbers that are not finite in float32"),
        (edit("0.bn1.running_mean", np.ones(4)), {}, "found 0.bn1.running_mean, of a batch norm"),
        (
            edit("", None),
            {"width": 8},
            "client side: 0.conv1.weight: found float32 of shape (4, 3, 3, 3), expected",
        ),
        (edit("", None), {"cut_layer": 2}, "client side: found no 1.conv1.weight"),
        (edit("", None), {"name": "vgg11"}, "client side: found no 0.bias"),
        (edit("", None), {"name": "resnet19"}, "name: found 'resnet19'"),
        (edit("", None), {"head": "linear"}, "server side: found 9.2.weight of shape (6, 6), which"),
        (edit("", None), {"norm": "layer"}, "norm: found 'layer'"),
    ],
)
def test_what_is_another_network_is_refused(
    change: Callable[[State], State], network: dict, expected: str, tiny: tuple[State, State]
) -> None:
    client, server = tiny
    with pytest.raises(UserError) as error:
        from_official(client, change(server), **TINY | network)
    assert expected in str(error.value) and "\n" not in str(error.value)
