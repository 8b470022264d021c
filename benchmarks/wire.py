"""A step with clients over a network, all on this machine, compared with a step of simulated clients.

The network is the quickstart's. The clients are threads of one further process, on loopback without
encryption, and run the exported programs. clients_s is the time in which the server waits for smashed data,
from its request to the last answer. The rest is the server's own step, and sending gradients.

Last results: two cores of an AMD EPYC, jax 0.10.2, grpcio 1.85.3, 2026-11-26, --repeats=1. The quickstart's
network was a VGG-11 of width 16 then.

                         ours_s  baseline_s   ratio  clients_s  megabytes
    5 clients, exact      0.135     0.08688  0.6434    0.05396      13.11
    5 clients, int8      0.1137      0.0845  0.7432    0.04193      3.277
    20 clients, exact    0.1327     0.07256  0.5469    0.04955      13.11
    20 clients, int8     0.1235     0.07604  0.6159    0.04631      3.277
    100 clients, exact   0.2291     0.07319  0.3194     0.1365      13.11
    100 clients, int8    0.2725     0.07823  0.2871     0.1698       3.28
"""

import contextlib
import io
import multiprocessing
import threading
import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import jax
import numpy as np

from benchmarks.results import Result, result
from mocosfl_jax.config import Clients, quickstart, resolve
from mocosfl_jax.evaluation.features import make_encode
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.training import experiment
from mocosfl_jax.training.programs import compile_programs
from mocosfl_jax.wire import federation, messages
from mocosfl_jax.wire.hub import Hub, Rules, listening
from mocosfl_jax.wire.member import Access, take_part

NEEDS = ("grpc", "google", "cryptography", "flatbuffers")
COUNTS = (5, 20, 100)


def _clients(port: int, images: list[np.ndarray]) -> None:
    access = Access(f"127.0.0.1:{port}", None, jax.devices()[0].platform, patience=60.0)

    def client(number: int) -> None:
        take_part(access, lambda size: images[number], number, lambda line: None)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(count: int, dtype: str, repeats: int) -> Result:
    """Medians over five steps for each of `repeats`, after two that compile."""
    config = quickstart()
    config.clients = Clients(num=count, noniid_ratio=0.2)
    config.wire.dtype = dtype
    resolved = resolve(config)
    mesh = meshes.make_mesh(resolved.mesh, jax.devices())
    simulated = experiment.prepare(resolved, mesh)
    rng_init, rng_views = jax.random.split(jax.random.key(0))
    state = jax.jit(simulated.algorithm.init)(rng_init)
    start = jax.tree.map(np.asarray, state)
    encode = make_encode(simulated.algorithm, simulated.dataset.mean, simulated.dataset.std)
    programs = compile_programs(simulated, state, rng_views, encode)
    baseline = _seconds(programs, programs.turn.enter(state, None), simulated.steps_per_epoch, repeats)

    images = [np.asarray(simulated.dataset.x_train[part]) for part in simulated.parts]
    run = federation.plan(resolved, mesh, experiment.load(resolved, mesh), dict(enumerate(map(len, images))))
    rules = Rules(count, int(run.batch_sizes[0]), run.dataset.x_train.shape[1], authenticated=False)
    hub = _TimedHub(rules, lambda line: None)
    context = multiprocessing.get_context("spawn")
    with listening(hub, "127.0.0.1:0", None, 1 << 26) as port:
        process = context.Process(target=_clients, args=(port, images), daemon=True)
        process.start()
        programs = federation.make_programs(
            run, state, rng_views, encode, hub=hub, stop=lambda: False, say=lambda line: None
        )
        while len(hub.ready()) < count:
            hub.wait(0.1)
        at_work = programs.turn.enter(jax.device_put(start, jax.tree.map(lambda x: x.sharding, state)), None)
        ours = _seconds(programs, at_work, run.steps_per_epoch, repeats)
        waited = hub.waited[-len(ours) :]
        hub.tell({c: messages.ToClient(goodbye=messages.Goodbye(text="measured")) for c in range(count)})
        process.join(30)
    seconds = {"ours": median(ours), "baseline": median(baseline)}
    sent = hub.traffic["up smashed"] / len(hub.waited)
    return result(
        "wire", f"{count} clients, {dtype}", seconds, clients_s=median(waited), megabytes=sent / 1e6
    )


class _TimedHub(Hub):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.waited: list[float] = []

    def ask(self, requests: Mapping[int, Any], seconds: float) -> dict[int, Any]:
        start = time.perf_counter()
        answers = super().ask(requests, 600.0)
        self.waited.append(time.perf_counter() - start)
        return answers


def _seconds(programs: Any, at_work: Any, steps_per_epoch: int, repeats: int) -> list[float]:
    """The times of single steps, after two that warm up."""
    times = []
    for step in range(2 + 5 * repeats):
        epoch, number = divmod(step, steps_per_epoch)
        begin = time.perf_counter()
        at_work, _ = jax.block_until_ready(
            programs.run_steps(at_work, programs.feed(epoch, range(number, number + 1)))
        )
        times.append(time.perf_counter() - begin)
    return times[2:]


def results(repeats: int) -> Iterator[Result]:
    for count in COUNTS:
        for dtype in ("exact", "int8"):
            with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results only
                measured = measure(count, dtype, repeats)
            yield measured
