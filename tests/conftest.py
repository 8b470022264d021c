"""Options, fixtures, the toy network and the small run of the tests."""

import atexit
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

# Compiling is most of what the tests do, and their arrays are small. Read when JAX starts its backend.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

# The commands keep what they compile in the user's cache folder, which is not theirs to fill here.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mocosfl_jax_tests_")

# Nor do they keep freed memory, of which a thousand tests leave gigabytes (glibc's own value).
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "131072")

import jax
import numpy as np
import pytest
from toy import IMAGE, make_toy_model

from mocosfl_jax import SplitModel, Views
from mocosfl_jax.train import main

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

CLASSES, PER_CLASS = 4, 12  # of the runs that the commands' tests train


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=str(pathlib.Path(__file__).parent / "golden"),
        help="folder with the NAME.json / NAME.npz cases of test_golden.py",
    )


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def toy_model() -> SplitModel:
    return make_toy_model()


def random_views(seed: int, clients: int, batch: int) -> Views:
    """Views for the toy network: Gaussian images [clients, batch, 4, 4, 3]."""
    rng_query, rng_key = jax.random.split(jax.random.key(seed))
    shape = (clients, batch, *IMAGE)
    return Views(jax.random.normal(rng_query, shape), jax.random.normal(rng_key, shape))


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def compilation_cache(cache_folder: str) -> Iterator[None]:
    """The tests of the commands compile the same programs: once is enough, also over processes."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache_folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    del os.environ["JAX_COMPILATION_CACHE_DIR"], os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An npz of small pictures, each class with a colour of its own."""
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", (16, 16, 3))


@pytest.fixture(scope="session")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same for the toy network."""
    return write_images(tmp_path_factory.mktemp("data") / "toy_images.npz", IMAGE)


def write_images(path: pathlib.Path, shape: tuple[int, int, int]) -> str:
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (CLASSES, 1, 1, 3))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(CLASSES), count)
        pictures = colours[labels] + rng.integers(-40, 40, (len(labels), *shape))
        return pictures.astype(np.uint8), labels

    (x_train, y_train), (x_test, y_test) = draw(PER_CLASS), draw(3)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return str(path)


def arguments(images: str, workdir: pathlib.Path, *more: str) -> list[str]:
    fields = {
        "epochs": 3,
        "data.name": "npz",
        "data.dir": images,
        "clients.num": 4,
        "clients.batch_size": 2,
        "clients.noniid_ratio": 0.5,
        "sync.frequency": 3,
        "model.width": 4,
        "moco.key_dim": 8,
        "moco.queue_size": 20,
        "eval.every": 1,
        "eval.knn_k": 5,
        "eval.probe_epochs": 3,
        "mesh.data": 1,
        "mesh.model": 1,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["train", *overrides, f"--workdir={workdir}", *more]


@pytest.fixture(scope="session")
def finished(images: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run that nobody disturbed; not to be changed."""
    workdir = tmp_path_factory.mktemp("finished")
    assert main(arguments(images, workdir)) == 0
    return workdir
