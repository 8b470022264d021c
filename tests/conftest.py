"""Options, fixtures, the toy network and the small run of the tests."""

import atexit
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

# One cache of compiled programs for all workers and the processes that they start, and not the user's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="mocosfl_jax_tests_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = _cache
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_cache}/compiled"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Nor do they keep freed memory, of which a thousand tests leave gigabytes (glibc's own value).
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "131072")

import jax
import numpy as np
import pytest

from mocosfl_jax import Forms, SplitModel
from mocosfl_jax.models import resnet
from mocosfl_jax.models.named import NETWORKS
from mocosfl_jax.train import main
from tests.support import algorithms
from tests.support.algorithms import FORMS, Build
from tests.support.small_run import arguments, write_images
from tests.support.toy import IMAGE, make_toy_model

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is most of what the tests do, and their arrays are small. The workers keep all cores busy.
QUICK_TO_COMPILE = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):  # XLA stops at a flag that it does not know, as later versions this one
    QUICK_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=str(pathlib.Path(__file__).parent / "golden"),
        help="folder with the NAME.json / NAME.npz cases of test_golden.py",
    )
    parser.addoption(
        "--privacy-dir",
        help="for -m privacy: folder with official_defended_clients.npz, which has the parameters of clients "
        "that the authors released and the images that they attacked, and with CIFAR-10",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The tests run on the CPU, but for those of `-m accelerator`. JAX has not started its backend yet."""
    if config.option.markexpr.split() == ["accelerator"]:
        require_accelerator(config.getoption("numprocesses", None))
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the processes that tests start
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK_TO_COMPILE]).strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)


def require_accelerator(workers: int | None) -> None:
    """End the run in one line where its tests cannot run."""
    if workers:
        pytest.exit("-m accelerator needs -n 0: one process at a time can hold an accelerator", 4)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes of tests need memory too
    if jax.devices()[0].platform == "cpu":
        pytest.exit("-m accelerator needs a GPU or TPU: JAX found only a CPU", 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A warning in a test is an error. First in the list, so that a test's own filters have the last word.

    pyproject.toml says this only of the warnings of our own modules: whatever plugins are installed may warn
    while pytest starts and ends.
    """
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("error"), append=False)


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def released(pytestconfig: pytest.Config) -> dict[str, np.ndarray]:
    """The clients that the authors released, and the images that they attacked."""
    folder = pytestconfig.getoption("--privacy-dir")
    if folder is None:
        pytest.fail("-m privacy needs --privacy-dir=FOLDER")
    with np.load(pathlib.Path(folder) / "official_defended_clients.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def toy_model() -> SplitModel:
    return make_toy_model()


@pytest.fixture
def short_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-18 with two blocks, which compiles in seconds."""
    monkeypatch.setitem(NETWORKS, "resnet18", resnet.resnet("resnet18", (1, 1), bottlenecks=False))


@pytest.fixture(params=FORMS)
def forms(request: pytest.FixtureRequest) -> Forms:
    """The forms of a CPU, and those of an accelerator."""
    return FORMS[request.param]


@pytest.fixture
def build(forms: Forms) -> Build:
    """MocoSFL on a network, in either of the forms."""
    return functools.partial(algorithms.build, forms)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An npz of small pictures, each class with a colour of its own."""
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", (16, 16, 3))


@pytest.fixture(scope="session")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same for the toy network."""
    return write_images(tmp_path_factory.mktemp("data") / "toy_images.npz", IMAGE)


@pytest.fixture(scope="module")
def two_process_images(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The npz of the runs of two processes, `tests/support/processes.py`."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pictures = rng.integers(0, 256, (60, *IMAGE)).astype(np.uint8)
    np.savez(path, x_train=pictures, y_train=labels, x_test=pictures[:20], y_test=labels[:20])
    return path


@pytest.fixture(scope="session")
def finished(images: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run that nobody disturbed; not to be changed."""
    workdir = tmp_path_factory.mktemp("finished")
    assert main(arguments(images, workdir)) == 0
    return workdir
