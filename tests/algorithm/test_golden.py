"""The step equals the official PyTorch code's, number by number, in float64.

Every NAME.json with its NAME.npz in the folder given by --golden-dir is one case; tests/golden/README.md
says how inputs are made and what the numbers are. Each runs in the forms of a CPU and in those of an
accelerator, on whatever platform the tests run; the slower networks are marked slow in the CPU's forms, which
take longer to compile.
"""

import pathlib

import pytest

from mocosfl_jax.models.forms import Forms
from tests.support.algorithms import FORMS
from tests.support.golden import assert_equals_official, cases_in


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = []
    for path, arch in cases_in(pathlib.Path(metafunc.config.getoption("--golden-dir"))).items():
        for form, forms in FORMS.items():
            marks = (pytest.mark.slow,) if form == "cpu" and arch != "ResNet18" else ()
            cases.append(pytest.param(path, forms, id=f"{path.name}, {form}", marks=marks))
    metafunc.parametrize("case, forms", cases)


def test_golden(case: pathlib.Path, forms: Forms, x64: None) -> None:
    # These networks are large enough for optimised code to pay off; conftest.py turns optimisation off.
    assert_equals_official(case, forms, {"xla_backend_optimization_level": 3})
