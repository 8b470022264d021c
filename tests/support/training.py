"""Training in this process: a run prepared on one device, which a test can stop anywhere."""

import pathlib
import threading
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh

from mocosfl_jax.config import Config, resolve
from mocosfl_jax.models import SplitModel
from mocosfl_jax.models.forms import Forms
from mocosfl_jax.parallel.mesh import one_device
from mocosfl_jax.training import experiment, loop, workdir
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.journal import Output

Metrics = Mapping[str, float]


def single() -> Mesh:
    """A mesh of JAX's first device."""
    return one_device(jax.devices()[0])


def prepare(
    config: Config, mesh: Mesh | None = None, forms: Forms | None = None, *, model: SplitModel | None = None
) -> Run:
    """Prepare the run of a configuration, by default on one device in the forms of its platform."""
    return experiment.prepare(resolve(config), mesh or single(), forms, model=model)


def train(
    run: Run,
    folder: pathlib.Path,
    stop_at: Callable[[Metrics], bool] = lambda metrics: False,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Train, and stop after the first line of metrics for which `stop_at` holds. `say` prints."""
    workdir.claim(folder, run.config, {})
    stop = threading.Event()

    def watch(metrics: Metrics) -> None:
        if stop_at(metrics):
            stop.set()

    return loop.train(run, stop.is_set, Output(folder, say, watch)).finished


def comparable(folder: pathlib.Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without the speed, which differs from run to run."""
    return [{k: v for k, v in m.items() if k != "images_per_s"} for m in workdir.read_metrics(folder)]
