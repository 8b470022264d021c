"""The step equals the official PyTorch code's, number by number, in float64.

Every NAME.json with its NAME.npz in the folder given by --golden-dir is one case; tests/golden/README.md says
how inputs are made and what the numbers are. Each case runs in the forms of an accelerator, of a TPU and of
a CPU, on whatever platform the tests run. Most are slow in the last two: a CPU's forms take twice as long to
compile, and a TPU's grouped convolutions are slow on a CPU.
"""

import pathlib
from typing import Any

import jax
import pytest

from mocosfl_jax.models.forms import TPU, Forms
from tests.support.algorithms import FORMS
from tests.support.golden import assert_equals_official, cases_in

QUICK = (("resnet18_cut1_symmetric", "cpu"), ("resnet18_cut2_bottleneck_c4s2", "tpu"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = []
    for path in cases_in(pathlib.Path(metafunc.config.getoption("--golden-dir"))):
        for form, forms in (FORMS | {"tpu": TPU}).items():
            quick = form == "accelerator" or (path.name, form) in QUICK
            marks = () if quick else (pytest.mark.slow,)
            cases.append(pytest.param(path, forms, id=f"{path.name}, {form}", marks=marks))
    metafunc.parametrize("case, forms", cases)


def test_golden(case: pathlib.Path, forms: Forms, x64: None) -> None:
    # Optimised code pays off in these networks, except in MobileNetV2. tests/conftest.py turns it off.
    options: dict[str, Any] = {}
    if not case.name.startswith("mobilenetv2"):
        options["xla_backend_optimization_level"] = 3
        if jax.__version_info__ < (0, 11):
            options["xla_cpu_use_fusion_emitters"] = True
    assert_equals_official(case, forms, options)
