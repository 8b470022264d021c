"""The step equals the official PyTorch code's, number by number, in float64.

Every NAME.json with its NAME.npz in the folder given by --golden-dir is one case; tests/golden/README.md
says how inputs are made and what the numbers are. Each runs in the forms of a CPU and in those of an
accelerator, on whatever platform the tests run; the slower networks are marked slow in the CPU's forms, which
take longer to compile.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.models.forms import Forms
from tests.support.algorithms import FORMS
from tests.support.golden import Case, build, is_transposed, lookup, ours, summary, to_torch

RTOL, ATOL = 1e-6, 1e-9


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = pathlib.Path(metafunc.config.getoption("--golden-dir"))
    settings = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    archs = {name: values["arch"] for name, values in settings.items() if "arch" in values}
    assert archs, f"no golden cases in {folder}"
    cases = []
    for name, arch in archs.items():
        for form, forms in FORMS.items():
            marks = (pytest.mark.slow,) if form == "cpu" and arch != "ResNet18" else ()
            cases.append(pytest.param(folder / name, forms, id=f"{name}, {form}", marks=marks))
    metafunc.parametrize("case, forms", cases)


def test_golden(case: pathlib.Path, forms: Forms, x64: None) -> None:
    golden = Case(case)
    s = golden.settings
    algorithm, state = build(golden, forms)
    # These networks are large enough for optimised code to pay; conftest.py asks for the contrary.
    step = jax.jit(algorithm.step, compiler_options={"xla_backend_optimization_level": 3})
    sync = jax.jit(algorithm.sync)
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
        keys, cursors = state.server.queue
        if s["feature_sharing"]:
            check(f"step{t}.queue", summary(np.asarray(keys)))
            check(f"step{t}.queue_ptr", cursors)
        else:
            for i in range(s["num_client"]):
                check(f"step{t}.queue{i}", summary(np.asarray(keys[i])))
                check(f"step{t}.queue_ptr{i}", cursors[i])
    assert compared == set(golden.expected)
